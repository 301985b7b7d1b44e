"""The configs that come with the package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve()
_FOLDERS = (_HERE.parents[1] / "configs", _HERE.parents[2] / "configs")  # of an installed wheel, of a checkout


def shipped(path: Path) -> Path | None:
    """Path of the shipped config that a path such as configs/demo.yaml names; None if there is none."""
    if path.parts[:1] != ("configs",):
        return None
    found = (folder / Path(*path.parts[1:]) for folder in _FOLDERS)
    return next((file for file in found if file.is_file()), None)


def in_same_folder(path: Path) -> list[str]:
    """Shipped configs in the folder of a path such as configs/tables/mine.yaml, as paths of the same form."""
    if path.parts[:1] != ("configs",):
        return []
    inside = Path(*path.parts[1:]).parent
    files = next((found for folder in _FOLDERS if (found := sorted((folder / inside).glob("*.yaml")))), [])
    return [str(path.parent / file.name) for file in files]
