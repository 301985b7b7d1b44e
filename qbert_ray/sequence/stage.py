"""The stages `pretrain` and `finetune` (§3.5-3.6, §4.1): the sequence model on source domains, then on each target domain."""

from __future__ import annotations

from typing import Any, TypedDict

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.sequence.decoder_task import GenerativeTask
from qbert_ray.sequence.task import SequencerTask, ValidationMetrics
from qbert_ray.storage.directory import ArtifactError, RunDir


class PretrainCounts(TypedDict):
    domains: list[str]
    metrics: ValidationMetrics  # of the last epoch


def sequence_task(config: Config) -> type[SequencerTask] | type[GenerativeTask]:
    """The task that trains the kind of sequence model that is asked for."""
    return GenerativeTask if config.sequencer.kind == "generative" else SequencerTask


def pretrain(config: Config, run: RunDir, executor: Executor, progress: Progress) -> PretrainCounts:
    """Pre-train on the source domains: with several masks, or the generative model on every prefix.

    Raises:
        ValueError: pretrain.domains names what is not there.
    """
    domains = config.pretrained
    if unknown := set(domains) - set(config.data.domains):
        raise ValueError(f"pretrain.domains names {sorted(unknown)}; data.domains has {list(config.data.domains)}")
    arguments = {"domains": domains, "settings": config.pretrain}
    return {
        "domains": domains,
        "metrics": executor.fit(sequence_task(config), config, run, "pretrain", config.compute.pretrain, progress, **arguments),
    }


def finetune(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, dict[str, ValidationMetrics]]:
    """Fine-tune on each target domain, from the pre-trained weights where there are any; returns the last metrics of each."""
    figures: dict[str, ValidationMetrics] = {}
    for domain in config.data.targets:
        progress.note(domain)
        figures[domain] = _finetune(config, run, f"finetune/{domain}", executor, progress, domains=[domain], settings=config.finetune)
    return {"metrics": figures}


def finetune_again(config: Config, run: RunDir, domain: str, folder: str, executor: Executor, progress: Progress) -> int:
    """Fine-tune on a domain again, with the held-out interactions of `refit.include`; returns the number of epochs.

    There are as many as the training without them kept, in which the schedule of the learning rate ends; nothing is chosen any more.

    Raises:
        ArtifactError: the log of the training without them is not there.
    """
    log = run.read_lines(f"finetune/{domain}/metrics.jsonl")
    if not log:
        raise ArtifactError(
            f"{run.uri}/finetune/{domain}/metrics.jsonl, which says how many epochs were kept, is missing; redo it: --from finetune"
        )
    epochs = epochs_kept(log)
    settings = config.finetune.model_copy(update={"epochs": epochs, "patience": None})
    _finetune(config, run, folder, executor, progress, domains=[domain], settings=settings, include=config.refit.include)
    return epochs


def epochs_kept(log: list[ValidationMetrics]) -> int:
    """Number of epochs after which a training was best, by its lines of metrics.jsonl; all where nothing was validated."""
    return 1 + max(range(len(log)), key=lambda epoch: log[epoch].get("ndcg@10", epoch))


def _finetune(config: Config, run: RunDir, folder: str, executor: Executor, progress: Progress, **arguments: Any) -> ValidationMetrics:
    start = None if config.no_pretraining else "pretrain/model"
    return executor.fit(sequence_task(config), config, run, folder, config.compute.finetune, progress, start=start, **arguments)
