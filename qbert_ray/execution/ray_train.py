"""A training on Ray Train: `training.Loop` on each worker, checkpoints, and progress on its way to the driver.

Rank 0 writes the model into the run directory; checkpoints (safetensors and JSON) are next to it while a training runs, and
a run that was killed resumes from the last one.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import get_device

from qbert_ray.config.schema import Config, Workers
from qbert_ray.execution import ray_metrics, tracking
from qbert_ray.execution.determinism import set_threads
from qbert_ray.execution.progress import Progress
from qbert_ray.execution.ray_board import Watch, start_board
from qbert_ray.execution.ray_capacity import nodes, plain, sized, worker_bundle
from qbert_ray.execution.ray_trainers import SingleWorker, WorkerGroup, fit_with_retries
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import training_section
from qbert_ray.training import EpochMetrics, Loop, M, Task, last_metrics, publish, trained


def fit(
    make_task: Callable[..., Task[M]], config: Config, run: RunDir, folder: str, workers: Workers, progress: Progress, **arguments: Any
) -> M:
    """See `Executor.fit`."""
    if trained(run, folder):
        return last_metrics(run, folder)
    if workers.num_workers == "auto":
        workers = sized(workers, nodes(), getattr(config, training_section(folder)).microbatches)
    scaling = scaling_config(workers)
    board = start_board(folder)
    threads = int(worker_bundle(workers, nodes())["CPU"])
    # A partial instead of train_loop_config: the controller would unpickle that, and import torch only to hand it on.
    trainer = (SingleWorker if workers.num_workers == 1 else WorkerGroup)(
        partial(
            _train_worker, partial(make_task, config, run, **arguments), run, folder, board, threads, config.compute.checkpoint_seconds
        ),
        scaling_config=scaling,
        run_config=RunConfig(
            name="checkpoints",
            storage_path=run.path(folder),
            storage_filesystem=run.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    run.filesystem.create_dir(run.path(folder), recursive=True)

    def further(epoch: int, metrics: dict[str, float]) -> None:
        stage, _, rest = folder.partition("/")
        ray_metrics.measure(run, stage, metrics, domain=rest.rpartition("/")[2])

    with (
        tracking.trackers(config, run, folder, progress, {"Ray's metrics": further}) as track,
        Watch(board, progress, lambda metrics: track(metrics["epoch"], tracking.numbers(metrics))),
    ):
        fit_with_retries(trainer, workers.max_failures)
    run.delete(f"{folder}/checkpoints")
    return last_metrics(run, folder)


def scaling_config(workers: Workers) -> ScalingConfig:
    """Ray's ScalingConfig of workers that `capacity.check` found room for; of [fewest, most], an elastic one."""
    bundle, number = worker_bundle(workers, nodes()), workers.num_workers
    return ScalingConfig(
        num_workers=number if isinstance(number, tuple) else workers.fewest,  # type: ignore[arg-type]  # its annotation is of an earlier class without pairs
        use_gpu=bool(bundle["GPU"]),
        resources_per_worker={name: amount for name, amount in plain(bundle).items() if amount},
        placement_strategy=workers.placement_strategy,
        accelerator_type=workers.accelerator_type,
        label_selector=workers.label_selector or None,  # type: ignore[call-arg]  # likewise
    )


def _train_worker(
    make_task: Callable[[], Task[EpochMetrics]], run: RunDir, folder: str, board: Any, threads: int, checkpoint_seconds: float
) -> None:
    context = ray.train.get_context()
    set_threads(threads)
    loop = Loop(make_task(), get_device(), context.get_world_rank(), context.get_world_size())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            loop.restore(Path(directory))
    epochs, saved = loop.task.settings.epochs, time.monotonic()
    if loop.rank == 0:
        board.begin.remote(loop.epoch, loop.world_size)
    ended = loop.finished
    while not ended:
        loop.run_epoch()
        ended = loop.finished
        if loop.rank == 0:
            written = board.write.remote(epochs, epochs if loop.finished else loop.epoch, loop.log[-1])
            if ended:  # the driver, which waits for the end of the training, then reads every epoch
                with contextlib.suppress(ray.exceptions.RayError):  # it only reports progress
                    ray.get(written)
        if not ended and loop.agree(int(time.monotonic() - saved > checkpoint_seconds)):
            with tempfile.TemporaryDirectory() as directory:
                if loop.rank == 0:
                    loop.save(Path(directory))
                ray.train.report({"epoch": loop.epoch}, ray.train.Checkpoint.from_directory(directory) if loop.rank == 0 else None)
            saved = time.monotonic()
    if loop.rank == 0:
        publish(loop, run, folder)
