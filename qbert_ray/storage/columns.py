"""Column names and Arrow schemas of every table that one stage writes and another reads.

A table is a folder of Parquet parts named `<domain>-<number>.parquet`. Parts of the catalog (items, features, embeddings,
semantic IDs) line up: part 3 of each holds the same items, in the order of `item_index`. So do parts over users.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from qbert_ray.storage.seals import ArtifactError

DOMAIN = "domain"
USER_ID = "user_id"
ITEM_ID = "item_id"
ITEM_INDEX = "item_index"
TIMESTAMP = "timestamp"
RATING = "rating"
WEIGHT = "weight"  # of an interaction: how much it counts in training and in item-item models; a column where any differs from 1
TRAIN_WEIGHTS = "train_weights"
LATER_WEIGHTS = "later_weights"
COLD = "cold"
FURTHER = "further"  # of a split into periods: interactions of the later ones that are no targets
EXTRA_CODES = "extra_codes"
KEYS = [DOMAIN, ITEM_ID, ITEM_INDEX]  # columns that identify an item in every table over the catalog

# ingest/items: item_index is dense within a domain and permuted by a hash, so that it is independent of time. Items that no
# training may see, because they are held out or came later, are cold; their indices are the last.
# Text fields are strings under `text.<field>`, attributes under `attribute.<field>`, values under `value.<field>` as JSON lists of strings.
# Files of a modality are two lists of equal length, `path.<modality>` (an absolute path or URI; null: refused, or bytes) and
# `bytes.<modality>`.
ITEMS = pa.schema(
    [
        (DOMAIN, pa.string()),
        (ITEM_ID, pa.string()),
        (ITEM_INDEX, pa.int32()),
        ("image_path", pa.string()),  # absolute path or URI; null: none, or image_bytes holds it
        ("image_bytes", pa.binary()),
        (COLD, pa.bool_()),
    ]
)
TEXT_PREFIX = "text."
ATTRIBUTE_PREFIX = "attribute."
VALUE_PREFIX = "value."
PATH_PREFIX, BYTES_PREFIX = "path.", "bytes."

INTERACTIONS = pa.schema(
    [
        (DOMAIN, pa.string()),
        (USER_ID, pa.string()),
        (ITEM_ID, pa.string()),
        (TIMESTAMP, pa.int64()),
        (RATING, pa.float32()),
        ("split", pa.string()),  # train, valid, test, cold or further
    ]
)  # and, with event types or weights, WEIGHT as float32

# ingest/gone: published items that are no longer in the catalog's files; a part for each append that found others than the one before,
# of which the last holds.
GONE = pa.schema([(DOMAIN, pa.string()), (ITEM_ID, pa.string()), (ITEM_INDEX, pa.int32())])

# ingest/sequences: one user a row, in time order. Leave-one-out: test is the last item, valid the last but one;
# both null for a user with fewer than three interactions. History of the test = train + valid. Cold items are in none of them.
SEQUENCES = pa.schema(
    [
        (DOMAIN, pa.string()),
        (USER_ID, pa.string()),
        ("train", pa.list_(pa.int32())),
        ("valid", pa.int32()),
        ("test", pa.int32()),
    ]
)  # and, with event types or weights, lists of float32: those of the training items under TRAIN_WEIGHTS, of all after them under LATER_WEIGHTS

# score/histories and score_histories/histories: whole histories from a file that `score` is given, which may be empty.
HISTORIES = pa.schema([(DOMAIN, pa.string()), (USER_ID, pa.string()), ("history", pa.list_(pa.int32()))])  # item_index in time order

# Of a split into periods: valid is the first item of the validation period, test that of the test period; null for a user without one, or
# without any item before it. History of the test = train + valid + between.
TEMPORAL_SEQUENCES = pa.schema(
    [
        *SEQUENCES,
        ("between", pa.list_(pa.int32())),  # further items of the validation period
        ("after", pa.list_(pa.int32())),  # further items of the test period
    ]
)

# ingest/cold: a user's last interaction with a cold item, and the user's history of other items before it.
COLD_SEQUENCES = pa.schema(
    [
        (DOMAIN, pa.string()),
        (USER_ID, pa.string()),
        ("history", pa.list_(pa.int32())),  # item_index in time order, never empty
        ("target", pa.int32()),  # item_index
    ]
)

REJECTED = pa.schema(
    [
        (DOMAIN, pa.string()),
        ("table", pa.string()),  # items, interactions, images, ...
        ("reason", pa.string()),
        ("row", pa.string()),  # the row as JSON
    ]
)

SEMANTIC_IDS = pa.schema(
    [
        (DOMAIN, pa.string()),
        (ITEM_ID, pa.string()),
        (ITEM_INDEX, pa.int32()),
        ("codes", pa.list_(pa.int32())),
        ("semantic_id", pa.string()),  # "<a_2><b_3><c_1><d_6>"
        ("moved", pa.bool_()),  # not its nearest codes: reallocated because of a collision
        ("nearest_codes", pa.list_(pa.int32())),  # before that; the item with these codes kept them
    ]
)  # and, with extra quantizers, their codes as a list under EXTRA_CODES

# ranking/weights: item-item weights: for each item, the history items that add to its score, and by how much (ranking/item_item.py).
ITEM_ITEM = pa.schema(
    [
        (DOMAIN, pa.string()),
        (ITEM_ID, pa.string()),
        (ITEM_INDEX, pa.int32()),
        ("ridge_items", pa.list_(pa.int32())),  # item_index
        ("ridge_weights", pa.list_(pa.float32())),
        ("following_items", pa.list_(pa.int32())),
        ("following_weights", pa.list_(pa.float32())),
        ("popularity", pa.float32()),  # training interactions of the item
    ]
)

# One row per user and model; ranks are 1-based, each protocol its own column.
RANKS = pa.schema(
    [
        (DOMAIN, pa.string()),
        (USER_ID, pa.string()),
        ("model", pa.string()),
        ("target", pa.string()),
        ("rank_all", pa.int32()),
        ("rank_unseen", pa.int32()),
    ]
)

LABELS = {"item_item_text": "item-item + text"}  # model of evaluate/ranks -> its name in tables and figures

# evaluate/cold: one row per user of ingest/cold and ranking.
COLD_RANKS = pa.schema(
    [
        (DOMAIN, pa.string()),
        (USER_ID, pa.string()),
        ("model", pa.string()),
        ("target", pa.string()),
        ("rank_unseen", pa.int32()),  # among all items but those of the history
        ("rank_cold", pa.int32()),  # rank among the cold items
        ("among_unseen", pa.int32()),  # number of candidates
        ("among_cold", pa.int32()),
    ]
)

RECOMMENDATIONS = pa.schema(
    [
        (DOMAIN, pa.string()),
        (USER_ID, pa.string()),
        ("rank", pa.int32()),
        (ITEM_ID, pa.string()),
        ("score", pa.float32()),
    ]
)


def label(name: str) -> str:
    """The name of a ranking, or of any other row, in tables and figures."""
    return LABELS.get(name, name.replace("_", "-"))


def input_type(column: str) -> pa.DataType:
    """Type of a column of ingest/items with a prefix."""
    if column.startswith(PATH_PREFIX):
        return pa.list_(pa.string())
    return pa.list_(pa.binary()) if column.startswith(BYTES_PREFIX) else pa.string()


def features_schema(num_vectors: int, width: int) -> pa.Schema:
    """Schema of features/<modality>: J vectors per item and which of them are there."""
    return pa.schema(
        [
            (DOMAIN, pa.string()),
            (ITEM_ID, pa.string()),
            (ITEM_INDEX, pa.int32()),
            ("vectors", pa.list_(pa.list_(pa.float32(), width), num_vectors)),
            ("present", pa.list_(pa.bool_(), num_vectors)),
        ]
    )


def embeddings_schema(width: int) -> pa.Schema:
    """Schema of fusion/embeddings."""
    return pa.schema(
        [
            (DOMAIN, pa.string()),
            (ITEM_ID, pa.string()),
            (ITEM_INDEX, pa.int32()),
            ("embedding", pa.list_(pa.float32(), width)),
            ("depth", pa.int32()),
        ]
    )


def to_fixed_lists(array: np.ndarray) -> pa.Array:
    """An Arrow column of fixed-size lists from a NumPy array.

    Args:
        array: [N, ...] of numbers or booleans, one to two trailing axes.
    """
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The NumPy array [N, ...] of a column of lists, the inverse of `to_fixed_lists`; other lists must all have one length."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    shape = [len(column)]
    while pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        flat = column.flatten()
        shape.append(column.type.list_size if pa.types.is_fixed_size_list(column.type) else len(flat) // max(len(column), 1))
        column = flat
    return column.to_numpy(zero_copy_only=False).reshape(shape)


class Ragged(NamedTuple):
    """Lists of different lengths: the one of user u is `items[indptr[u]:indptr[u + 1]]`."""

    indptr: np.ndarray  # [U + 1]
    items: np.ndarray

    def of(self, user: int) -> np.ndarray:
        return self.items[self.indptr[user] : self.indptr[user + 1]]


class Sequences(NamedTuple):
    """Users of one domain as arrays; `items[indptr[u]:indptr[u + 1]]` are the training items of user u."""

    user_ids: list[str]
    indptr: np.ndarray  # [U + 1]
    items: np.ndarray  # item_index
    valid: np.ndarray  # [U], -1: none
    test: np.ndarray  # [U], -1: none
    between: Ragged | None = None  # items after the validation item and before the test item, if there are any
    after: Ragged | None = None  # items after the test item
    weights: np.ndarray | None = None  # of the training items; None: all are 1
    later_weights: Ragged | None = None  # of the items after them; None: all are 1, or not known

    def training_on(self, include: str) -> Sequences:
        """The same users with held-out items among their training items, in the same order.

        Args:
            include: "none"; "validation": items before those of the test period; "all".

        Raises:
            ArtifactError: training items have weights, and those of the held-out ones are not known.
        """
        if include == "none":
            return self
        nothing = np.full(len(self.valid), -1)
        held_out = [_single(self.valid), self.between]
        if include == "all":
            held_out += [_single(self.test), self.after]
        pieces = [Ragged(self.indptr, self.items), *(each for each in held_out if each is not None)]
        indptr, items = _joined(pieces)
        weights = None
        if self.weights is not None:
            if self.later_weights is None:
                raise ArtifactError(
                    "ingest is of an earlier version, which did not write the weights of held-out interactions; redo it: --from ingest"
                )
            later = np.diff(indptr) - np.diff(self.indptr)
            weights = _joined([Ragged(self.indptr, self.weights), _first(self.later_weights, later)]).items
        kept = (nothing, None) if include == "all" else (self.test, self.after)
        return Sequences(self.user_ids, indptr, items, nothing, kept[0], None, kept[1], weights)

    def history(self, user: int, upto: str) -> np.ndarray:
        """Items of a user before the "valid" or the "test" item, or all of them ("end")."""
        train, nothing = self.items[self.indptr[user] : self.indptr[user + 1]], np.zeros(0, np.int64)
        valid, test = (each[user : user + 1] if each[user] >= 0 else nothing for each in (self.valid, self.test))
        between, after = (nothing if each is None else each.of(user) for each in (self.between, self.after))
        later = {"valid": [], "test": [valid, between], "end": [valid, between, test, after]}[upto]
        return np.concatenate([train, *later]).astype(np.int64)

    def lengths(self) -> np.ndarray:
        """[U] items of each history before the test item."""
        between = 0 if self.between is None else np.diff(self.between.indptr)
        return np.diff(self.indptr) + (self.valid >= 0) + between


def to_histories(table: pa.Table) -> tuple[list[str], list[np.ndarray]]:
    """Users and their whole histories, of an ingest/sequences table or of one of `HISTORIES`."""
    users = table[USER_ID].to_pylist()
    if "history" in table.column_names:
        return users, [np.array(items, dtype=np.int64) for items in table["history"].to_pylist()]
    sequences = to_sequences(table)
    return users, [sequences.history(user, "end") for user in range(len(users))]


def to_sequences(table: pa.Table) -> Sequences:
    """Arrays of an ingest/sequences table of one domain."""
    between, after = (_ragged(table[name]) if name in table.column_names else None for name in ("between", "after"))
    train = _ragged(table["train"])
    weighted = TRAIN_WEIGHTS in table.column_names and table.num_rows
    weights = table[TRAIN_WEIGHTS].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32) if weighted else None
    later = _ragged(table[LATER_WEIGHTS]) if weighted and LATER_WEIGHTS in table.column_names else None
    return Sequences(
        table[USER_ID].to_pylist(),
        train.indptr,
        train.items,
        table["valid"].fill_null(-1).to_numpy().astype(np.int64),
        table["test"].fill_null(-1).to_numpy().astype(np.int64),
        between,
        after,
        weights,
        later,
    )


def _ragged(column: pa.ChunkedArray) -> Ragged:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # no rows: nothing to combine
        lists = pa.array([], column.type)
    indptr = lists.offsets.to_numpy().astype(np.int64)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return Ragged(indptr - indptr[0], values.astype(np.int64 if np.issubdtype(values.dtype, np.integer) else np.float32))


def _single(items: np.ndarray) -> Ragged:
    """A list of one item for every user, or of none where it is -1."""
    return Ragged(np.concatenate([[0], np.cumsum(items >= 0)]), items[items >= 0])


def _first(lists: Ragged, lengths: np.ndarray) -> Ragged:
    """The first values of each list, as many as `lengths` says."""
    ends = np.cumsum(lengths)
    places = np.repeat(lists.indptr[:-1] - (ends - lengths), lengths) + np.arange(int(lengths.sum()))
    return Ragged(np.concatenate([[0], ends]), lists.items[places])


def _joined(pieces: list[Ragged]) -> Ragged:
    """Each user's lists one after another."""
    lengths = np.stack([np.diff(piece.indptr) for piece in pieces], axis=1)  # [U, pieces]
    ends = np.cumsum(lengths).reshape(lengths.shape)
    joined = np.empty(int(lengths.sum()), np.result_type(*(piece.items.dtype for piece in pieces)))
    for number, piece in enumerate(pieces):
        starts = ends[:, number] - lengths[:, number]
        joined[np.repeat(starts - piece.indptr[:-1], lengths[:, number]) + np.arange(len(piece.items))] = piece.items
    return Ragged(np.concatenate([[0], np.cumsum(lengths.sum(1))]), joined)
