"""The section `compute`: the resources of each stage. They change the time, not the result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from qbert_ray.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class Actors(Section):
    """Names as in Ray: ActorPoolStrategy and ray.remote."""

    min_size: PositiveInt = Field(1, description="fewest actors; a cluster without room for them is refused")
    max_size: PositiveInt | None = Field(None, description="None: one per GPU, or as many as the CPUs carry")
    num_cpus: PositiveFloat = Field(1, description="CPUs of each actor, and its threads")
    num_gpus: NonNegativeFloat | None = Field(None, description="None: 1 where the cluster has GPUs, else 0")
    accelerator_type: str | None = Field(None, description="only on nodes with this kind of GPU, such as A100")
    label_selector: dict[str, str] = Field(
        {}, description="only on nodes with these Ray labels, such as {pool: encoders}; values may be !other, in(a, b) or !in(a, b)"
    )


class Workers(Section):
    """Names as in Ray: ScalingConfig."""

    num_workers: PositiveInt | Literal["auto"] | tuple[PositiveInt, PositiveInt] = Field(
        1,
        description="training processes, at most as many as microbatches; auto: one per GPU, or per node where there is none; "
        "[fewest, most]: as many as fit, and the group is resized when nodes join or leave",
    )
    cpus_per_worker: PositiveFloat | None = Field(
        None, description="None: an equal share of the cluster's, at most 16; also the number of threads"
    )
    use_gpu: bool | None = Field(None, description="None: where the cluster has one per worker")
    max_failures: int = Field(3, description="worker failures survived per training; -1: any number")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="workers on few nodes or on many"
    )
    accelerator_type: str | None = Field(None, description="only on nodes with this kind of GPU, such as A100")
    label_selector: dict[str, str] = Field(
        {}, description="only on nodes with these Ray labels, such as {pool: encoders}; values may be !other, in(a, b) or !in(a, b)"
    )

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, number: int | str | tuple[int, int]) -> int | str | tuple[int, int]:
        if isinstance(number, tuple) and number[0] > number[1]:
            raise ValueError(f"[{number[0]}, {number[1]}] must be [fewest, most]")
        return number

    @property
    def fewest(self) -> int:
        """The smallest number of workers that trains."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else 1 if isinstance(self.num_workers, str) else self.num_workers

    def alone(self) -> Workers:
        """Resources for a model that is not trained by gradients: one task without a GPU."""
        return self.model_copy(update={"num_workers": 1, "use_gpu": False, "placement_strategy": "PACK", "accelerator_type": None})


class Compute(Section):
    executor: Literal["ray", "local"] = Field(
        "ray", description="ray: on a Ray cluster, or one started here; local: in this process, without Ray"
    )
    threads: PositiveInt | None = Field(None, description="of torch in the local executor; None: as torch has them")
    address: str | None = Field(
        None,
        description="Ray cluster, auto: the one that runs on this machine; None: RAY_ADDRESS, or a Ray of its own that ends with the run",
    )
    autoscaling: bool = Field(False, description="the cluster adds nodes on demand without telling Ray how many: allow more than it has")
    checkpoint_seconds: NonNegativeFloat = Field(20.0, description="seconds between checkpoints of a training, at the end of an epoch")
    features: Actors = Actors()
    fusion: Workers = Workers()
    quantizer: Workers = Workers()
    pretrain: Workers = Workers()
    finetune: Workers = Workers()
    semantic_ids: Actors = Actors()
    ranking: Actors = Actors()
    evaluate: Actors = Actors()
    score: Actors = Actors()
