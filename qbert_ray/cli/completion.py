"""Shell completion of config files, fields and sections."""

from __future__ import annotations

from pathlib import Path

from qbert_ray.config.reference import fields, sections


def config_files(incomplete: str) -> list[str]:
    """YAML files, and folders on the way to them."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = sorted(path for path in folder.glob("*") if path.is_dir() or path.suffix in (".yaml", ".yml"))
    names = [f"{path}/" if path.is_dir() else str(path) for path in found if not path.name.startswith(".")]
    return [name for name in names if name.startswith(incomplete.removeprefix("./"))]


def overrides(incomplete: str) -> list[str]:
    """`section.field=` of every field; those of a domain are omitted, since they contain a name that the user chooses."""
    return [f"{field.path}=" for field in fields() if field.path.startswith(incomplete) and "<" not in field.path]


def prefixes(incomplete: str) -> list[str]:
    """Sections, and fields once a section is begun."""
    paths = [field.path for field in fields() if "." in incomplete]
    return [path for path in [*sections(), *paths] if path.startswith(incomplete)]
