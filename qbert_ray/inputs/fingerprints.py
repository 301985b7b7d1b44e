"""What input files are known by: their names, sizes and content, not their times, so that copies count as the same.

A file up to `WHOLE` is hashed whole; of a larger one, blocks spread from its first to its last byte. Parquet and gzip end with
sums over what is before, so any change of them is seen. A change of plain text past `WHOLE` that keeps its size and falls
between the blocks is not; `--redo` or `--from` reads it again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import xxhash
from pyarrow import fs

from qbert_ray.inputs.sources import find_files
from qbert_ray.storage.directory import join, resolve

WHOLE, BLOCK = 32 << 20, 1 << 18  # bytes
READERS = 16  # files at the same time, for object stores


def fingerprint(root: str, location: str) -> str | None:
    """What the files of a path of the config are known by; None where there are none.

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
        name = "/".join(info.path.split("/")[fixed:])  # nothing of one file: the config names it
        whole.update(f"{name}\0{info.size}\0{content}\0".encode())
    return f"{sum(info.size for info in infos)} bytes in {len(infos)} files, {whole.hexdigest()}"


@lru_cache(maxsize=100_000)
def _sum(uri: str, path: str, size: int, mtime_ns: int) -> str:
    """Hash of a file's content, read again by a process only once its size or time changed."""
    filesystem: fs.FileSystem = resolve(uri)[0]
    found = xxhash.xxh3_128()
    with filesystem.open_input_file(path) as file:
        for place in _places(size):
            found.update(file.read_at(BLOCK, place))
    return found.hexdigest()


def _places(size: int) -> list[int]:
    """Where the blocks begin that are read of a file: everywhere, or evenly from its first to its last one."""
    if size <= WHOLE:
        return list(range(0, size, BLOCK))
    return [int(place) for place in np.linspace(0, size - BLOCK, WHOLE // BLOCK).astype(np.int64)]
