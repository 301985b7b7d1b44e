"""A model's JSON does not decide how much memory is taken: it is compared with the weights first."""

import resource

import pytest

from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.sequence.model import Sequencer
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.storage.models import rebuild

OWN = {"num_levels": 2, "codebook_size": 8, "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16, "max_items": 8}


@pytest.fixture
def run(tmp_path):
    run = RunDir(str(tmp_path))
    run.save_model("finetune/shop/model", Sequencer(**OWN).state_dict(), OWN)
    return run


def test_a_model_comes_back(run):
    model = rebuild(Sequencer, run, "finetune/shop/model")
    tensors = run.load_model("finetune/shop/model")[0]
    assert not model.training and all(tensors[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"width": 10**9},
            {"num_layers": 10**8},
            {"num_levels": 10**12},
            {"codebook_size": 10**9},
            {"max_items": 2**40},
            {"ffn_width": -1},
        ),
        *(
            {"num_heads": 0},
            {"width": "16"},
            {"width": None},
            {"unknown": 1},
            {"warm_items": {"shop": 10**10}},
            {"width": 32},
            {"num_layers": 2},
        ),
    ],
)
def test_another_description_is_refused_before_anything_of_its_size_is_allocated(run, fields):
    tensors, _ = run.load_model("finetune/shop/model")
    run.save_model("finetune/shop/model", tensors, OWN | fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"finetune/shop/model/model.json is not the Sequencer.*qbert-ray finetune --redo"):
        rebuild(Sequencer, run, "finetune/shop/model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_weights_of_another_model_are_refused(run):
    tensors, _ = run.load_model("finetune/shop/model")
    run.save_model("quantizer/model", tensors, {"width": 16})
    with pytest.raises(ArtifactError, match=r"quantizer/model/model.json is not the RQVAE"):
        rebuild(RQVAE, run, "quantizer/model")
