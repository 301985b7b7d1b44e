"""The training loop: workers, resuming, and what the cluster cannot carry."""

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train import ControllerError

from qbert_ray.config.schema import Workers
from qbert_ray.execution import ray_trainers as trainers
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.execution.ray_train import fit
from qbert_ray.fusion.task import FusionTask
from qbert_ray.pipeline import run_stage
from qbert_ray.semantic_ids.task import QuantizerTask
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage.stages import BY_NAME
from qbert_ray.training import Loop

CPU = torch.device("cpu")
BOUND = 1e-5  # of a weight after training, where workers compute with equally many threads


def tasks(config, run):
    finetune = {"domains": ["demo"], "settings": config.finetune}
    return {
        "fusion": lambda: FusionTask(config, run),
        "rqvae": lambda: QuantizerTask(config, run),
        "finetune": lambda: SequencerTask(config, run, **finetune),
    }


@pytest.mark.parametrize("name", ["fusion", "rqvae", "finetune"])
def test_a_resumed_training_equals_an_uninterrupted_one(finished, name, tmp_path):
    make = tasks(*finished)[name]
    whole, cut = Loop(make(), CPU), Loop(make(), CPU)
    while not whole.finished:
        whole.run_epoch()
    cut.run_epoch()
    cut.run_epoch()
    cut.save(tmp_path)
    resumed = Loop(make(), CPU)
    resumed.restore(tmp_path)
    while not resumed.finished:
        resumed.run_epoch()
    assert whole.log == resumed.log
    for a, b in ((whole.weights(), resumed.weights()), (whole.best, resumed.best)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("name", "task"), [pytest.param("fusion", FusionTask, marks=pytest.mark.slow), ("finetune", SequencerTask)])
def test_two_workers_give_the_model_of_one(finished, name, task, tmp_path):
    config, run = finished
    arguments = {"domains": ["demo"], "settings": config.finetune} if name == "finetune" else {}
    models = []
    for number in (1, 2):
        folder = f"parity/{name}-{number}"
        fit(task, config, run, folder, Workers(num_workers=number, cpus_per_worker=1), Quiet(), **arguments)
        models.append(run.load_model(f"{folder}/model")[0])
    start = task(config, run, **arguments).build().state_dict()
    moved = max(float((start[key] - models[0][key]).abs().max()) for key in start)
    apart = max(float((models[1][key] - models[0][key]).abs().max()) for key in start)
    print(f"{name}: weights moved by up to {moved:.3g}, one and two workers differ by up to {apart:.3g}")
    assert moved > 1e-3
    assert apart <= BOUND


def test_fine_tuning_takes_layers_of_other_domains_and_everything_of_its_own(finished):
    config, run = finished
    pretrained, _ = run.load_model("pretrain/model")
    assert pretrained.pop("repeats") == 0  # fine-tuning chooses it when it is over

    def taken(domains, transfer):
        changes = {"pretrain": {"domains": domains}, "finetune": {"transfer": transfer, "objective": "masked"}}
        changed = config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()})
        state = SequencerTask(changed, run, ["demo"], changed.finetune, "pretrain/model").build().state_dict()
        return {name for name in pretrained if torch.equal(state[name], pretrained[name])}

    layers = {name for name in pretrained if name.startswith("layers.")}
    assert layers < set(pretrained)
    assert config.data.sources and taken(None, "layers") == taken(["elsewhere"], "layers") == layers
    for domains, transfer in ((None, "all"), (["elsewhere", "demo"], "layers")):
        assert taken(domains, transfer) == set(pretrained)


def test_a_sequence_that_masks_its_last_item_reads_a_prefix_that_varies_by_epoch(finished):
    config, run = finished
    settings = config.finetune.model_copy(update={"objective": "masked", "last_item_share": 1.0, "prefix_share": 1.0})
    task, read = SequencerTask(config, run, ["demo"], settings), []
    model = task.build()
    model.forward = lambda batch, table: read.append(batch) or torch.zeros(int(batch.masked.sum()), config.sequencer.width)
    samples = task.batches(0)[0]
    for epoch in range(2):
        task.loss(model, samples, epoch, CPU)
    whole = int((samples[:, 3] - samples[:, 2]).sum())
    assert all(int(batch.masked.sum()) == len(samples) and not batch.position[batch.masked].any() for batch in read)
    assert all(len(batch.items) < whole for batch in read)
    assert not torch.equal(read[0].items, read[1].items)


@pytest.mark.parametrize(("settings", "there"), [({}, True), ({"tokens": "flat"}, False), ({"loss": "tokens"}, False)])
def test_items_have_embeddings_only_where_the_head_trains_them(finished, settings, there):
    config, run = finished
    sequencer = config.sequencer.model_copy(update={"item_embedding": True} | settings)
    model = SequencerTask(config.model_copy(update={"sequencer": sequencer}), run, ["demo"], config.finetune).build()
    assert bool(len(model.item_embedding)) == there


def test_a_finished_training_is_not_repeated(finished):
    config, run = finished
    before = run.read_json("fusion/model/model.json")
    metrics = fit(lambda *_: 1 / 0, config, run, "fusion", config.compute.fusion, Quiet())  # would fail if it built a task
    assert metrics["epoch"] == config.fusion.epochs - 1
    assert run.read_json("fusion/model/model.json") == before


def test_input_vectors_with_nan_end_in_a_message_not_in_a_broken_model(finished):
    config, run = finished
    task = QuantizerTask(config, run)
    loop = Loop(task, CPU)
    loop.run_epoch()
    task.embeddings[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        loop.run_epoch()


def test_later_stages_need_the_earlier_manifest(finished):
    config, run = finished
    assert run_stage(BY_NAME["semantic_ids"], config, run, RayExecutor(), Quiet()).counts["codebook_size"] == config.quantizer.codebook_size


class Failing:
    """A trainer that fails as told, and then does not."""

    def __init__(self, *failures):
        self.failures = list(failures)

    def fit(self):
        if self.failures:
            raise self.failures.pop(0)


@pytest.mark.parametrize("alone", [False, True])
def test_what_a_training_survives(alone, monkeypatch):
    monkeypatch.setattr(trainers, "started_locally", lambda: alone)
    lost = ControllerError(ActorUnavailableError("link cut", None))
    trainers.fit_with_retries(Failing(lost, lost), 2)
    with pytest.raises(ControllerError):
        trainers.fit_with_retries(Failing(lost, lost), 1)
    with pytest.raises(ControllerError):
        trainers.fit_with_retries(Failing(ControllerError(OSError("disk full"))), 3)
    died = Failing(ActorDiedError())
    if alone:
        with pytest.raises(ActorDiedError):
            trainers.fit_with_retries(died, 3)
    else:
        trainers.fit_with_retries(died, 3)
