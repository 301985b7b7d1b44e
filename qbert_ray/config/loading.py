"""Loads a `Config` from YAML files, merged left to right, and from `section.field=value` strings, which override them.

config = load_config(["configs/movielens.yaml"], ["data.root=/data/movielens", "finetune.epochs=5"])
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qbert_ray.config.schema import Config, Data, Domain
from qbert_ray.config.section import Tree, Values
from qbert_ray.config.shipped import in_same_folder, shipped
from qbert_ray.config.yaml_files import YamlError, read_yaml

MOST_SHOWN = 300  # characters of a value in an error
OF_UNION = r"\[key\]|constrained-\w+|literal\[.*\]"  # what pydantic appends to the path of a field with several types
WHOLE = {"masks", "variants"}  # mappings in which the set of keys is the setting, so merging could only add keys


# Names before the first release, as patterns -> current names.
RENAMED = {
    "rqvae": "quantizer (and quantizer.kind for rqvae.quantizer)",
    "quantizer.quantizer": "quantizer.kind",
    "memory": "ranking",
    "evaluation": "evaluate",
    "compute.assign": "compute.semantic_ids",
    "compute.rqvae": "compute.quantizer",
    "compute.memory": "compute.ranking",
    "data.domains.*.text_features": "vectors.text",
    "data.domains.*.image_features": "vectors.image",
    "data.domains.*.structure_features": "vectors.structure",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the dotted path, what was given and what is valid."""


def load_config(files: list[str | Path] = [], overrides: list[str] = []) -> Config:  # noqa: B006 - never mutated
    """The `Config` from YAML files merged left to right, then `section.field=value` strings.

    Raises:
        ConfigError: a file or an override cannot be read, or a key or value is not valid.
    """
    tree: Tree = {}
    for file in files:
        tree = merge(tree, read_layer(Path(file)))
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return _validate(_as_typed(tree, overrides))


def read_config(content: bytes, where: str) -> Config:
    """The config saved in a run directory, possibly by another version or another user.

    Args:
        content: of its config.yaml.
        where: its path, for errors.

    Raises:
        ConfigError: it cannot be read, or a key or value is not valid.
    """
    try:
        tree = read_yaml(content) or {}
    except YamlError as error:
        raise ConfigError(f"{where} {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold a mapping of sections, got {type(tree).__name__}")
    try:
        return _validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def with_values(config: Config, values: Values) -> Config:
    """A copy of the config with other values at some dotted paths.

    Raises:
        ConfigError: a path or a value is not valid.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    for path, value in values.items():
        tree = merge(tree, nest(path, value))
    return _validate(tree)


def nest(path: str, value: Any) -> Tree:
    """A nested mapping with one leaf at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _validate(tree: dict[Any, Any]) -> Config:
    strange = next((key for key in tree if not isinstance(key, str)), None)
    if strange is not None:
        raise ConfigError(f"{strange!r}: no such section; known there: {', '.join(Config.model_fields)}")
    for path, value in flatten(tree).items():
        if isinstance(value, str):
            refuse_credentials(path, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None


_SECRETS = re.compile(
    r"(?i)(?:^|&)(?:sig|[\w.-]*(?:secret|secret_?key|password|passwd|token|signature|credential|access_?key|account_?key|api_?key))="
)


def refuse_credentials(name: str, value: str) -> None:
    """Raise ConfigError if a URI given as `name` holds credentials; the message omits the value, since it is logged too."""
    if _has_credentials(value):
        raise ConfigError(
            f"{name} holds credentials, which would end up in manifests and logs; write {value.partition('://')[0]}://bucket/path and "
            "give them by the environment of every node (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
        )


def _has_credentials(value: str) -> bool:
    scheme, found, rest = value.partition("://")
    place, _, query = rest.partition("?")
    if not found or not re.fullmatch(r"[\w.+-]+", scheme):
        return False
    if _SECRETS.search(query):
        return True
    before, at, _ = place.partition("@")
    if scheme in ("abfs", "abfss"):  # container@account.dfs.core.windows.net
        return bool(at) and ":" in before
    # user@host or user:password@host; a password may have a slash, where host:port/path@x has none
    return bool(at) and bool(re.match(r"[^/]*$|[^/:]*:(?!\d*/)", before))


def read_layer(file: Path, above: tuple[Path, ...] = ()) -> Tree:
    """The values of one YAML file, merged onto the file that its `extends` names; configs/... may come with the package.

    Args:
        file: where it is.
        above: files that extend it, the first one first.
    """
    file = file if file.exists() else shipped(file) or file
    if file.resolve() in above:
        chain = " extends ".join(path.name for path in (*above[above.index(file.resolve()) :], file))
        raise ConfigError(f"{above[0]}: {chain}: a file cannot extend itself")
    try:
        layer = read_yaml(file.read_bytes()) or {}
    except FileNotFoundError:
        said = f" (extended by {above[-1]})" if above else ""
        there = ", ".join(in_same_folder(file)) or "named configs/<name>.yaml"
        raise ConfigError(f"no config file at {file}{said}; the ones that come with the package are {there}") from None
    except YamlError as error:
        raise ConfigError(f"{file} {error}") from None
    if not isinstance(layer, dict):
        raise ConfigError(f"{file} must hold a mapping of sections, got {type(layer).__name__}")
    base = layer.pop("extends", None)
    if base is not None and (not isinstance(base, str) or "\x00" in base):
        raise ConfigError(f"{file}: extends must name one file, got {type(base).__name__}")
    return merge(read_layer(file.parent / base, (*above, file.resolve())), layer) if base else layer


def merge(base: Tree, overlay: Tree) -> Tree:
    """`base` with `overlay` on top: mappings merge key by key, anything else is replaced.

    The mappings in `WHOLE` are replaced as a whole.
    """
    merged = dict(base)
    for key, value in overlay.items():
        deep = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in WHOLE
        merged[key] = merge(merged[key], value) if deep else value
    return merged


def flatten(tree: object, prefix: str = "") -> Values:
    """Dotted path -> leaf of a nested mapping; errors and manifests use these paths."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: Values = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def settings_of(overlay: Tree, prefix: str = "") -> Values:
    """Dotted path -> value that an overlay sets; mappings that `merge` replaces as a whole stay whole."""
    found: Values = {}
    for key, value in overlay.items():
        path = f"{prefix}{key}"
        deep = isinstance(value, dict) and value and key not in WHOLE
        found |= settings_of(value, f"{path}.") if deep else {path: value}
    return found


def _parse_override(text: str) -> Tree:
    path, equals, value = text.partition("=")
    if not equals or not path.strip("."):
        raise ConfigError(f"{text!r} is not an override; write section.field=value, such as finetune.epochs=5")
    return nest(path, _parse_value(value))


def _as_typed(tree: Tree, overrides: list[str]) -> Tree:
    """The tree with text fields as they were typed: run.dir=2024 is text, not a number."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        typed = {path: value for path, _, value in (override.partition("=") for override in overrides)}
        for problem in error.errors():
            path = ".".join(map(str, problem["loc"]))
            if problem["type"] == "string_type" and path in typed and not isinstance(problem["input"], dict | list):
                tree = merge(tree, nest(path, typed[path]))
    return tree


def _parse_value(text: str) -> Any:
    """A value parsed as YAML, except that dates stay text: a folder may be called 2024-01-01, and no field takes a date.

    Nor is there a comment: a folder may be called `try #2`.
    """
    try:
        value = read_yaml(text)
    except YamlError:
        return text
    plain = isinstance(value, str) and not text.lstrip().startswith(("'", '"'))
    return text.strip() if plain or text.lstrip().startswith("#") else value


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"] if not re.fullmatch(OF_UNION, str(part)))
    if problem["type"] == "string_type" and not isinstance(problem["input"], dict | list):
        return f"{path}: this is a text, and YAML reads {problem['input']!r} there; write it in quotes"
    if problem["type"] != "extra_forbidden":
        given = repr(problem["input"])
        given = given if len(given) <= MOST_SHOWN else f"{given[:MOST_SHOWN]}…"
        return f"{path or 'config'}: {problem['msg'].removeprefix('Value error, ')} (given: {given})"
    renamed = next((new for old, new in RENAMED.items() if fnmatch.fnmatchcase(path, old)), None)
    if renamed:
        return f"{path}: has a new name; write {renamed}"
    known = _known_keys(problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    hint = f"did you mean {'.'.join([*map(str, problem['loc'][:-1]), near[0]])}?" if near else f"known there: {', '.join(known)}"
    return f"{path}: no such key; {hint}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        if model is Data and part == "domains":
            model = Domain
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
