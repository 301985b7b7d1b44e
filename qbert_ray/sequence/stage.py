"""The stages `pretrain` and `finetune` (§3.5-3.6, §4.1): the sequence model on source domains, then on each target domain."""

from __future__ import annotations

from typing import Any, TypedDict

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.sequence.decoder_task import GenerativeTask
from qbert_ray.sequence.task import SequencerTask, ValidationMetrics
from qbert_ray.storage.directory import RunDir


class PretrainCounts(TypedDict):
    domains: list[str]
    metrics: ValidationMetrics  # of the last epoch


class FinetuneCounts(TypedDict):
    metrics: dict[str, ValidationMetrics]  # target domain -> of the last epoch


def sequence_trainings(stage: str, config: Config) -> dict[str, dict[str, Any]]:
    """Folder of each training of the stage "pretrain" or "finetune" -> arguments of its task.

    Raises:
        ValueError: pretrain.domains names what is not there.
    """
    if stage == "finetune":
        start = None if config.no_pretraining else "pretrain/model"
        return {f"finetune/{name}": {"domains": [name], "settings": config.finetune, "start": start} for name in config.data.targets}
    unknown = set(config.pretrained) - set(config.data.domains)
    if unknown:
        raise ValueError(f"pretrain.domains names {sorted(unknown)}; data.domains has {list(config.data.domains)}")
    return {"pretrain": {"domains": config.pretrained, "settings": config.pretrain}}


def sequence_task(config: Config) -> type[SequencerTask] | type[GenerativeTask]:
    """The task that trains the kind of sequence model that is asked for."""
    return GenerativeTask if config.sequencer.kind == "generative" else SequencerTask


def pretrain(config: Config, run: RunDir, executor: Executor, progress: Progress) -> PretrainCounts:
    """Pre-train on the source domains: with several masks, or the generative model on every prefix."""
    ((folder, arguments),) = sequence_trainings("pretrain", config).items()
    arguments = {"config": config, "run": run} | arguments
    figures = executor.fit(sequence_task(config), arguments, config.compute.pretrain, run, folder, progress, config.compute)
    return {"domains": config.pretrained, "metrics": figures}


def finetune(config: Config, run: RunDir, executor: Executor, progress: Progress) -> FinetuneCounts:
    """Fine-tuning on each target domain, from the pre-trained weights where there are any."""
    figures: dict[str, ValidationMetrics] = {}
    for folder, arguments in sequence_trainings("finetune", config).items():
        (domain,) = arguments["domains"]
        progress.note(domain)
        arguments = {"config": config, "run": run} | arguments
        figures[domain] = executor.fit(sequence_task(config), arguments, config.compute.finetune, run, folder, progress, config.compute)
    return {"metrics": figures}
