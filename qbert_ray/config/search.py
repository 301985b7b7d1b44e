"""The section `sweep` of a config, and the settings that a sweep tries.

The settings of each, grid and random are known before the first trial; those of optuna depend on earlier trials.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from qbert_ray.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Seeds, Tree, Values


def _or_list(schema: dict[str, Any]) -> None:
    """Allow a bare list, which is a choice, in the JSON schema."""
    itself = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "array"}, itself]


class Draw(Section):
    """Where a swept value comes from; exactly one of these."""

    model_config = ConfigDict(json_schema_extra=_or_list)

    choice: list[Any] | None = Field(None, description="one of these; a list by itself means the same")
    uniform: tuple[float, float] | None = Field(None, description="between the two")
    loguniform: tuple[float, float] | None = Field(None, description="between the two, uniform in the logarithm")
    randint: tuple[int, int] | None = Field(None, description="whole numbers from the first to the second, both included")

    @model_validator(mode="after")
    def _one(self) -> Draw:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of choice, uniform, loguniform, randint; given: {sorted(given) or 'none'}")
        ((name, value),) = given.items()
        if not value or (name != "choice" and (value[0] > value[1] or (name == "loguniform" and value[0] <= 0))):
            raise ValueError(f"{name}: {value} holds nothing to draw")
        return self

    def examples(self) -> list[Any]:
        """Values that may come out: all of them, or the ends of an interval."""
        return list(self.choice or self.uniform or self.loguniform or self.randint or [])


class Sweep(Section):
    """`qbert-ray sweep`: one training for each setting of some fields, on top of a run whose other outputs are shared."""

    name: str = Field("sweep", description="folder of the sweep in the run directory")
    stage: Literal["fusion", "quantizer", "pretrain", "finetune", "ranking", "evaluate"] = Field(
        "finetune", description="last stage of a trial"
    )
    space: dict[str, Draw] = Field(
        {}, description="field -> list of its values, or {uniform: [low, high]}, loguniform, randint for random and optuna"
    )
    variants: dict[str, Tree] = Field({}, description="name -> overlay on the config; what search: variants compares")
    search: Literal["each", "grid", "random", "optuna", "variants"] = Field(
        "each",
        description="one field at a time with the others as they are (Figures 3-5), every combination, random draws, Optuna, or sweep.variants",
    )
    num_trials: PositiveInt = Field(20, description="settings that random and optuna draw")
    seeds: Seeds | None = Field(None, description="values of run.seed, each for every setting; None: that of the run")
    objectives: dict[str, Literal["max", "min"]] = Field(
        {}, description="metric -> direction; the first decides; also ms_per_user and parameters; {}: what suits the stage"
    )
    scheduler: Literal["none", "asha"] = Field("none", description="asha stops poor trials early")
    grace_epochs: PositiveInt = Field(3, description="epochs before asha may stop a trial")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="asha keeps one in so many")
    max_seconds: PositiveFloat | None = Field(None, description="stop all trials after this long; the same command resumes")
    max_tokens: PositiveInt | None = Field(None, description="stop all trials after they read so many items of training sequences together")
    max_concurrent: PositiveInt | None = Field(None, description="trials at the same time; None: as many as fit")
    max_failures: NonNegativeInt = Field(1, description="tries of a trial that failed before it is given up")

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Nested mappings, as the command line gives them, become dotted paths; a list is a choice."""
        found: Values = {}

        def walk(tree: Any, path: str) -> None:
            if path and not (isinstance(tree, dict) and not set(tree) & set(Draw.model_fields)):
                found[path] = {"choice": tree} if isinstance(tree, list) else tree
                return
            for key, branch in tree.items():
                walk(branch, f"{path}.{key}" if path else str(key))

        if not isinstance(value, dict):
            return value
        walk(value, "")
        return found


OBJECTIVES = {"fusion": {"view_distance": "min"}, "quantizer": {"reconstruction_error": "min"}}


def objectives(sweep: Sweep) -> dict[str, str]:
    """Metric -> "max" or "min"; trials are compared by the first."""
    return dict(sweep.objectives) or OBJECTIVES.get(sweep.stage, {"ndcg@10": "max"})


def settings(sweep: Sweep, base: Values, seed: int) -> list[Values]:
    """The settings (swept field -> value) in order, without repetitions; empty for optuna, whose settings are not known in advance.

    Args:
        base: dotted path -> value of all fields as they are without the sweep.
        seed: seed of the random draws.

    Raises:
        ValueError: the space is empty, or lists values where the search needs draws, or the reverse.
    """
    if not sweep.space:
        raise ValueError("sweep.space is empty: name fields and their values, such as sweep.space.sequencer.num_layers=[1,2,3,4]")
    values = {path: entry.choice or [] for path, entry in sweep.space.items()}
    drawn = [path for path, listed in values.items() if not listed]
    if sweep.search in ("each", "grid") and drawn:
        raise ValueError(f"sweep.search={sweep.search} needs lists of values; {', '.join(drawn)} is drawn: use random or optuna")
    match sweep.search:
        case "each":
            as_is = {path: base[path] for path in values}
            found = [as_is | {path: value} for path, listed in values.items() for value in listed]
        case "grid":
            found = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        case "random":
            generator = random.Random(seed)
            found = [{path: draw(entry, generator) for path, entry in sweep.space.items()} for _ in range(sweep.num_trials)]
        case _:
            return []
    return [setting for number, setting in enumerate(found) if setting not in found[:number]]


def draw(entry: Draw, generator: random.Random) -> Any:
    """A random value of an entry of the space."""
    if entry.choice is not None:
        return generator.choice(entry.choice)
    if entry.randint is not None:
        return generator.randint(*entry.randint)
    if entry.uniform is not None:
        return generator.uniform(*entry.uniform)
    assert entry.loguniform is not None
    return math.exp(generator.uniform(*map(math.log, entry.loguniform)))
