"""Finds the files that a file, folder or glob of the config names."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable

from pyarrow import fs

from qbert_ray.inputs import readers


def find_files(filesystem: fs.FileSystem, path: str, wanted: Callable[[str], object] = readers.kind_of) -> list[str]:
    """Sorted paths of the files that a file, folder or glob of the config names.

    Args:
        filesystem: file system of the path.
        path: as the file system takes it.
        wanted: selects among the names of a folder or glob; by default those of tables.
    """
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        return [path]
    parts = path.rstrip("/").split("/")
    fixed = len(parts)
    if kind == fs.FileType.NotFound:  # a path that exists literally is not a glob
        fixed = _first_glob(filesystem, parts)
    selector = fs.FileSelector("/".join(parts[:fixed]), recursive=True, allow_not_found=True)
    infos = (info for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File)
    found = sorted(info.path for info in infos if wanted(info.path) and _matches(info.path.split("/"), parts, fixed))
    if not isinstance(filesystem, fs.LocalFileSystem):
        return found
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]  # a link to a folder above it repeats all files


def _first_glob(filesystem: fs.FileSystem, parts: list[str]) -> int:
    """Number of the first part of a path that is a pattern: it has wildcards, and no folder has literally that name."""
    for number, part in enumerate(parts):
        missing = (
            any(sign in part for sign in "*?[") and filesystem.get_file_info("/".join(parts[: number + 1])).type == fs.FileType.NotFound
        )
        if missing:
            return number
    return len(parts)


def _matches(found: list[str], wanted: list[str], fixed: int) -> bool:
    """Whether a path is inside the wanted folder, or matches the wanted glob; hidden files never do."""
    hidden = any(part.startswith((".", "_", "~$")) and "=" not in part for part in found[fixed:])  # ~$ are the locks of office programs
    return not hidden and _fits(found[fixed:], wanted[fixed:])


def _fits(found: list[str], wanted: list[str]) -> bool:
    """Whether the first parts of a path match those of a pattern, in which ** is any number of folders."""
    if not wanted:
        return True
    if wanted[0] == "**":
        return any(_fits(found[depth:], wanted[1:]) for depth in range(len(found) + 1))
    return bool(found) and fnmatch.fnmatchcase(found[0], wanted[0]) and _fits(found[1:], wanted[1:])
