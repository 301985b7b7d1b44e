"""The training task of stage 2 on a small run: what it is fitted on, what each kind builds, and what happens between epochs."""

import numpy as np
import pytest
import torch

from qbert_ray import metrics
from qbert_ray.config.schema import Config
from qbert_ray.semantic_ids import kmeans
from qbert_ray.semantic_ids import task as tasks
from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.semantic_ids.task import ExtraQuantizerTask, QuantizerTask, sample_embeddings
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, RunDir
from tests.small_run import COLD, ITEMS, PART, WIDTH, make_run

WARM = ITEMS - COLD
SETTINGS = {"kind": "rqvae", "num_levels": 2, "codebook_size": 8, "codebook_dim": 6, "hidden": [10], "batch_size": 10, "warmup_epochs": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), domains=("shop", "other"))


def make_config(run, domains=("shop",), **changes):
    sections = {"run": {"dir": run.uri, "seed": 3}, "data": {"domains": {name: {} for name in domains}}, "quantizer": SETTINGS | changes}
    return Config.model_validate(sections)


def make_task(run, **changes):
    return QuantizerTask(make_config(run, **changes), run)


def build(task):
    torch.manual_seed(0)
    return task.build()


def embeddings_of(run, domain="shop"):
    return columns.to_numpy(run.read("fusion/embeddings", domain, ["embedding"])["embedding"]).copy()


def test_all_items_that_training_may_see_are_read_domain_after_domain(run):
    whole = [embeddings_of(run, name)[:WARM] for name in ("other", "shop")]
    assert (sample_embeddings(run, ["shop"], WARM, 0) == whole[1]).all()
    assert (sample_embeddings(run, ["other", "shop"], 500, 0) == np.concatenate(whole)).all()


def test_of_many_items_a_sample_without_repetition_is_read_in_their_order(run):
    every = np.concatenate([embeddings_of(run, name)[:WARM] for name in ("shop", "other")])
    samples = [sample_embeddings(run, ["shop", "other"], 30, seed) for seed in (1, 1, 2)]
    assert [len(each) for each in samples] == [30, 30, 30]
    places = [[int(np.flatnonzero((every == row).all(1))[0]) for row in each] for each in samples]
    assert all(sorted(set(each)) == each for each in places) and places[0] == places[1] != places[2]
    assert any(place >= WARM for place in places[0]) and max(place for place in places[0] if place < WARM) > PART


def test_a_run_without_embeddings_says_which_command_makes_them(tmp_path):
    with pytest.raises(ArtifactError, match="no table fusion/embeddings in .*qbert-ray fusion"):
        sample_embeddings(RunDir(str(tmp_path)), ["shop"], 9, 0)


@pytest.mark.parametrize("kind", ["rqvae", "kmeans", "opq"])
def test_a_description_rebuilds_the_model(run, kind):
    task = make_task(run, kind=kind, shortcut=False, commitment_weight=0.7)
    found = task.description()
    shape = {"width": WIDTH, "num_levels": 2, "codebook_size": 8, "codebook_dim": 6}
    trained = {"hidden": [10], "shortcut": False, "commitment_weight": 0.7}
    assert found == shape | (trained if kind == "rqvae" else {"hidden": []})
    RQVAE(**found).load_state_dict(task.build().state_dict())


@pytest.mark.parametrize("kind", ["kmeans", "opq"])
def test_a_quantizer_without_gradients_is_built_as_it_is_fitted(run, kind):
    task = make_task(run, kind=kind)
    expected = RQVAE(WIDTH, [], 2, 8, 6)
    {"kmeans": kmeans.fit_residual, "opq": kmeans.fit_product}[kind](expected, torch.from_numpy(embeddings_of(run)[:WARM]), 3)
    for name, tensor in task.build().state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_trained_quantizer_starts_centred_and_with_random_codebooks(run):
    model = build(make_task(run))
    data = embeddings_of(run)[:WARM]
    assert model.mean.tolist() == pytest.approx(data.mean(0).tolist(), abs=1e-5)
    assert model.encoder.mlp is not None and float(model.quantizer.codebooks.detach().std()) == pytest.approx(0.1, rel=0.3)


def test_batches_hold_every_item_once(run):
    task = make_task(run)
    assert task.criterion is None and task.seed == 3
    orders = [np.concatenate(task.batches(epoch)).tolist() for epoch in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(WARM)) and orders[0] == orders[1] != orders[2]
    assert [len(batch) for batch in task.batches(0)] == [9] * 4


def test_the_first_epochs_train_an_autoencoder_and_the_others_the_codebooks_too(run):
    task, samples = make_task(run), np.array([4, 0, 30])
    model = build(task)
    rows = torch.from_numpy(embeddings_of(run)[samples])
    for epoch, quantize in ((0, False), (1, False), (2, True), (5, True)):
        with torch.no_grad():
            loss, weight = task.loss(model, samples, epoch, CPU)
            expected = model(rows, quantize=quantize)["loss"]
        assert weight == 3.0 and float(loss) == pytest.approx(3 * float(expected))


def test_codebooks_start_at_the_end_of_a_training_that_is_no_longer_than_the_warm_up(run):
    task = make_task(run, epochs=1)
    model = build(task)
    random = model.quantizer.codebooks.detach().clone()
    with torch.no_grad():
        task.adjust(model, 0)
        assert torch.equal(model.quantizer.codebooks, random)
        task.adjust(model, 1)
    assert not torch.equal(model.quantizer.codebooks, random)


def test_codebooks_start_after_the_warm_up_and_unused_codewords_move_from_then_on(run):
    task = make_task(run, epochs=6)
    model = build(task)
    random = model.quantizer.codebooks.detach().clone()
    with torch.no_grad():
        latent = model.encode(task.embeddings)
        for epoch in (0, 1):
            task.adjust(model, epoch)
        assert torch.equal(model.quantizer.codebooks, random)
        task.adjust(model, 2)
        started = model.quantizer.codebooks.clone()
        model.quantizer.start(latent, 3)
        assert torch.equal(started, model.quantizer.codebooks) and not torch.equal(started, random)
        model.quantizer.codebooks[0, 5:] = 1e3
        unused = model.quantizer.codebooks.clone()
        task.adjust(model, 3)
        moved = model.quantizer.codebooks.clone()
        model.quantizer.codebooks.copy_(unused)
        model.quantizer.reseed(latent, 3 + 3)
        assert torch.equal(moved, model.quantizer.codebooks) and not torch.equal(moved, unused)


class Reseeding:
    """Counts the rounds of reseeding, of which so many move a codeword."""

    def __init__(self, moving):
        self.moving, self.seeds = moving, []
        self.mean, self.quantizer = torch.zeros(WIDTH), self

    def encode(self, rows):
        return rows

    def reseed(self, latent, seed):
        self.seeds.append(seed)
        assert latent.shape == (WARM, WIDTH)
        return int(len(self.seeds) <= self.moving)


@pytest.mark.parametrize(
    ("epoch", "moving", "seeds"), [(5, 9, [8]), (6, 0, [9]), (6, 2, [9, 10, 11]), (6, 9, [9, 10, 11, 12, 13])], ids=str
)
def test_after_the_last_epoch_codewords_move_until_all_are_used_or_five_times(run, monkeypatch, epoch, moving, seeds):
    monkeypatch.setattr(tasks, "SAMPLE", 7)  # items are encoded piece by piece
    model = Reseeding(moving)
    make_task(run, epochs=6).adjust(model, epoch)
    assert model.seeds == seeds


@torch.inference_mode()
def test_metrics_are_those_of_the_codes_of_all_items(run, monkeypatch):
    task = make_task(run, kind="kmeans")
    model = build(task)
    codes = model.codes(task.embeddings).numpy()
    monkeypatch.setattr(tasks, "SAMPLE", 7)
    found = task.evaluate(model, CPU)
    assert found["items"] == WARM and found["collision_rate"] == metrics.collision_rate(codes)
    assert found["codebook_usage"] == metrics.codebook_usage(codes, 8) and found["perplexity"] == metrics.perplexity(codes)
    target = (task.embeddings - model.mean) / model.deviation
    output = model.decoder(model.quantizer(model.encoder(target)).vector)
    error = float((output - target).square().mean() / target.var(unbiased=False))
    assert found["reconstruction_error"] == pytest.approx(error, rel=1e-5) and error > 0, "of all items, not of those of the first piece"
    assert found.keys() == {"items", "reconstruction_error", "collision_rate", "codebook_usage", "perplexity"}


def test_an_extra_quantizer_is_another_kind_with_another_seed(run):
    config = make_config(run, extra_quantizers=["opq", "kmeans"], num_levels=4, codebook_dim=3)
    first, second = (ExtraQuantizerTask(config, run, number) for number in (0, 1))
    assert (first.settings.kind, first.settings.num_levels, first.seed) == ("opq", 3, 4)  # no more levels than dimensions
    assert (second.settings.kind, second.settings.num_levels, second.seed) == ("kmeans", 4, 5)
    assert first.settings.codebook_size == second.settings.codebook_size == 8
    assert torch.equal(first.embeddings, QuantizerTask(config, run).embeddings)
    assert first.description()["hidden"] == [] and first.description()["num_levels"] == 3
