"""The cluster's resources, what each stage needs of them, and a check that what `compute` asks for fits.

Ray waits forever for resources that no node has, so a run checks here before its first stage and is refused within seconds.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray
from pyarrow import fs
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qbert_ray.config.schema import Actors, Config, Workers
from qbert_ray.storage.directory import RunDir, resolve

MOST_THREADS = 16  # more do not speed up models of this size
MOST_NODES = 1000  # of a group that an autoscaler may grow without bound

Resources = dict[str, float]


class CapacityError(ValueError):
    """The config asks for more than the cluster has; the message says what was asked for and what there is."""


def nodes() -> list[Resources]:
    """Resources of each live node; for a cluster that autoscales, of all the nodes it may have."""
    living = [node["Resources"] | _labels(node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]
    growing = state.get_cluster_config()
    groups = growing.node_group_configs if growing else ()
    most = [dict(group.resources) for group in groups for _ in range(group.max_count if group.max_count >= 0 else MOST_NODES)]
    return [node for node in living if "node:__internal_head__" in node] + most if most else living


def count_fitting(there: list[Resources], bundle: Resources) -> int:
    """Number of bundles that fit, each within one node."""
    needed = {name: amount for name, amount in bundle.items() if amount}
    return sum(int(min(node.get(name, 0.0) / amount for name, amount in needed.items()) + 1e-9) for node in there)


def actor_bundle(actors: Actors, there: list[Resources]) -> Resources:
    """Resources of one actor."""
    gpus = actors.num_gpus if actors.num_gpus is not None else float(count_fitting(there, {"GPU": 1} | _place(actors)) > 0)
    return {"CPU": actors.num_cpus, "GPU": gpus} | _place(actors)


def pool(actors: Actors, tasks: int) -> dict[str, Any]:
    """Sizes and resources of an actor pool: one actor per GPU, or as many as the CPUs hold now, and one per task as nodes are added."""
    there = nodes()
    bundle = actor_bundle(actors, there)
    most = max(actors.min_size, min(actors.max_size or tasks, tasks))
    size = max(actors.min_size, min(count_fitting(there, bundle), most))
    options = {"num_cpus": bundle["CPU"], "num_gpus": bundle["GPU"], "label_selector": actors.label_selector or None}
    return (
        {"min_size": size, "max_size": most} | options | ({"accelerator_type": actors.accelerator_type} if actors.accelerator_type else {})
    )


def is_streamed(actors: Actors, size: int, there: list[Resources]) -> bool:
    """Whether the steps of a worker run apart: its encoders have GPUs, and there are two further CPUs for each.

    An encoder on a CPU competes with its own decoders, and would lose what it takes to pass pixels from process to process.
    """
    cpus = count_fitting(there, {"CPU": 1.0} | _place(actors, kind=False))
    return actor_bundle(actors, there)["GPU"] > 0 and cpus >= 3 * size


def assigned_device() -> str:
    """ "cuda" where Ray gave this actor or task a GPU, else "cpu"."""
    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"


def sized(workers: Workers, there: list[Resources], microbatches: int = MOST_NODES) -> Workers:
    """The same workers with a plain number of them: for "auto" and [fewest, most] one per GPU, or one per node where there is none.

    Args:
        microbatches: of a batch; more workers would have nothing to do.
    """
    if isinstance(workers.num_workers, int):
        return workers
    fewest, most = workers.num_workers if isinstance(workers.num_workers, tuple) else (1, microbatches)
    bundle = {"CPU": workers.cpus_per_worker or 1.0} | _place(workers)
    gpus = 0 if workers.use_gpu is False else _room(workers, bundle | {"GPU": 1.0}, there)
    on_cpus = [node for node in there if count_fitting([node], bundle)]
    number = gpus or (1 if workers.placement_strategy == "STRICT_PACK" else len(on_cpus))
    return workers.model_copy(update={"num_workers": max(fewest, min(number, most))})


def worker_bundle(workers: Workers, there: list[Resources]) -> Resources:
    """Resources of one training worker."""
    workers = sized(workers, there)
    place = _place(workers)
    gpu = {"GPU": 1.0} | place
    with_gpu = workers.use_gpu if workers.use_gpu is not None else _fit(workers, gpu, there)
    rest = gpu if with_gpu else {"GPU": 0.0} | place
    most = (cpus for cpus in range(MOST_THREADS, 0, -1) if _fit(workers, {"CPU": cpus} | rest, there))
    return {"CPU": workers.cpus_per_worker or next(most, 1)} | rest


def check(config: Config, names: Iterable[str]) -> None:
    """Raise if any of some keys of `compute` asks for more than the cluster has.

    Raises:
        CapacityError: with what is asked for and what there is, for each that does not.
    """
    there = nodes()
    lacking = [text for name in dict.fromkeys(names) if (text := _lacking(config, name, there))]
    if lacking:
        raise CapacityError("\n".join(lacking))


def _lacking(config: Config, name: str, there: list[Resources]) -> str:
    asked = getattr(config.compute, name)
    if isinstance(asked, Workers):
        if name == "quantizer" and config.quantizer.kind != "rqvae":
            asked = asked.alone()
        microbatches = getattr(config, name).microbatches
        most = asked.num_workers[1] if isinstance(asked.num_workers, tuple) else asked.fewest
        if most > microbatches:
            return (
                f"compute.{name}: {most} workers share {microbatches} microbatches of a batch; raise {name}.microbatches to at least that"
            )
        asked = sized(asked, there, microbatches)
        bundle, count, what = worker_bundle(asked, there), asked.fewest, "worker"
        fits = _fit(asked, bundle, there)
    else:
        bundle, count, what = actor_bundle(asked, there), asked.min_size, "actor"
        fits = count_fitting(there, bundle) >= count
    if fits or config.compute.autoscaling:
        return ""
    kind = f", of accelerator type {asked.accelerator_type}" if asked.accelerator_type else ""
    kind += (
        f", on nodes labelled {', '.join(f'{label}: {value}' for label, value in asked.label_selector.items())}"
        if asked.label_selector
        else ""
    )
    strategy = f", {asked.placement_strategy}" if isinstance(asked, Workers) and asked.placement_strategy.startswith("STRICT") else ""
    return (
        f"compute.{name} asks for {count} {what}{'s' * (count > 1)} of {_amount(bundle)}{kind}{strategy}; the cluster has "
        f"{_listed(there)}, room for {count_fitting(there, bundle)}. Ask for less, or add nodes "
        f"(compute.autoscaling=true where the cluster adds them by itself and does not say how many)"
    )


def _fit(workers: Workers, bundle: Resources, there: list[Resources]) -> bool:
    """Whether all workers fit, placed as their strategy says."""
    return _room(workers, bundle, there) >= sized(workers, there).fewest


def _room(workers: Workers, bundle: Resources, there: list[Resources]) -> int:
    """Number of bundles that fit, placed as the workers' strategy says."""
    each = [count_fitting([node], bundle) for node in there]
    match workers.placement_strategy:
        case "STRICT_PACK":
            return max(each, default=0)
        case "STRICT_SPREAD":
            return sum(number > 0 for number in each)
    return sum(each)


def plain(bundle: Resources) -> Resources:
    """A bundle without what stands for a kind of node."""
    return {name: amount for name, amount in bundle.items() if not name.startswith(("accelerator_type:", "label:"))}


def _place(asked: Actors | Workers, kind: bool = True) -> Resources:
    """The labels of nodes, and the kind of GPU, that are asked for, as resources that every such node has plenty of."""
    wanted = {label: value for label, value in asked.label_selector.items() if not value.startswith(("!", "in("))}
    gpu = {f"accelerator_type:{asked.accelerator_type}": 0.001} if kind and asked.accelerator_type else {}
    return gpu | dict.fromkeys(_labels(wanted), 0.001)


def _labels(labels: dict[str, str]) -> Resources:
    return {f"label:{label}={value}": 1e6 for label, value in labels.items()}


def _amount(node: Resources) -> str:
    return f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU"


def _listed(there: list[Resources]) -> str:
    kinds = Counter(_amount(node) for node in there)
    return ", ".join(f"{count} node{'s' * (count > 1)} of {kind}" for kind, count in kinds.items()) or "no node"


def check_reachable(config: Config, run: RunDir) -> None:
    """Raise if a node cannot see the run directory or the input.

    Raises:
        CapacityError: one does not, or the run directory is inside the temporary copy of a job's code.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if "working_dir" in (job.get("runtime_env") or {}) and "://" not in config.run.dir and not config.run.dir.startswith(("/", "~")):
        raise CapacityError(
            f"run.dir is {config.run.dir}, inside the copy of the code that ends with the job; give a full path or a URI, "
            "such as run.dir=/shared/runs/1 or run.dir=s3://bucket/runs/1"
        )
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        return
    probe, data = f".reachable-{os.getpid()}", resolve(config.data.root)
    run.write_bytes(probe, b"")
    places = {"run.dir": (run.filesystem, run.path(probe)), "data.root": data}
    local = {key: path for key, (system, path) in places.items() if isinstance(system, fs.LocalFileSystem)}
    try:
        on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in alive if local]
        for node, missing in zip(alive, ray.get([_missing.options(scheduling_strategy=there).remote(local) for there in on]), strict=False):
            for key in missing:
                given = config.run.dir if key == "run.dir" else config.data.root
                raise CapacityError(
                    f"{key} is {given}, which the node {node['NodeManagerAddress']} does not see; "
                    "give a folder that all nodes share, or a URI such as s3://bucket/folder"
                )
    finally:
        run.delete(probe)


@ray.remote(num_cpus=0)
def _missing(places: dict[str, str]) -> list[str]:
    return [key for key, path in places.items() if not os.path.exists(path)]
