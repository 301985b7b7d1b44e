"""Items as the report shows them: title, image and semantic ID; and the thumbnails of a page, within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.report.players import Player, players, within_budget
from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.semantic_ids.lookup import IDS, Ids, read_ids, read_titles
from qbert_ray.storage.columns import BYTES_PREFIX, ITEM_ID, ITEM_INDEX, PATH_PREFIX, to_sequences
from qbert_ray.storage.directory import ArtifactError, RunDir

SIDE, QUALITY = 88, 68  # pixels and JPEG quality of a thumbnail
BUDGET = 5_500_000  # bytes of all thumbnails, as base64
READERS = 8
MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000
ANYWHERE = Addresses(follow_links=True)  # local files that decode as an image are shown in the report
LONGEST = 90  # characters of a title


class Catalog:
    """The items of one domain, in the order of item_index."""

    def __init__(self, run: RunDir, domain: str) -> None:
        """Read the names.

        Raises:
            ArtifactError: the domain was not ingested.
        """
        self.run, self.domain, self.parts = run, domain, run.parts("ingest/items", domain)
        if not self.parts:
            raise ArtifactError(f"no table ingest/items for {domain} in {run.uri}; run the stage that makes it: qbert-ray ingest")
        self.titles = read_titles(run, self.parts)

    def __len__(self) -> int:
        return len(self.titles)

    @cached_property
    def item_ids(self) -> pl.Series:
        rows = [pl.DataFrame(self.run.read_part("ingest/items", part, [ITEM_INDEX, ITEM_ID])) for part in self.parts]
        return pl.concat(rows).sort(ITEM_INDEX)[ITEM_ID]

    @cached_property
    def ids(self) -> Ids | None:
        parts = self.run.parts(IDS, self.domain)
        return read_ids(self.run, parts) if parts and self.run.exists(f"{IDS}/manifest.json") else None

    @cached_property
    def popularity(self) -> np.ndarray:
        """[N] training interactions of each item."""
        counts = np.zeros(len(self), dtype=np.int64)
        for part in self.run.parts("ingest/sequences", self.domain):
            counts += np.bincount(to_sequences(self.run.read_part("ingest/sequences", part)).items, minlength=len(self))
        return counts

    def title(self, row: int) -> str:
        title = str(self.titles[int(row)])
        return title if len(title) <= LONGEST else title[: LONGEST - 1] + "…"

    def item(self, row: int) -> dict[str, Any]:
        """Title, semantic ID and image key of an item, as the page shows them."""
        tokens = to_tokens(self.ids.codes[[row]])[0] if self.ids is not None and row < len(self.ids.codes) else None
        return {"key": f"{self.domain}/{row}", "title": self.title(row), "item_id": str(self.item_ids[int(row)]), "semantic_id": tokens}


class Album:
    """Collects the thumbnails of a page within a budget; those requested first have priority."""

    def __init__(self) -> None:
        self.wanted: dict[tuple[str, int], None] = {}
        self.left_out = 0

    def want(self, catalog: Catalog, rows: Iterable[int]) -> None:
        self.wanted |= {(catalog.domain, int(row)): None for row in rows}

    def images(self, catalogs: dict[str, Catalog]) -> dict[str, str]:
        """{"<domain>/<item_index>": data URI} of the requested items whose image can be read."""
        found: dict[tuple[str, int], bytes | None] = {}
        most = BUDGET // 1500  # more would never fit, so they are not read
        wanted = list(self.wanted)
        if len(wanted) > most:
            shown = {(domain, row) for domain, rows in _by_domain(wanted).items() for row in _with_files(catalogs[domain], rows)}
            wanted = [key for key in wanted if key in shown]
        left_out = len(wanted[most:])
        wanted = wanted[:most]
        for domain, rows in _by_domain(wanted).items():
            for part in catalogs[domain].parts:
                found |= {(domain, row): content for row, content in _thumbnails(catalogs[domain].run, part, rows)}
        result: dict[str, str] = {}
        spent = 0
        for key in wanted:
            content = found.get(key)
            if content is not None:
                uri = "data:image/jpeg;base64," + base64.b64encode(content).decode()
                spent += len(uri)
                if spent > BUDGET:
                    break
                result["/".join(map(str, key))] = uri
        self.left_out = left_out + sum(found.get(key) is not None for key in wanted) - len(result)
        return result

    def players(self, catalogs: dict[str, Catalog]) -> dict[str, list[Player]]:
        """{"<domain>/<item_index>": sounds and clips} of the requested items, those requested first as far as a budget reaches."""
        found: dict[str, list[Player]] = {}
        for domain, rows in _by_domain(self.wanted).items():
            catalog = catalogs[domain]
            for row, made in players(catalog.run, catalog.parts, rows, _addresses(catalog.run)):
                found.setdefault(f"{domain}/{row}", []).append(made)
        keys = ["/".join(map(str, key)) for key in self.wanted]
        return within_budget((key, made) for key in keys for made in found.get(key, []))


def _addresses(run: RunDir) -> Addresses:
    return replace(ANYWHERE, queries=("?" + run.uri.partition("?")[2],))  # an untrusted run's rows must not choose the store


def _by_domain(keys: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """Domain -> item_index of its items."""
    result: dict[str, list[int]] = {}
    for domain, row in keys:
        result.setdefault(domain, []).append(row)
    return result


def _with_files(catalog: Catalog, rows: list[int]) -> list[int]:
    """Those of some items that have an image or other files."""
    return [row for part in catalog.parts for row, _ in _files(catalog.run, part, rows)]


def _files(run: RunDir, part: str, rows: list[int]) -> list[tuple[int, list[tuple[str | None, bytes | None]]]]:
    """item_index of those of some items of a part that have files, and address and content of each: of the image, and the first of each modality."""
    names = run.column_names("ingest/items", part)
    if not {"image_path", "image_bytes"} <= set(names):
        return []
    several = sorted(name.removeprefix(PATH_PREFIX) for name in names if name.startswith(PATH_PREFIX))
    lists = [f"{prefix}{name}" for name in several for prefix in (PATH_PREFIX, BYTES_PREFIX)]
    table = pl.DataFrame(run.read_part("ingest/items", part, [ITEM_INDEX, "image_path", "image_bytes", *lists]))
    given = table.filter(pl.col(ITEM_INDEX).is_in(rows)).with_columns(pl.col(name).list.first() for name in lists)
    pairs = ((row, list(zip(found[::2], found[1::2], strict=True))) for row, *found in given.rows())
    return [(row, there) for row, found in pairs if (there := [pair for pair in found if pair != (None, None)])]


def _thumbnails(run: RunDir, part: str, rows: list[int]) -> list[tuple[int, bytes | None]]:
    """item_index and thumbnail of some items of a part: of the image, or of the first file that is one."""
    addresses = _addresses(run)

    def first(files: list[tuple[str | None, bytes | None]]) -> bytes | None:
        return next(filter(None, (thumbnail(path, content, addresses) for path, content in files)), None)

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(lambda row: (row[0], first(row[1])), _files(run, part, rows)))


def thumbnail(path: str | None, content: bytes | None, addresses: Addresses = ANYWHERE) -> bytes | None:
    """A small JPEG of an image; None if it cannot be read. Nothing is fetched from the web."""
    from PIL import Image

    from qbert_ray.features.encoders import ImageRejected, decode_image  # imports torch

    try:
        if content is None:
            if path is None or path.startswith(("http://", "https://")):
                return None
            content = read_image(path, MOST_BYTES, addresses)
        image = decode_image(content, MOST_BYTES, MOST_PIXELS)
    except (AddressError, ImageRejected, OSError, ValueError):
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=QUALITY, optimize=True)
    return kept.getvalue()
