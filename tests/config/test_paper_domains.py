"""The paper's nine domains under the names and with the files that `qbert-ray fetch` gives them."""

import re

from qbert_ray.config.loading import load_config
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
