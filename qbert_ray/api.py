"""The Python API: runs a config, and reads the outputs of a run.

config = load_config("shop.yaml", "finetune.epochs=5")
finished = run(config, executor="local")
finished.table("semantic_ids")
finished.recommender().recommend([["item-1"]], k=10)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from qbert_ray.config import loading
from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import open_executor
from qbert_ray.execution.progress import Progress, Quiet
from qbert_ray.inputs.sources import check_root
from qbert_ray.metrics import Evaluation
from qbert_ray.pipeline import preflight, run_stage, save_config
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.lock import locked
from qbert_ray.storage.stages import REQUESTED, STAGES


def load_config(*sources: str | Path) -> Config:
    """The config from YAML files, merged left to right, and from `section.field=value` strings, which override them.

    Args:
        sources: paths of YAML files and overrides in any order; a string with "=" is an override. A path such as
            "configs/demo.yaml" that is not on this machine names a config that comes with the package.

    Raises:
        ConfigError: a file cannot be read, or a key or value is not valid.
    """
    overrides = [source for source in sources if isinstance(source, str) and "=" in source]
    return loading.load_config([source for source in sources if source not in overrides], overrides)


def run(config: Config, executor: Literal["ray", "local"] | None = None, progress: Progress | None = None) -> FinishedRun:
    """Run every stage of a config that is not done yet, and return the run.

    A stage that is done is skipped, one that was interrupted resumes, and one that was made with another config is refused.

    Args:
        config: what to do; its `run.dir` holds the outputs.
        executor: "ray": on a Ray cluster, or one that is started on this machine; "local": in this process, without Ray;
            None: as `compute.executor` says.
        progress: receives how far each stage is.

    Returns:
        The run, whose tables and models can be read.

    Raises:
        ArtifactError: existing outputs were made with another config or from other data.
        SourceError: the input files cannot be used.
        LockedError: another process writes into the run directory.
    """
    if executor is not None:
        config = loading.with_values(config, {"compute.executor": executor})
    directory = RunDir(config.run.dir)
    if not directory.exists("ingest/manifest.json") and not config.compute.address:
        check_root(config.data.root)  # before Ray starts
    with locked(directory, "qbert_ray.run"), open_executor(config) as opened:
        stages = [*STAGES, *(stage for stage in REQUESTED if not stage.skipped(config))]
        preflight(stages, config, directory, opened)
        for stage in stages:
            run_stage(stage, config, directory, opened, progress or Quiet())
        save_config(directory, config)  # stages that were done before have not
    return FinishedRun(directory)


def open_run(run_dir: str) -> FinishedRun:
    """The outputs of an existing run.

    Args:
        run_dir: a local path, s3:// or gs://.

    Raises:
        ArtifactError: there is no run in that directory.
    """
    run_config(directory := RunDir(run_dir))
    return FinishedRun(directory)


@dataclass(frozen=True)
class FinishedRun:
    """The outputs of a run: its tables, metrics, config and models."""

    directory: RunDir

    @property
    def config(self) -> Config:
        """The config that the run was made with."""
        return run_config(self.directory)

    @property
    def metrics(self) -> dict[str, Evaluation]:
        """Target domain -> hit rate and NDCG of the model and of each baseline, under both protocols."""
        return self.directory.read_json("evaluate/metrics.json")

    def table(self, name: str, domain: str | None = None) -> pa.Table:
        """All rows of a table of the run, or those of one domain.

        Args:
            name: "ingest/items", "ingest/sequences", "ingest/interactions", "ingest/rejected", "features/text",
                "fusion/embeddings", "semantic_ids", "evaluate/ranks", "score" or "score_histories"; the docs list their columns.
            domain: only those of one domain.

        Raises:
            ArtifactError: there is no such table.
        """
        return self.directory.read(name, domain)

    def recommender(self, domain: str | None = None, device: str = "cpu") -> Recommender:
        """A recommender for one target domain; the domain may be omitted if there is only one."""
        return Recommender.load(self.directory.uri, domain, device)
