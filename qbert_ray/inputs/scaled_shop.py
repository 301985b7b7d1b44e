"""Generates a shop of 10^4 to 10^7 items and users, written piece by piece as Parquet: titles, item vectors, interactions.

`generate` writes ordinary input files, which `configs/scale.yaml` reads. Notable choices:

* An item has a department, a kind (the same kinds in every department) and a style, a place on a circle. Its vector is the sum of a
  random vector for each plus noise, its title names all three, so content tells what counts of rare items cannot.
* A purchase is a complement of the one before (same department, next kind, near style), or follows the user's taste (a department
  and a style, both of which drift), or popularity, or nothing.
* Items are laid out by department, kind and style, so that each of these choices is an interval of that layout, in which an item is
  drawn by its popularity, a power law of its rank.
* Memory holds a few numbers per item and one piece of users; each piece has a random stream of its own.

Shapes: N items, W width of vectors, U users of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

KINDS, GROUP = 16, 64  # kinds of a department; average items of one kind in one department
NEAR = 4  # items to either side of a style among which a complement, or what follows a taste, is drawn
ZIPF = 0.8  # popularity is rank ** -ZIPF
COMPLEMENT, TASTE, CROWD = 0.45, 0.35, 0.12  # shares of purchases; the rest is random
MOVES, WALK = 0.05, 0.03  # share of purchases after which the taste has another department; step of its style, in circles
LEAST, MOST = 5, 50  # purchases of a user
NOISE = 0.3  # length of the random part of an item's vector; department, kind and style have 1 together
WAVES = 4  # frequencies by which a style is part of a vector
ROWS, USERS = 100_000, 50_000  # items and users of a piece
FIRST_DAY, DAY, DAYS = 1_640_995_200, 86_400, 700  # 2022-01-01 in seconds; first purchases fall in so many days
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


class Layout(NamedTuple):
    """The items in order of department, kind and style.

    Attributes:
        start: [departments * KINDS + 1] first item of each kind in each department.
        style: [N] place on the circle, ascending within a kind of a department.
        cumulative: [N + 1] popularity of all items before.
        number: [N] of the item's ID; random, so that an ID tells nothing.
    """

    start: np.ndarray
    style: np.ndarray
    cumulative: np.ndarray
    number: np.ndarray


def generate(folder: str | Path, num_items: int, num_users: int, per_user: float = 10.0, width: int = 64, seed: int = 0) -> dict[str, int]:
    """Write a shop to `folder` and return its counts; the same arguments give the same tables.

    Args:
        folder: receives items.parquet, vectors.parquet and interactions.parquet, the last of which is complete when it is there.
        num_items: N.
        num_users: each has at least `LEAST` purchases.
        per_user: purchases per user on average, between `LEAST` and half of `MOST`.
        width: W of the item vectors.
        seed: of everything that is random.

    Raises:
        ValueError: fewer items than two departments need, no users, or an average out of range.
    """
    least = 2 * KINDS * GROUP
    if num_items < least or num_users < 1 or width < 1 or not LEAST <= per_user <= MOST / 2:
        raise ValueError(
            f"a shop at scale needs at least {least:,} items, 1 user, vectors of width 1 and {LEAST} to {MOST // 2} purchases per user, "
            f"got {num_items:,}, {num_users:,}, {width} and {per_user:g}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout = build_layout(np.random.default_rng([seed, 0]), num_items)
    _write(folder / "items.parquet", _items(layout))
    _write(folder / "vectors.parquet", _vectors(layout, width, seed))
    rows = _write(folder / "interactions.parquet", _interactions(layout, num_users, per_user, seed))
    return {"items": num_items, "users": num_users, "interactions": rows}


def build_layout(rng: np.random.Generator, num_items: int) -> Layout:
    """Random items in order of department, kind and style."""
    groups = max(2, round(num_items / (KINDS * GROUP))) * KINDS
    counts = np.bincount(rng.integers(groups, size=num_items), minlength=groups)
    start = np.concatenate([[0], np.cumsum(counts)])
    style = rng.random(num_items) + np.repeat(np.arange(groups), counts)
    style.sort()  # the group is the whole number before the point
    weight = (rng.permutation(num_items) + 3.0) ** -ZIPF
    cumulative = np.concatenate([[0.0], np.cumsum(weight)])
    return Layout(start, (style % 1).astype(np.float32), cumulative, rng.permutation(num_items))


def _write(path: Path, tables: Iterator[pa.Table]) -> int:
    """Write tables one after another to a file that is there only when it is whole; returns its rows."""
    path.unlink(missing_ok=True)
    partial, first = path.with_suffix(".partial"), next(tables)
    rows = 0
    with pq.ParquetWriter(partial, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)
            rows += table.num_rows
    partial.replace(path)
    return rows


def _attributes(layout: Layout, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Department, kind and style of some items."""
    group = np.searchsorted(layout.start, np.arange(*rows.indices(len(layout.style))), side="right") - 1
    return group // KINDS, group % KINDS, layout.style[rows]


def _pieces(layout: Layout) -> Iterator[slice]:
    for begin in range(0, len(layout.style), ROWS):
        yield slice(begin, begin + ROWS)


def _ids(letter: str, numbers: np.ndarray) -> pa.Array:
    """A letter and eight digits."""
    return pc.binary_join_element_wise(letter, pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0"), "")


def _items(layout: Layout) -> Iterator[pa.Table]:
    """item_id, title, and the attributes that the title names."""
    departments, kinds, styles = (_words(count, letters) for count, letters in ((len(layout.start) // KINDS, 4), (KINDS, 2), (32, 3)))
    for rows in _pieces(layout):
        department, kind, style = _attributes(layout, rows)
        names = [
            words.take(pa.array(places))
            for words, places in ((departments, department), (kinds, kind), (styles, (style * 32).astype(np.int64)))
        ]
        title = pc.binary_join_element_wise(*names, pa.scalar(" "))
        yield pa.table(
            {"item_id": _ids("P", layout.number[rows]), "title": title, "department": names[0], "kind": names[1], "style": style}
        )


def _words(count: int, syllables: int) -> pa.Array:
    """Made-up words, all different."""
    parts = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    steps = [len(parts) ** place for place in range(syllables)]
    scattered = np.arange(count) * 7919 % len(parts) ** syllables  # a prime: neighbours differ in several syllables
    return pa.array(["".join(parts[number // step % len(parts)] for step in steps) for number in scattered.tolist()])


def _vectors(layout: Layout, width: int, seed: int) -> Iterator[pa.Table]:
    """item_id and vector [W] of each item."""
    rng = np.random.default_rng([seed, 1])
    departments, kinds = (_directions(rng, count, width) for count in (len(layout.start) // KINDS, KINDS))
    waves = _directions(rng, 2 * WAVES, width) / WAVES**0.5
    for piece, rows in enumerate(_pieces(layout)):
        department, kind, style = _attributes(layout, rows)
        angle = 2 * np.pi * style[:, None] * np.arange(1, WAVES + 1, dtype=np.float32)
        noise = np.random.default_rng([seed, 2, piece]).standard_normal((len(style), width), dtype=np.float32)
        vectors = departments[department] + kinds[kind] + np.concatenate([np.cos(angle), np.sin(angle)], axis=1) @ waves
        vectors = vectors / 3**0.5 + noise * np.float32(NOISE / width**0.5)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
        yield pa.table({"item_id": _ids("P", layout.number[rows]), "vector": column})


def _directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """[count, W] random vectors of length 1."""
    drawn = rng.standard_normal((count, width), dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def _interactions(layout: Layout, num_users: int, per_user: float, seed: int) -> Iterator[pa.Table]:
    """user_id, item_id and timestamp, user by user."""
    for piece, begin in enumerate(range(0, num_users, USERS)):
        rng, size = np.random.default_rng([seed, 3, piece]), min(USERS, num_users - begin)
        lengths = np.minimum(LEAST - 1 + rng.geometric(1 / (per_user - LEAST + 1), size), MOST)
        items = _purchases(layout, rng, lengths)  # [U, longest]
        made = np.arange(items.shape[1]) < lengths[:, None]
        days = np.cumsum(rng.exponential(5.0, items.shape), axis=1) + rng.random((size, 1)) * DAYS
        users = _ids("U", begin + np.arange(size)).take(pa.array(np.repeat(np.arange(size), lengths)))
        times = (FIRST_DAY + days[made] * DAY).astype(np.int64)
        yield pa.table({"user_id": users, "item_id": _ids("P", layout.number[items[made]]), "timestamp": times})


def _purchases(layout: Layout, rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
    """[U, longest] items of users in the order of their purchases; what lies beyond a user's length is not to be read."""
    size, longest = len(lengths), int(lengths.max())
    items = np.full((size, longest), -1)
    department, style = _departments(layout, rng, size), rng.random(size, dtype=np.float32)
    for step in range(longest):
        rows = np.flatnonzero(lengths > step)
        chosen = _next(layout, rng, items[rows, step - 1] if step else None, department[rows], style[rows])
        again = (items[rows, :step] == chosen[:, None]).any(1)  # nobody buys an item twice
        chosen[again] = rng.integers(len(layout.style), size=int(again.sum()))
        items[rows, step] = chosen
        moves = np.flatnonzero(rng.random(size) < MOVES)
        department[moves] = _departments(layout, rng, len(moves))
        style = (style + rng.normal(0, WALK, size).astype(np.float32)) % 1
    return items


def _departments(layout: Layout, rng: np.random.Generator, size: int) -> np.ndarray:
    """Departments of items drawn by popularity."""
    return _group_of(layout, _by_popularity(layout, rng, np.zeros(size, np.int64), np.full(size, len(layout.style)))) // KINDS


def _next(layout: Layout, rng: np.random.Generator, last: np.ndarray | None, department: np.ndarray, style: np.ndarray) -> np.ndarray:
    """The next item of each user: of an interval of the layout that depends on the last item or on the taste."""
    size, draw = len(style), rng.random(len(style))
    complement = draw < (COMPLEMENT if last is not None else 0)
    taste = ~complement & (draw < COMPLEMENT + TASTE)
    begin, end = np.zeros(size, np.int64), np.full(size, len(layout.style))  # the whole catalog, for those who follow the crowd
    if last is not None:
        group = _group_of(layout, last[complement])
        following = group // KINDS * KINDS + (group + 1) % KINDS
        begin[complement], end[complement] = _near(layout, following, layout.style[last[complement]])
    edges = [layout.start[department[taste] * KINDS + more] for more in (0, KINDS)]
    liked = _group_of(layout, _by_popularity(layout, rng, *edges))  # a kind by popularity in the department
    begin[taste], end[taste] = _near(layout, liked, style[taste])
    chosen = _by_popularity(layout, rng, begin, end)
    random = draw >= COMPLEMENT + TASTE + CROWD
    chosen[random] = rng.integers(len(layout.style), size=int(random.sum()))
    return chosen


def _group_of(layout: Layout, items: np.ndarray) -> np.ndarray:
    """Department times KINDS plus kind of items."""
    return np.searchsorted(layout.start, items, side="right") - 1


def _near(layout: Layout, group: np.ndarray, style: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of the items of a group whose style is near; the group's items are spread evenly enough to guess their place."""
    first, past = layout.start[group], layout.start[group + 1]
    place = first + ((past - first) * style).astype(np.int64)
    return np.maximum(place - NEAR, first), np.minimum(place + NEAR, past)


def _by_popularity(layout: Layout, rng: np.random.Generator, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """An item of each interval, drawn by popularity."""
    low, high = layout.cumulative[begin], layout.cumulative[end]
    chosen = np.searchsorted(layout.cumulative, low + rng.random(len(begin)) * (high - low), side="right") - 1
    return np.clip(chosen, begin, np.maximum(end - 1, begin)).clip(max=len(layout.style) - 1)
