"""The run directory: tables, models and manifests on a local, s3:// or gs:// path.

A file is either whole or absent: local files are written under a temporary name and renamed, object stores publish on close.
A stage is done when its `manifest.json` is there, and that is written last. It names every file of the stage with a checksum,
and from then on a file that is missing, damaged or not the stage's is refused. Models are safetensors plus a JSON that alone
rebuilds them; nothing is ever unpickled.
"""

from __future__ import annotations

import copyreg
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from qbert_ray.storage.checksums import DamagedError, Record, check_bytes, checksum, open_parquet, write_parquet
from qbert_ray.storage.seals import MANIFEST, ArtifactError, check_parts, checked, damaged

if TYPE_CHECKING:
    from torch import nn

    from qbert_ray.config.section import Values

    Module = TypeVar("Module", bound=nn.Module)

WEIGHTS = "weights"  # key in the JSON of a model: checksum of its tensors
S3_ATTEMPTS = 8  # of one request, with growing pauses: 50 seconds in all


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local path or a URI.

    Raises:
        ArtifactError: the URI's scheme is unknown or its file system is not available.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ArtifactError(f"cannot open {uri}: {error}; use a local path, s3:// or gs://") from None
    return (_patient(*filesystem.__reduce__()) if filesystem.type_name == "s3" else filesystem), path


def join(root: str, location: str) -> str:
    """`location` under `root`, with the query of a root such as s3://bucket/data?endpoint_override=host."""
    if "://" in location or location.startswith(("/", "~")):
        return location
    base, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return f"{base.rstrip('/')}/{location}{mark}{query}"


def _patient(rebuild: Callable[[dict[str, Any]], fs.S3FileSystem], arguments: tuple[dict[str, Any]]) -> fs.S3FileSystem:
    """A store rebuilt from `__reduce__` that retries server errors for longer: Arrow gives up after 6 seconds."""
    (options,) = arguments
    return rebuild(options | {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)})


# Arrow drops the retry setting when a store is pickled to another process, such as those of Ray Train.
copyreg.pickle(fs.S3FileSystem, lambda store: (_patient, store.__reduce__()))


@dataclass(frozen=True)
class RunDir:
    """Reads and writes a run directory by relative paths, as in `run.read("ingest/items")`; cheap to send to workers.

    Args:
        uri: a local path, s3:// or gs://.
        base: a run whose outputs are read in place of own ones, on the same file system.
        shared: folders of `base` that are read there, such as "features"; they are never written to from here.
    """

    uri: str
    base: RunDir | None = None
    shared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if "://" not in self.uri:  # workers have their own working directories
            object.__setattr__(self, "uri", str(Path(self.uri).expanduser().absolute()))

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        return resolve(self.uri)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._location[0]

    def path(self, name: str = "") -> str:
        """Full path of a relative one, as `filesystem` takes it."""
        if self.base and self._is_shared(name):
            return self.base.path(name)
        return f"{self._location[1].rstrip('/')}/{name}".rstrip("/")

    def home(self, name: str) -> str:
        """URI of the run directory that a path is read from."""
        return self.base.home(name) if self.base and self._is_shared(name) else self.uri

    def inside(self, name: str) -> RunDir:
        """A run directory below this one."""
        return RunDir(join(self.uri, name))

    def sharing(self, base: RunDir, folders: Iterable[str]) -> RunDir:
        """This run directory, except that some folders are read from another one on the same file system."""
        return replace(self, base=base, shared=frozenset(folders))

    def _is_shared(self, name: str) -> bool:
        return name.split("/")[0] in self.shared

    # files

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.path(name)).type != fs.FileType.NotFound

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Sorted names of the whole files in a folder; empty if there is no folder."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        names = (info.base_name for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders in a folder; empty if there is none."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.Directory)

    def write_bytes(self, name: str, content: bytes | pa.Buffer) -> None:
        self._publish(name, lambda path: self._write(path, content))

    def read_bytes(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            ArtifactError: the stage is done and the file is not what it wrote.
        """
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            content = stream.read()
        checked(self, name, lambda known: check_bytes(name, content, known) if known else None)
        return content

    def write_json(self, name: str, content: Any) -> None:
        self.write_bytes(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Content of a JSON file.

        Raises:
            ArtifactError: it is not JSON, or not what the stage wrote.
        """
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, ArtifactError) else damaged(self, name, f"cannot be read as JSON: {error}") from None

    def read_lines(self, name: str) -> list[Any]:
        """Values of a file of JSON lines; none if there is no such file.

        Raises:
            ArtifactError: a line is not JSON, or the file is not what the stage wrote.
        """
        lines = self.read_bytes(name).splitlines() if self.exists(name) else []
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise damaged(self, name, f"cannot be read as JSON lines: {error}") from None

    def delete(self, name: str) -> None:
        """Remove a file or folder if it exists."""
        assert not self._is_shared(name), f"{name} belongs to {self.base}"
        kind = self.filesystem.get_file_info(self.path(name)).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path(name))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.path(name))

    # tables

    def parts(self, table: str, domain: str | None = None) -> list[str]:
        """Names of a table's parts in order, of one domain or all.

        Raises:
            ArtifactError: the stage is done, and a part is missing or one is there that it did not write.
        """
        names = [name for name in self.names(table, ".parquet") if domain is None or name.rsplit("-", 1)[0] == domain]
        check_parts(self, table, domain, names)
        return names

    def write_part(self, table: str, name: str, rows: pa.Table) -> None:
        whole = write_parquet(f"{table}/{name}", rows)  # a writer that fails half-way would publish a partial file on an object store
        self.write_bytes(f"{table}/{name}", whole)

    def read_part(self, table: str, name: str, columns: list[str] | None = None) -> pa.Table:
        """Rows of one part.

        Raises:
            ArtifactError: it is not what was written.
        """
        try:
            return self.open_part(table, name).read(columns=columns).replace_schema_metadata(None)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk or the network
                raise
            raise damaged(self, f"{table}/{name}", f"is damaged: {error}") from None

    def open_part(self, table: str, name: str) -> pq.ParquetFile:
        """A part opened as a Parquet file: its footer was checked, and its pages are checked as they are read.

        Raises:
            ArtifactError: it is not what was written.
        """
        part = f"{table}/{name}"
        try:
            file = self.filesystem.open_input_file(self.path(part))
        except FileNotFoundError:
            raise damaged(self, part, "is missing") from None
        return checked(self, part, lambda known: open_parquet(file, part, known)[0])

    def column_names(self, table: str, name: str) -> list[str]:
        return self.open_part(table, name).schema_arrow.names

    def read(self, table: str, domain: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """All rows of a table, or those of one domain, in the order of its parts.

        Raises:
            ArtifactError: there is no such table in the run directory.
        """
        names = self.parts(table, domain)
        if not names:
            raise ArtifactError(f"no table {table} for {domain or 'any domain'} in {self.uri}; run the stage that makes it: qbert-ray run")
        return pa.concat_tables([self.read_part(table, name, columns) for name in names], promote_options="default")

    # models

    def save_model(self, folder: str, tensors: dict[str, Any], description: dict[str, Any]) -> None:
        """Write the weights of a model and the JSON that rebuilds it; the JSON is written last."""
        from safetensors.torch import save  # imports torch, which reading tables does not need

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        weights = save(contiguous)
        self.write_bytes(f"{folder}/model.safetensors", weights)
        self.write_json(f"{folder}/model.json", description | {WEIGHTS: {"bytes": len(weights), "checksum": checksum(weights)}})

    def load_model(self, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and description as `save_model` was given them.

        Raises:
            ArtifactError: there is no model in that folder, or it is not what was written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not self.exists(f"{folder}/model.json"):
            raise ArtifactError(f"no model in {self.uri}/{folder}; run the stage that trains it: qbert-ray run")
        description, name = self.read_json(f"{folder}/model.json"), f"{folder}/model.safetensors"
        if not isinstance(description, dict):
            raise damaged(self, f"{folder}/model.json", "does not describe a model")
        try:
            weights = self.read_bytes(name)
            check_bytes(name, weights, description.pop(WEIGHTS, None) or {"bytes": len(weights), "checksum": checksum(weights)})
            return load(weights), description
        except FileNotFoundError:
            raise damaged(self, name, "is missing") from None
        except (DamagedError, SafetensorError) as error:
            raise damaged(self, name, str(error) if isinstance(error, DamagedError) else f"cannot be read: {error}") from None

    def load_module(self, kind: Callable[..., Module], folder: str) -> Module:
        """The model of a folder, ready to use: built from its description, with its weights, in evaluation mode.

        Args:
            kind: the model's class.
            folder: as `save_model` was given it.

        Raises:
            ArtifactError: there is no model in that folder, or its weights are not those of the model that it describes.
        """
        from qbert_ray.storage.models import rebuild

        return rebuild(kind, self, folder)

    def _write(self, path: str, content: bytes | pa.Buffer) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _publish(self, name: str, write: Any) -> None:
        assert not self._is_shared(name), f"{name} belongs to {self.base}"
        final = self.path(name)
        if not isinstance(self.filesystem, fs.LocalFileSystem):
            write(final)
            return
        folder, _, base = final.rpartition("/")
        self.filesystem.create_dir(folder, recursive=True)
        partial = f"{folder}/.{base}.{uuid.uuid4().hex}"
        try:
            write(partial)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        self.filesystem.move(partial, final)


# What a stage counted, by domain or over all of them: rows in and out, rejected by reason, last metrics, "warnings".
# The module of a stage declares its own, in so far as their names are known; a manifest may be of another version.
Counts = dict[str, Any]


@dataclass
class Manifest:
    """Record of a finished stage, written last into its folder: config, inputs, counts and files."""

    stage: str
    config: Values  # of all the config the outputs depend on
    inputs: dict[str, str]  # upstream stage -> its fingerprint
    version: str  # of the code
    seconds: float = 0.0
    counts: Counts = field(default_factory=dict)
    files: dict[str, Record] | None = None  # every file of the stage -> rows, bytes, checksum

    @property
    def fingerprint(self) -> str:
        """Hash of config and inputs, not of times: equal for equal outputs."""
        content = json.dumps([self.stage, self.config, self.inputs], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, run: RunDir, folder: str) -> None:
        content = {**self.__dict__, "fingerprint": self.fingerprint}
        run.write_json(f"{folder}/{MANIFEST}", content | {"checksum": _checksum(content)})

    @staticmethod
    def load(run: RunDir, folder: str) -> Manifest | None:
        """The manifest of a finished stage; None if the stage is not done.

        Raises:
            ArtifactError: it is not what was written.
        """
        name = f"{folder}/{MANIFEST}"
        if not run.exists(name):
            return None
        content = run.read_json(name)
        try:
            if content.pop("checksum", None) not in (None, _checksum(content)):
                raise damaged(run, name, "was changed after it was written")
            content.pop("fingerprint")
            return Manifest(**content)
        except (AttributeError, KeyError, TypeError):
            raise damaged(run, name, "is not the manifest of a stage") from None


def _checksum(content: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(content, default=str))  # JSON turns numeric keys into text
    return checksum(json.dumps(as_read, sort_keys=True).encode())
