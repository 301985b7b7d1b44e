"""Compares the files of a run with the records in its manifests.

Once its manifest is written, the files of a stage are sealed: one that is missing, damaged or not the stage's is refused, with
the command that makes it again. Files of a stage that is still running are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from qbert_ray.storage.checksums import DamagedError, Record, record_files

if TYPE_CHECKING:
    from qbert_ray.storage.directory import RunDir

MANIFEST, STARTED = "manifest.json", "started.json"  # in the folder of a stage: what it did; an unfinished try
APPENDING = "ingest/appending.json"  # exists while parts are added to finished stages whose manifests do not name them yet
T = TypeVar("T")

_known_files: dict[tuple[str, str], dict[str, Record]] = {}  # of this process: run and stage -> records of its manifest


class ArtifactError(ValueError):
    """Something in a run directory is missing, damaged or was made differently; the message names the command that fixes it."""


def damaged(run: RunDir, name: str, why: str) -> ArtifactError:
    """The error for a file that cannot be used, with the command that makes it again."""
    return ArtifactError(f"{run.uri}/{name} {why}; restore it, or {_advice(name.split('/')[0])}")


def seal(run: RunDir, stage: str) -> dict[str, Record]:
    """Records of all files of a stage, for its manifest.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    try:
        return record_files(run.filesystem, run.path(), stage)
    except DamagedError as error:
        raise ArtifactError(f"{run.uri}: {error}; {_advice(stage)}") from None


def checked(run: RunDir, name: str, check: Callable[[Record | None], T]) -> T:
    """The result of `check`, called with the record of a file of a run.

    The manifest is read once per process, and again before a file is refused: the stage may have been redone since.
    """
    try:
        return check(_record(run, name, fresh=False))
    except DamagedError:
        try:
            return check(_record(run, name, fresh=True))
        except DamagedError as error:
            raise damaged(run, name, str(error)) from None


def check_parts(run: RunDir, table: str, domain: str | None, names: list[str]) -> None:
    """Raise ArtifactError if the parts in the folder are not those that a finished stage wrote."""
    wrong = _compare(run, table, domain, names, fresh=False) and _compare(run, table, domain, names, fresh=True)
    if wrong:
        raise wrong


def _compare(run: RunDir, table: str, domain: str | None, names: list[str], fresh: bool) -> ArtifactError | None:
    sealed = None if "/." in table else _files(run, table.split("/")[0], fresh)
    if sealed is None:
        return None
    known = {name.rsplit("/", 1)[1] for name in sealed if name.rsplit("/", 1)[0] == table and name.endswith(".parquet")}
    known = {name for name in known if domain is None or name.rsplit("-", 1)[0] == domain}
    missing, others = sorted(known - set(names)), sorted(set(names) - known)
    if missing:
        return damaged(run, f"{table}/{missing[0]}", f"is missing, with {len(missing) - 1} more" if missing[1:] else "is missing")
    if others and not run.exists(APPENDING):
        return damaged(run, f"{table}/{others[0]}", "is none of the parts that the stage wrote")
    return None


def _record(run: RunDir, name: str, fresh: bool) -> Record | None:
    stage, _, rest = name.partition("/")
    if not rest or rest in (MANIFEST, STARTED) or "/." in name:
        return None
    return (_files(run, stage, fresh) or {}).get(name)


def _files(run: RunDir, stage: str, fresh: bool) -> dict[str, Record] | None:
    """Records of a finished stage's files; None if it is not done, or was done by a version that kept no checksums."""
    manifest, key = f"{stage}/{MANIFEST}", (run.home(stage), stage)
    if fresh or key not in _known_files:
        _known_files.pop(key, None)
        content = run.read_json(manifest) if run.exists(manifest) else {}
        files = content.get("files") if isinstance(content, dict) else None
        if files is None:
            return None
        if not _is_record_of_files(files):
            raise damaged(run, manifest, "does not name the files of the stage")
        _known_files[key] = files
    return _known_files[key]


def _is_record_of_files(files: object) -> bool:
    records = list(files.values()) if isinstance(files, dict) else [None]
    return all(isinstance(record, dict) and {"bytes", "checksum"} <= set(record) for record in records)


def _advice(stage: str) -> str:
    command = "score" if stage == "score_histories" else stage.replace("_", "-")
    return f"redo the stage that writes it: qbert-ray {command} --redo -c <config>"
