"""The kind `tabular`: each column of numbers or categories gives one vector of an item.

A number becomes its quantile in the catalog, and the quantile a smooth curve: items with close numbers have close vectors, whatever the
unit and however skewed the numbers are. A category becomes a vector of signs that a hash of the column's name and the text draws, so
equal categories have equal vectors and different ones nearly orthogonal ones, without a vocabulary. Several categories in a cell,
such as tags or the levels of `Music > Guitars`, are averaged. What a cell lacks is missing.

N items, J columns, D width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import polars as pl

from qbert_ray.config.schema import Features
from qbert_ray.features.modality import DomainEncoder, Encoded, Source, absent
from qbert_ray.inputs.rows import mix, stable_hash
from qbert_ray.inputs.values import AMOUNT
from qbert_ray.storage.columns import COLD, VALUE_PREFIX
from qbert_ray.storage.directory import ArtifactError, RunDir

QUANTILES = 101  # of a column that are kept, from the least to the largest number
NUMBERS = 0.95  # share of a column's cells that must be a single number each for it to be a column of numbers
WAVES = 4  # cosines and sines of a quantile: the vectors of two numbers a tenth of the catalog apart have a cosine of about .6
LEVELS = re.compile(r"\s*[>|]\s*")  # between the levels of a nested category

# Two points with three digits after each separate thousands, so that one point does so too.
DECIMAL_COMMA = re.compile(r"\d,(?:\d{1,2}|\d{4,})(?!\d)|\d(?:\.\d{3}){2,}(?!\d)")
DECIMAL_POINT = re.compile(r"\d\.(?:\d{1,2}|\d{4,})(?!\d)")

Cells = list[list[str]]  # N texts of a column; empty where missing


class Column(TypedDict):
    """What a column of numbers is read by, new items included."""

    quantiles: list[float]  # the least and the largest number included
    comma: bool  # whether decimals come after a comma


class Encoder(DomainEncoder):
    """One vector per column, of length 1. Quantiles are those of the items that training may see, and are kept for appended items."""

    def __init__(self, features: Features, modality: str) -> None:
        super().__init__(features, modality)
        self.width = self.settings.dim

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return len(source.domain.inputs_of(source.modality).values)

    def __call__(self, run: RunDir, source: Source, num_vectors: int) -> Encoded:
        names = source.domain.inputs_of(source.modality).values
        table = run.read("ingest/items", source.name, [COLD, *(f"{VALUE_PREFIX}{name}" for name in names)])
        columns = {name: [json.loads(cell) if cell else [] for cell in table[f"{VALUE_PREFIX}{name}"].to_pylist()] for name in names}
        fitted = f"features/{source.modality}/.fitted/{source.name}.json"
        if not run.exists(fitted):
            warm = np.flatnonzero(~table[COLD].to_numpy())
            run.write_json(fitted, {name: self.fit(name, [cells[row] for row in warm]) for name, cells in columns.items()})
        known = run.read_json(fitted)
        if any(isinstance(each, list) for each in known.values()):
            raise ArtifactError(f"{run.path(fitted)} has an older format; redo the run from its stage features")
        vectors, present = absent(len(table), num_vectors, self.width)
        for slot, (name, cells) in enumerate(columns.items()):
            vectors[:, slot], present[:, slot] = self.encode(name, cells, known[name])
        return Encoded(vectors, present, {f"columns_of_{source.modality}": len(names)})

    def fit(self, name: str, cells: Cells) -> Column | None:
        """What a column of numbers is read by; None for categories."""
        texts, given = _texts(cells), sum(map(bool, cells))
        comma = any(map(DECIMAL_COMMA.search, texts)) and not any(map(DECIMAL_POINT.search, texts))
        numbers = _numbers(cells, comma)
        found = numbers[np.isfinite(numbers)]
        if name in self.settings.categories or not len(found) or len(found) < NUMBERS * given:
            return None
        return {"quantiles": np.quantile(found, np.linspace(0, 1, QUANTILES)).tolist(), "comma": comma}

    def encode(self, name: str, cells: Cells, fitted: Column | None) -> tuple[np.ndarray, np.ndarray]:
        """[N, D] vectors of a column, and [N] which are there."""
        if fitted is None:
            return category_vectors(name, cells, self.width)
        numbers = _numbers(cells, fitted["comma"])
        there = np.isfinite(numbers)
        vectors = np.zeros((len(cells), self.width), np.float32)
        vectors[there] = number_vectors(name, quantile_of(numbers[there], fitted["quantiles"]), self.width)
        return vectors, there


def quantile_of(numbers: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """[N] share of the catalog that lies below each number, half of the equal ones included; 0 to 1."""
    shares, known = np.linspace(0, 1, len(quantiles)), np.asarray(quantiles)
    first, last = np.searchsorted(known, numbers, "left"), np.searchsorted(known, numbers, "right")
    inside = np.interp(numbers, known, shares)
    equal = (shares[np.minimum(first, len(known) - 1)] + shares[np.maximum(last - 1, 0)]) / 2
    return np.where(last > first, equal, inside)


def number_vectors(name: str, quantile: np.ndarray, width: int) -> np.ndarray:
    """[N, D] vectors of length 1 of the quantiles [N] of a column."""
    angles = np.pi * quantile[:, None] * np.arange(1, WAVES + 1)
    curve = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / WAVES**0.5
    axes = np.linalg.qr(sign_vectors([f"{name}\x1f{axis}" for axis in range(2 * WAVES)], width).T)[0]  # [D, 2 WAVES]
    return (curve @ axes.T).astype(np.float32)


def category_vectors(name: str, cells: Cells, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] vectors of length 1 of the categories of a column, and [N] which are there."""
    levels = [[level for text in cell for level in LEVELS.split(text.strip().casefold()) if level] for cell in cells]
    known = {text: number for number, text in enumerate(dict.fromkeys(text for cell in levels for text in cell))}
    table = sign_vectors([f"{name}\x1e{text}" for text in known], width)
    rows = np.repeat(np.arange(len(cells)), [len(cell) for cell in levels])
    vectors = np.zeros((len(cells), width), np.float32)
    np.add.at(vectors, rows, table[[known[text] for cell in levels for text in cell]])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=vectors, where=lengths > 0), lengths[:, 0] > 0


def sign_vectors(texts: Sequence[str], width: int) -> np.ndarray:
    """[N, D] +-1 / sqrt(D): the bits of hashes of each text, the least significant one first."""
    hashed = stable_hash(pl.Series(texts, dtype=pl.String))
    words = np.stack([mix(hashed, salt) for salt in range(-(-width // 64))], axis=1).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :width]
    return (2 * bits.astype(np.float32) - 1) / np.float32(width**0.5)


def _texts(cells: Cells) -> list[str]:
    """The single text of each cell, empty where there is none or there are several."""
    return [cell[0].strip() if len(cell) == 1 else "" for cell in cells]


def _numbers(cells: Cells, comma: bool) -> np.ndarray:
    """[N] the single number of each cell; NaN where there is none."""
    return np.array([_number(text, comma) for text in _texts(cells)], dtype=float)


def _number(text: str, comma: bool) -> Any:
    """A number as it is written, with a currency or percent sign and separated thousands; NaN for other texts.

    Args:
        text: of a cell.
        comma: whether decimals come after a comma; otherwise a comma separates thousands, unless one alone has no three digits after it.
    """
    if not (comma and "." in text):
        try:
            return _finite(float(text))
        except ValueError:
            pass
    if not re.search(AMOUNT, text):
        return np.nan
    bare = re.sub(r"[^\d.,+-]", "", text.rstrip("."))
    decimals = "," if comma or bare.rfind(",") > bare.rfind(".") and not re.search(r",\d{3}$", bare) else "."
    whole = bare.replace("." if decimals == "," else ",", "").replace(decimals, ".")
    try:
        return _finite(float(whole))
    except ValueError:
        return np.nan


def _finite(number: float) -> float:
    return number if np.isfinite(number) else np.nan
