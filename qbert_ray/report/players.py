"""The sounds and clips of a page: small ones are part of it and play there, larger ones on the web are linked to."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import polars as pl

from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.storage.columns import BYTES_PREFIX, ITEM_INDEX, PATH_PREFIX
from qbert_ray.storage.directory import RunDir

MOST_BYTES, BUDGET = 150_000, 4_000_000  # of one file, and of all files of a page as base64
READERS = 8
# FFmpeg's name of a container -> element of HTML and media type that browsers know
PLAYED = {
    "wav": ("audio", "audio/wav"), "flac": ("audio", "audio/flac"), "ogg": ("audio", "audio/ogg"), "mp3": ("audio", "audio/mpeg"),
    "mov": ("video", "video/mp4"), "matroska": ("video", "video/webm"), "gif": ("img", "image/gif"),
}  # fmt: skip


class Player(TypedDict):
    """A sound or clip of an item."""

    element: str  # audio, video, img or a
    source: str  # data URI, or the address of a link
    modality: str


def players(run: RunDir, parts: list[str], rows: list[int], addresses: Addresses) -> Iterator[tuple[int, Player]]:
    """item_index and player of the first file in each modality of some items, where it is a sound or clip."""
    for part in parts:
        names = run.column_names("ingest/items", part)
        modalities = [name.removeprefix(PATH_PREFIX) for name in names if name.startswith(PATH_PREFIX)]
        if not modalities:
            continue
        columns = [f"{prefix}{name}" for name in modalities for prefix in (PATH_PREFIX, BYTES_PREFIX)]
        table = pl.DataFrame(run.read_part("ingest/items", part, [ITEM_INDEX, *columns])).filter(pl.col(ITEM_INDEX).is_in(rows))
        for name in modalities:
            first = table.select(ITEM_INDEX, *(pl.col(f"{prefix}{name}").list.first() for prefix in (PATH_PREFIX, BYTES_PREFIX)))
            with ThreadPoolExecutor(READERS) as threads:
                found = threads.map(lambda row, name=name: (row[0], player(name, row[1], row[2], addresses)), first.rows())  # type: ignore[misc]
                yield from ((row, made) for row, made in found if made is not None)


def player(modality: str, path: str | None, content: bytes | None, addresses: Addresses) -> Player | None:
    """The player of a file, or a link to it; None if it is neither a sound nor a clip. Nothing is fetched from the web."""
    from qbert_ray.features.media import MediaRejected, container_of  # imports torch

    if content is None and path and path.startswith("https://"):
        return {"element": "a", "source": path, "modality": modality}
    try:
        if content is None:
            if not path or path.startswith("http://"):
                return None
            content = read_image(path, MOST_BYTES, addresses)
        element, kind = PLAYED[container_of(content)]
    except (AddressError, MediaRejected, OSError, ValueError):
        return None
    if len(content) > MOST_BYTES:
        return None
    return {"element": element, "source": f"data:{kind};base64,{base64.b64encode(content).decode()}", "modality": modality}


def within_budget(found: Iterable[tuple[str, Player]]) -> dict[str, list[Player]]:
    """Key of an item -> its players, the first ones as far as the budget reaches."""
    result: dict[str, list[Player]] = {}
    spent = 0
    for key, made in found:
        spent += len(made["source"])
        if spent > BUDGET:
            break
        result.setdefault(key, []).append(made)
    return result
