"""The base class of the sections of a config."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{seeds} names a seed twice: its runs would be the same")
    return seeds


Seeds = Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_different)]

Tree = dict[str, Any]  # a nested mapping of a config, as YAML holds it
Values = dict[str, Any]  # dotted path of a field -> its value


class Section(BaseModel):
    """A mapping of a config."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def paper(value: str) -> dict[str, JsonValue]:
    """Schema entry of a field with its section and value in the paper."""
    return {"paper": value}


def heads_divide(section: str, width: int, num_heads: int) -> None:
    """Every attention head needs as many dimensions.

    Raises:
        ValueError: the width of a section is no multiple of its number of heads.
    """
    if width % num_heads:
        raise ValueError(f"{section}.width={width} is no multiple of {section}.num_heads={num_heads}")
