"""The stages of a run as data: their order, what each reads, and what its outputs depend on.

A stage's name is also that of its command, its folder in the run directory, its section of the config (if it has one), and its
key in `compute`. `pipeline` runs stages; commands, reports and sweeps look them up here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qbert_ray.config.features_section import KINDS
from qbert_ray.config.loading import flatten
from qbert_ray.config.schema import Config
from qbert_ray.config.section import Values


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Args:
        name: also its folder in the run directory.
        work: "module:function"; the function takes (config, run, executor, progress) and returns the counts of the manifest.
        help: what the step does, in one line.
        panel: group of commands that it is listed in.
        config: sections, or dotted paths, that its outputs depend on.
        inputs: stages whose outputs it reads.
        compute: keys of `compute` that name what it runs on.
        ignores: dotted paths under those of `config` that its outputs do not depend on.
        unread: further ones, which its outputs do not depend on under a config.
        also: further stages whose outputs it reads under a config.
        keeps: whether an unfinished try is kept, because the stage resumes part by part or from a checkpoint; others start over.
        skipped: why there is nothing to do under a config; None if there is.
    """

    name: str
    work: str
    help: str
    panel: str
    config: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    compute: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    unread: Callable[[Config], tuple[str, ...]] = lambda config: ()
    also: Callable[[Config], tuple[str, ...]] = lambda config: ()
    keeps: bool = True
    skipped: Callable[[Config], str | None] = lambda config: None

    @property
    def command(self) -> str:
        """The command that runs it: `qbert-ray <command>`."""
        return self.name.replace("_", "-")

    def reads(self, config: Config) -> tuple[str, ...]:
        """Stages whose outputs it reads under a config."""
        return (*self.inputs, *self.also(config))

    def depends_on(self, config: Config) -> Values:
        """Dotted path -> value of the config fields that the stage's outputs depend on."""
        leaves, unread = flatten(config.model_dump(mode="json")), (*self.ignores, *self.unread(config))
        return {path: value for path, value in leaves.items() if _under(path, self.config) and not _under(path, unread)}


def _under(path: str, keys: tuple[str, ...]) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in keys)


def training_section(folder: str) -> str:
    """The section of the config with the settings of a training, by the training's folder in the run directory."""
    stage = folder.partition("/")[0]
    return "finetune" if stage == "refit" else stage


def _unread_by_ingest(config: Config) -> tuple[str, ...]:
    """Settings of the other splits; leave-one-out has none, and is what runs did that know no other."""
    split = config.data.split
    of_others = [key for other, key in (("temporal", "data.split_cuts"), ("last_n", "data.split_last")) if other != split]
    return ("data.split", *of_others) if split == "leave_one_out" else tuple(of_others)


def _unread_by_features(config: Config) -> tuple[str, ...]:
    """Sections of kinds without a modality; that of structure is also read by stage 3."""
    kinds = [config.features.kind(name) for name in config.modalities]
    used = {"structure", *kinds, *(other for kind in kinds for other in KINDS[kind].uses)}
    return tuple(f"features.{kind}" for kind in KINDS if kind not in used)


def _unread_by_sequences(config: Config) -> tuple[str, ...]:
    """The vectors of structure, which `features` depends on too where it runs."""
    return () if config.data.semantic_ids else ("features.structure",)


def _given_ids(config: Config) -> str | None:
    return "semantic IDs are given" if config.data.semantic_ids else None


_INPUT, _FUSION, _IDS = "Stages: input", "Stage 1: fusion", "Stage 2: semantic IDs"
_SEQUENCE, _RANKING = "Stage 3: sequence model", "Stages: ranking"
STAGES = (
    Stage(
        "ingest",
        "qbert_ray.inputs.stage:ingest",
        "Read the catalog and the interactions: k-core, split, sequences.",
        _INPUT,
        (
            *("data.root", "data.domains", "data.min_interactions", "data.min_item_interactions", "data.min_rating"),
            *("data.cold_share", "data.rows_per_part", "data.split", "data.split_cuts", "data.split_last"),
        ),
        keeps=False,
        unread=_unread_by_ingest,
    ),
    Stage(
        "features",
        "qbert_ray.features.stage:extract_features",
        "Encode texts, images and other modalities; collaborative vectors from training interactions.",
        _INPUT,
        ("features",),
        ("ingest",),
        ("features",),
        unread=_unread_by_features,
        skipped=_given_ids,
    ),
    Stage(
        "fusion",
        "qbert_ray.fusion.stage:train_fusion",
        "Train the dynamic cross-modal fusion and embed the catalog.",
        _FUSION,
        ("run.seed", "fusion"),
        ("features",),
        ("fusion", "semantic_ids"),
        skipped=_given_ids,
    ),
    Stage(
        "quantizer",
        "qbert_ray.semantic_ids.stage:train_quantizer",
        "Train the quantizer of the fused embeddings.",
        _IDS,
        ("run.seed", "quantizer"),
        ("fusion",),
        ("quantizer",),
        skipped=_given_ids,
    ),
    Stage(
        "semantic_ids",
        "qbert_ray.semantic_ids.stage:assign_ids",
        "Assign every item its semantic ID, without collisions.",
        _IDS,
        ("data.semantic_ids",),
        ("ingest", "quantizer"),
        ("semantic_ids",),
    ),
    Stage(
        "pretrain",
        "qbert_ray.sequence.stage:pretrain",
        "Multi-mask pre-training on the source domains.",
        _SEQUENCE,
        ("run.seed", "sequencer", "pretrain", "features.structure"),
        ("semantic_ids",),
        ("pretrain",),
        ignores=("sequencer.beam",),
        unread=_unread_by_sequences,
        skipped=lambda config: config.no_pretraining,
    ),
    Stage(
        "finetune",
        "qbert_ray.sequence.stage:finetune",
        "Fine-tune on each target domain.",
        _SEQUENCE,
        ("run.seed", "sequencer", "finetune", "pretrain.enabled", "features.structure"),
        ("semantic_ids", "pretrain"),
        ("finetune",),
        ignores=("sequencer.beam",),
        unread=_unread_by_sequences,
    ),
    Stage(
        "ranking",
        "qbert_ray.ranking.stage:fit_ranking",
        "Item-item weights of the training interactions, their blend with the sequence model's scores, and the reranker.",
        _RANKING,
        ("ranking",),
        ("ingest", "finetune"),
        ("ranking",),
        skipped=lambda config: config.no_blend,
    ),
    Stage(
        "refit",
        "qbert_ray.ranking.refit:refit",
        "Train again with the held-out interactions of refit.include, as everything was chosen without them.",
        _RANKING,
        ("refit",),
        ("finetune", "ranking"),
        ("finetune", "ranking"),
        skipped=lambda config: "refit.include is none" if config.refit.include == "none" else None,
    ),
    Stage(
        "evaluate",
        "qbert_ray.ranking.evaluate:evaluate",
        "Rank every item for every user: hit rate and NDCG, next to baselines.",
        _RANKING,
        ("evaluate", "ranking.enabled", "sequencer.beam"),
        ("finetune", "ranking"),
        ("evaluate",),
        also=lambda config: ("refit",) if config.refit.include == "validation" else (),
    ),
    Stage(
        "score",
        "qbert_ray.ranking.score:score",
        "Write the k best items for every user.",
        _RANKING,
        ("score", "ranking.enabled", "sequencer.beam"),
        ("finetune", "ranking", "refit"),
        ("score",),
        ignores=("score.histories",),
    ),
)
REQUESTED = (  # in addition to a run: done where a setting asks for it
    Stage(
        "score_histories",
        "qbert_ray.ranking.score:score_histories",
        "Write the k best items for the users of score.histories.",
        _RANKING,
        ("score", "ranking.enabled", "sequencer.beam"),
        ("finetune", "ranking", "refit"),
        ("score",),
        ignores=("score.interactions",),
        skipped=lambda config: None if config.score.histories else "score.histories names no file",
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
