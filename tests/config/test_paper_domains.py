"""What comes from the paper: its nine domains, with the names and files of `qbert-ray fetch`, and Eq. 5 as `configs/paper.yaml` weighs it."""

import re

import pytest
import torch

from qbert_ray.config.loading import load_config
from qbert_ray.fusion.model import Fused, alignment_loss
from qbert_ray.inputs.public_data import find
from tests import ROOT

FILE = ROOT / "configs" / "paper_domains.yaml"
SOURCES = [
    "Pet_Supplies",
    "Cell_Phones_and_Accessories",
    "Automotive",
    "Tools_and_Home_Improvement",
    "Toys_and_Games",
    "Sports_and_Outdoors",
]
TARGETS = ["Musical_Instruments", "Arts_Crafts_and_Sewing", "Video_Games"]


def test_files_are_those_that_fetch_writes():
    fetched = dict(re.findall(r"qbert-ray fetch (\S+) -o data/(\S+)", FILE.read_text()))
    assert [name.partition(":")[2] for name in fetched] == SOURCES + TARGETS
    domains = load_config([FILE]).data.domains
    assert list(domains) == list(fetched.values())
    for name, folder in fetched.items():
        assert [f"{folder}/{file.name}" for file in find(name).files] == [domains[folder].items, domains[folder].interactions]


def test_six_domains_are_sources_and_three_are_targets():
    config = load_config([FILE, ROOT / "configs" / "paper.yaml", ROOT / "configs" / "encoders" / "paper.yaml"])
    assert len(config.data.sources) == 6 and config.data.targets == ["instruments", "arts", "games"]
    assert config.pretrained == config.data.sources and config.no_pretraining is None and config.modalities == ["text", "image"]


def test_the_consistency_term_is_a_sum_over_dimensions():
    """Eq. 5 with lambda = .01: the loss takes the mean, so the weight holds the width."""
    fusion = load_config([ROOT / "configs" / "paper.yaml"]).fusion
    assert fusion.consistency_weight / fusion.width == pytest.approx(0.01)
    fused, query = torch.randn(3, fusion.width), torch.randn(3, fusion.width)
    item = Fused(fused, fused[:, None], torch.zeros(3, 1, dtype=torch.bool), query, torch.ones(3), torch.ones(3), torch.ones(3))
    loss = alignment_loss(item, 0.07, fusion.consistency_weight, 0.0, 1.6)["loss"]  # no modality is there, so nothing is contrasted
    assert float(loss) == pytest.approx(0.01 * float((fused - query).square().sum(1).mean()), rel=1e-5)
