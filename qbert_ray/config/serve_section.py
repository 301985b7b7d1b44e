"""The section `serve`: online serving of a finished run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qbert_ray.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class Serve(Section):
    """Online serving by Ray Serve; no stage depends on it."""

    host: str = Field("127.0.0.1", description="address of the HTTP server; 0.0.0.0 lets everybody in who reaches the machine")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port of the HTTP server")
    num_replicas: PositiveInt = Field(1, description="processes that answer; each holds the models of all target domains")
    num_cpus: PositiveFloat = Field(1.0, description="CPUs of each replica, and its threads")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs of each replica; above 0 the sequence model computes there")
    max_batch_size: PositiveInt = Field(64, description="most requests that are answered together, of those that wait")
    reload_seconds: PositiveFloat = Field(
        10.0, description="seconds between looks at whether the run, or what score.exclude reads, has changed"
    )
