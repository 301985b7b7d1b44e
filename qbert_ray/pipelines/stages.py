"""The stages in order, what each depends on, and the rules of a rerun.

A finished stage is skipped. A stage whose config changed since is refused, with the key that changed. `redo_from` forgets a
stage and all after it. What a stage depends on is a list of config sections: `compute` is in none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from pyarrow import fs

from qbert_ray.artifacts import ArtifactError, Manifest, RunDir, resolve
from qbert_ray.catalog import EXTRA
from qbert_ray.config import Config
from qbert_ray.overlays import flatten
from qbert_ray.pipelines import capacity, tokenization, tracking
from qbert_ray.pipelines.evaluation import evaluate
from qbert_ray.pipelines.features import extract_features
from qbert_ray.pipelines.ingest import ingest
from qbert_ray.pipelines.memorization import train_memory
from qbert_ray.pipelines.scoring import score
from qbert_ray.pipelines.session import Progress
from qbert_ray.pipelines.tasks import ExtraQuantizerTask, FusionTask, RqvaeTask, SequencerTask
from qbert_ray.pipelines.training import build, fit
from qbert_ray.sources import join


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Args:
        folder: where its outputs are, in the run directory.
        config: sections, or dotted paths, that its outputs depend on.
        inputs: stages whose outputs it reads.
        compute: keys of `compute` that say what it runs on.
        keeps: restarts part by part or from a checkpoint, so what is there stays; others start over.
        skipped: why there is nothing to do under a config; None where there is.
    """

    name: str
    folder: str
    work: Callable[[Config, RunDir, Progress], dict[str, Any]]
    config: tuple[str, ...]
    inputs: tuple[str, ...]
    compute: tuple[str, ...] = ()
    keeps: bool = True
    skipped: Callable[[Config], str | None] = lambda config: None


class GateError(ValueError):
    """Semantic IDs fall short of the config's gates; what was made stays, so a lower gate goes on from it."""


def _given_ids(config: Config) -> str | None:
    return "semantic IDs are given" if config.data.semantic_ids else None


def _fit(
    task: Callable[..., Any], name: str, config: Config, run: RunDir, progress: Progress, folder: str = "", **arguments: Any
) -> dict[str, Any]:
    """Train one section of the config on its workers."""
    workers = getattr(config.compute, name)
    arguments = {"config": config, "run": run} | arguments
    return fit(task, arguments, workers, run, folder or name, progress, config.compute.checkpoint_seconds)


def train_fusion(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Stage 1: the model, then the embeddings of the catalog."""
    metrics = _fit(FusionTask, "fusion", config, run, progress)
    counts = tokenization.embed_catalog(config, run, progress)
    return counts | {"metrics": metrics, "warnings": fusion_warnings(config, counts, metrics)}


def fusion_warnings(config: Config, counts: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    """What stage 1 should not look like: one depth for all, or modalities that did not align."""
    warnings = []
    depth, most = max(((name, count) for name, count in counts.items() if name.startswith("depth_")), key=lambda pair: pair[1])
    if config.fusion.dynamic and counts["items"] > 20 and most > 0.98 * counts["items"]:
        warnings.append(
            f"the fusion depth collapsed: {most:,} of {counts['items']:,} items halt at {depth}; try another fusion.ponder_target"
        )
    if metrics["view_distance"] > 1.6:  # unrelated unit vectors have 2
        warnings.append(
            f"modalities hardly align: mean squared distance {metrics['view_distance']:.2f}, 2 if unrelated; try more fusion.epochs"
        )
    return warnings


def train_rqvae(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Stage 2: the quantizer, and those whose codes stand beside the semantic ID."""
    if config.rqvae.quantizer == "rqvae":
        metrics = _fit(RqvaeTask, "rqvae", config, run, progress)
    else:
        progress.note(config.rqvae.quantizer)
        metrics = build(RqvaeTask, {"config": config, "run": run}, config.compute.rqvae, run, "rqvae")
    check_usage(config, metrics)
    for number, quantizer in enumerate(config.rqvae.extra_quantizers):
        progress.note(quantizer)
        build(ExtraQuantizerTask, {"config": config, "run": run, "number": number}, config.compute.rqvae, run, f"{EXTRA}/{number:02d}")
    return {"metrics": metrics}


def assign_ids(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Stage 2: the semantic IDs."""
    counts = tokenization.assign_ids(config, run, progress)
    check_collisions(config, counts)
    return counts


def check_usage(config: Config, metrics: dict[str, Any]) -> None:
    """Raise where the quantizer leaves too many codewords unused."""
    bar, usage, size = config.gates.min_usage, metrics["codebook_usage"], config.rqvae.codebook_size
    if metrics["items"] >= 4 * size and min(usage) < bar:  # fewer leave later levels nothing to spell
        raise GateError(
            f"the codebooks collapsed: {' '.join(f'{share:.0%}' for share in usage)} of the {size} codewords of each level are in use, "
            f"gates.min_usage asks for {bar:.0%}. Try a smaller rqvae.codebook_size or another rqvae.quantizer, and look whether many "
            f"items have the same texts; then redo with --from train-rqvae. "
            f"To go on with this model: gates.min_usage={max(0.0, min(usage) - 0.005):.2f}"
        )


def check_collisions(config: Config, counts: dict[str, Any]) -> None:
    """Raise where too many items shared their codes before these were made unique."""
    bar = config.gates.max_raw_collision
    short = {domain["domain"]: rate for domain in counts["domains"] if bar is not None and (rate := domain["raw_collision_rate"]) > bar}
    if short:
        figures = ", ".join(f"{rate:.2%} of {domain}" for domain, rate in short.items())
        raise GateError(
            f"too many items collide: {figures} share their codes with others before reallocation, gates.max_raw_collision allows "
            f"{bar:.2%}. Try a larger rqvae.codebook_size or rqvae.num_levels, more text_fields or modalities that tell items apart; "
            f"then redo with --from the stage that changes. To go on with these IDs: gates.max_raw_collision={max(short.values()) + 0.00005:.4f}"
        )


def sequence_trainings(stage: str, config: Config) -> dict[str, dict[str, Any]]:
    """Folder -> arguments of its `SequencerTask`, of the stage "pretrain" or "finetune".

    Raises:
        ValueError: pretrain.domains names what is not there.
    """
    if stage == "finetune":
        start = "pretrain/model" if config.pretrain.enabled else None
        return {f"finetune/{name}": {"domains": [name], "settings": config.finetune, "start": start} for name in config.data.targets}
    unknown = set(config.pretrained) - set(config.data.domains)
    if unknown:
        raise ValueError(f"pretrain.domains names {sorted(unknown)}; data.domains has {list(config.data.domains)}")
    return {"pretrain": {"domains": config.pretrained, "settings": config.pretrain}}


def pretrain(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Stage 3, first half: multi-mask pre-training over the source domains."""
    ((folder, arguments),) = sequence_trainings("pretrain", config).items()
    return {"domains": arguments["domains"], "metrics": _fit(SequencerTask, "pretrain", config, run, progress, folder, **arguments)}


def finetune(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Stage 3, second half: each target domain from the pre-trained weights."""
    counts = {}
    for folder, arguments in sequence_trainings("finetune", config).items():
        (domain,) = arguments["domains"]
        progress.note(domain)
        counts[domain] = _fit(SequencerTask, "finetune", config, run, progress, folder, **arguments)
    return {"metrics": counts}


_INGEST = (
    *("data.root", "data.domains", "data.min_interactions", "data.min_item_interactions", "data.min_rating"),
    *("data.cold_share", "data.rows_per_part"),
)
_SEQUENCER = ("run.seed", "sequencer", "pretrain")
STAGES = (
    Stage("ingest", "ingest", ingest, _INGEST, (), keeps=False),
    Stage("features", "features", extract_features, ("features",), ("ingest",), ("features",), skipped=_given_ids),
    Stage("train-fusion", "fusion", train_fusion, ("run.seed", "fusion"), ("features",), ("fusion", "assign"), skipped=_given_ids),
    Stage("train-rqvae", "rqvae", train_rqvae, ("run.seed", "rqvae"), ("train-fusion",), ("rqvae",), skipped=_given_ids),
    Stage("assign-ids", "semantic_ids", assign_ids, ("data.semantic_ids",), ("ingest", "train-rqvae"), ("assign",)),
    Stage(
        "pretrain",
        "pretrain",
        pretrain,
        _SEQUENCER,
        ("assign-ids",),
        ("pretrain",),
        skipped=lambda config: None if config.pretrain.enabled else "pretrain.enabled is false",
    ),
    Stage(
        "finetune",
        "finetune",
        finetune,
        ("run.seed", "sequencer", "finetune", "pretrain.enabled"),
        ("assign-ids", "pretrain"),
        ("finetune",),
    ),
    Stage(
        "train-memory",
        "memory",
        train_memory,
        ("memory",),
        ("ingest", "finetune"),
        ("memory",),
        skipped=lambda config: None if config.memory.enabled else "memory.enabled is false",
    ),
    Stage("evaluate", "evaluation", evaluate, ("evaluation", "memory.enabled"), ("finetune", "train-memory"), ("evaluate",)),
    Stage("score", "recommendations", score, ("score", "memory.enabled"), ("finetune", "train-memory"), ("score",)),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def depends_on(stage: Stage, config: Config) -> dict[str, Any]:
    """Dotted path -> value of the config that a stage's outputs depend on."""
    leaves = flatten(config.model_dump(mode="json"))
    return {path: value for path, value in leaves.items() if any(path == key or path.startswith(f"{key}.") for key in stage.config)}


def status(stage: Stage, config: Config, run: RunDir, files: bool = True) -> Manifest | None:
    """The manifest of a finished stage; None where it is still to do.

    Args:
        files: whether changed input files matter, but for files whose new items were appended.

    Raises:
        ArtifactError: it was done with another config, or from other inputs.
    """
    done = Manifest.load(run, stage.folder)
    if done is None:
        return None
    wanted = depends_on(stage, config)
    changed = [path for path in sorted(set(wanted) | set(done.config)) if wanted.get(path) != done.config.get(path)]
    if changed:
        lines = "\n".join(f"  {path}: made with {done.config.get(path)!r}, now {wanted.get(path)!r}" for path in changed[:5])
        raise ArtifactError(
            f"{run.uri}/{stage.folder} was made with another config:\n{lines}\nredo it with --from {stage.name}, or choose another run.dir"
        )
    inputs = _input_fingerprints(stage, config, run)
    stale = [name for name, fingerprint in inputs.items() if done.inputs.get(name) != fingerprint]
    read = run.read_json(APPENDED) if stale and run.exists(APPENDED) else {}
    stale = [name for name in stale if read.get(name) != inputs[name] and (files or not name.startswith("data."))]
    if stale:
        new_items = all(name.startswith("data.domains.") and name.endswith(".items") for name in stale)
        hint = "; or give only the new items IDs: qbert-ray assign-ids --append" if new_items else ""
        raise ArtifactError(
            f"{run.uri}/{stage.folder} was made from other outputs of {', '.join(stale)}; redo it with --from {stage.name}{hint}"
        )
    return done


def run_stage(stage: Stage, config: Config, run: RunDir, progress: Progress) -> Manifest | None:
    """Do a stage unless it is done; its manifest, or None where the config leaves it out.

    Raises:
        ArtifactError: an input stage is not done, or the outputs there were made differently.
    """
    if stage.skipped(config):
        return None
    done = status(stage, config, run)
    if done is not None:
        return done
    for name in stage.inputs:
        source = BY_NAME[name]
        if not source.skipped(config) and Manifest.load(run, source.folder) is None:
            raise ArtifactError(f"{stage.name} needs {name}, which is not done in {run.uri}; run it first: qbert-ray {name}")
    capacity.check(config, stage.compute)
    manifest = Manifest(stage.name, depends_on(stage, config), _input_fingerprints(stage, config, run), _version())
    _forget_unfinished(stage, manifest, run)
    run.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    started = time.monotonic()
    manifest.counts = stage.work(config, run, progress)
    tracking.measure(stage.name, manifest.counts)
    manifest.seconds = round(time.monotonic() - started, 2)
    manifest.save(run, stage.folder)
    run.delete(f"{stage.folder}/{_STARTED}")
    return manifest


def preflight(stages: Sequence[Stage], config: Config, run: RunDir) -> None:
    """Refuse, before the first of some stages starts, what the cluster has no room for in any that is still to do.

    Raises:
        ValueError: what is asked for and what there is.
    """
    pending = [stage for stage in stages if not stage.skipped(config) and status(stage, config, run) is None]
    if pending:
        capacity.check(config, [key for stage in pending for key in stage.compute])
        capacity.check_reachable(config, run)


def redo_from(name: str, run: RunDir) -> None:
    """Forget a stage and all after it."""
    for stage in reversed(STAGES[STAGES.index(BY_NAME[name]) :]):  # the last first, so that a cut leaves a run that is consistent
        run.delete(f"{stage.folder}/manifest.json")
        run.delete(stage.folder)


_STARTED = "started.json"
APPENDED = "ingest/appended.json"  # state of the input files up to which items were appended


def _forget_unfinished(stage: Stage, manifest: Manifest, run: RunDir) -> None:
    """Leave what an earlier try of exactly this stage can go on from; remove anything else."""
    marker = f"{stage.folder}/{_STARTED}"
    same = run.exists(marker) and run.read_json(marker) == {"fingerprint": manifest.fingerprint}
    if not (same and stage.keeps):
        run.delete(stage.folder)
    run.write_json(marker, {"fingerprint": manifest.fingerprint})


def _input_fingerprints(stage: Stage, config: Config, run: RunDir) -> dict[str, str]:
    inputs = {}
    for name in stage.inputs:
        source = BY_NAME[name]
        manifest = None if source.skipped(config) else Manifest.load(run, source.folder)
        if manifest is not None:
            inputs[name] = manifest.fingerprint
    return inputs | file_fingerprints(stage, config)


_FILES = {"ingest": ("items", "interactions"), "features": ("text_features", "image_features", "structure_features")}


def file_fingerprints(stage: Stage, config: Config) -> dict[str, str]:
    """Size and time of the input files, so that changed data is noticed."""
    named = {
        f"data.domains.{name}.{field}": getattr(d, field) for name, d in config.data.domains.items() for field in _FILES.get(stage.name, ())
    }
    if stage.name == "assign-ids":
        named["data.semantic_ids"] = config.data.semantic_ids
    found = {}
    for path, uri in named.items():
        if uri is None:
            continue
        filesystem, place = resolve(join(config.data.root, uri.partition("*")[0]))
        if "*" in uri:
            place = place.rpartition("/")[0]
        infos = [filesystem.get_file_info(place)]
        if infos[0].type == fs.FileType.Directory:
            infos = filesystem.get_file_info(fs.FileSelector(place, recursive=True))
        files = [info for info in infos if info.type == fs.FileType.File]
        if files:
            found[path] = f"{sum(info.size for info in files)} bytes, {max(info.mtime_ns for info in files)}"
    return found


def _version() -> str:
    try:
        return version("qbert-ray")
    except PackageNotFoundError:
        return "unknown"
