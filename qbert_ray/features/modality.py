"""How a modality becomes vectors: each kind is a module of `features/kinds`, named as its section of `features`, with a class `Encoder`.

A `PartEncoder` encodes one part of the catalog at a time, in an actor; a `DomainEncoder` all items of a domain at once, in a task.
Nothing else in the package knows which kinds there are.

N items, J vectors per item, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa

from qbert_ray.config.schema import Config, Domain, Features
from qbert_ray.inputs.addresses import Addresses
from qbert_ray.storage.directory import RunDir

Rejected = list[tuple[str, dict[str, Any]]]  # reason and row


@dataclass(frozen=True)
class Source:
    """What the items files of a domain give a modality."""

    modality: str
    name: str  # of the domain
    domain: Domain
    root: str  # data.root

    @property
    def addresses(self) -> Addresses:
        return Addresses.of(self.root, self.domain)


@dataclass(frozen=True)
class Encoded:
    """Vectors in the order of the items."""

    vectors: np.ndarray  # [N, J, D] float32, zeros where absent
    present: np.ndarray  # [N, J] booleans
    counts: dict[str, int]  # for the manifest
    rejected: Rejected = field(default_factory=list)
    table: str = ""  # that the rejected rows belong to


class PartEncoder(ABC):
    """Encodes parts of the catalog; made once in each actor. Its model is loaded when it is first needed, as by `width`.

    Args:
        features: the section of the config.
        modality: its name.
        num_vectors: J, the most that any domain has.
    """

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        self.settings: Any = features.settings(modality)
        self.num_vectors = num_vectors

    @property
    @abstractmethod
    def width(self) -> int:
        """D."""

    @staticmethod
    @abstractmethod
    def vectors_of(features: Features, source: Source) -> int:
        """J of a domain."""

    @abstractmethod
    def columns(self, source: Source) -> list[str]:
        """Columns of ingest/items that are read."""

    @abstractmethod
    def __call__(self, items: pa.Table, source: Source) -> Encoded:
        """The vectors of some rows of ingest/items."""


class StreamedEncoder(PartEncoder):
    """A `PartEncoder` in steps: while one chunk of a part is encoded, which may need a GPU, others prepare the next ones on CPUs.

    Only `preparer` and `encode` need the model.
    """

    @abstractmethod
    def chunks(self, items: pa.Table, source: Source) -> list[Any]:
        """What is prepared and encoded for some rows of ingest/items, in pieces of a few hundred inputs; at least one."""

    @abstractmethod
    def preparer(self) -> Callable[[Any], Any]:
        """A function of a chunk that gives what `encode` takes; it can be pickled and holds no weights. Arrays are NumPy's."""

    @abstractmethod
    def encode(self, prepared: Any) -> Any:
        """The vectors of a prepared chunk, and what `collect` has to know of it."""

    @abstractmethod
    def collect(self, items: pa.Table, source: Source, encoded: Iterable[Any]) -> Encoded:
        """The vectors of the rows, from all of their encoded chunks in order. Of the columns of `items` it reads `KEYS` alone."""


class FittedEncoder(PartEncoder):
    """A `PartEncoder` that is fitted on the catalog before; appended items are encoded as it was fitted then."""

    @abstractmethod
    def fit(self, run: RunDir, sources: list[Source], folder: str) -> None:
        """Fit it on the items of some domains and save what was fitted in a folder of the run."""

    @abstractmethod
    def load(self, run: RunDir, folder: str) -> None:
        """Take up what was fitted."""


class DomainEncoder(ABC):
    """Makes the vectors of all items of a domain.

    Args:
        features: the section of the config.
        modality: its name.
    """

    width: int  # D

    def __init__(self, features: Features, modality: str) -> None:
        self.settings: Any = features.settings(modality)

    @staticmethod
    @abstractmethod
    def vectors_of(features: Features, source: Source) -> int:
        """J of a domain."""

    @abstractmethod
    def __call__(self, run: RunDir, source: Source, num_vectors: int) -> Encoded:
        """The vectors of all items of a domain, in the order of item_index.

        What was fitted on the catalog is kept in the run, so that appended items are encoded in the same way.
        """


def encoder_of(config: Config, modality: str) -> type[PartEncoder] | type[DomainEncoder] | None:
    """The encoder of a modality; None for a kind that has vectors of one's own alone."""
    kind = config.features.kind(modality)
    return None if kind == "vectors" else import_module(f"qbert_ray.features.kinds.{kind}").Encoder


def absent(count: int, num_vectors: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[count, J, D] zeros, and [count, J] that none of them is there."""
    return np.zeros((count, num_vectors, width), np.float32), np.zeros((count, num_vectors), bool)
