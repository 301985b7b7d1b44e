"""Fingerprints of input files from their names, sizes and content, not their times, so that copies count as the same.

A file up to `WHOLE` is hashed whole; of a larger one, blocks spread evenly from its first to its last byte. Parquet and gzip end
with checksums of their content, so any change of them is noticed. A change of larger plain text that keeps its size and falls
between the blocks is not noticed; `--redo` or `--from` reads such a file again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import xxhash
from pyarrow import fs

from qbert_ray.inputs.globs import find_files
from qbert_ray.storage.directory import join, resolve

WHOLE, BLOCK = 32 << 20, 1 << 18  # bytes
READERS = 16  # files at the same time, for object stores


def fingerprint(root: str, location: str) -> str | None:
    """Fingerprint of the files of a path of the config; None if there are none.

    Args:
        root: data.root.
        location: file, folder or glob, under it.
    """
    uri = join(root, location)
    filesystem, path = resolve(uri)
    paths = find_files(filesystem, path, lambda name: True)
    infos = filesystem.get_file_info(paths)
    base = path.rstrip("/").split("/")
    fixed = next((number for number, part in enumerate(base) if any(sign in part for sign in "*?[")), len(base))
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(lambda info: _sum(uri, info.path, info.size, info.mtime_ns or 0), infos))
    if not infos:
        return None
    whole = xxhash.xxh3_128()
    for info, content in zip(infos, sums, strict=True):
        name = "/".join(info.path.split("/")[fixed:])  # empty for a single file, which the config names
        whole.update(f"{name}\0{info.size}\0{content}\0".encode())
    return f"{sum(info.size for info in infos)} bytes in {len(infos)} files, {whole.hexdigest()}"


@lru_cache(maxsize=100_000)
def _sum(uri: str, path: str, size: int, mtime_ns: int) -> str:
    """Hash of a file's content; a process reads it again only if its size or time changed."""
    filesystem: fs.FileSystem = resolve(uri)[0]
    found = xxhash.xxh3_128()
    with filesystem.open_input_file(path) as file:
        for place in _block_offsets(size):
            found.update(file.read_at(BLOCK, place))
    return found.hexdigest()


def _block_offsets(size: int) -> list[int]:
    """Offsets of the blocks of a file that are hashed: all of them, or evenly spaced from the first to the last."""
    if size <= WHOLE:
        return list(range(0, size, BLOCK))
    return [int(place) for place in np.linspace(0, size - BLOCK, WHOLE // BLOCK).astype(np.int64)]
