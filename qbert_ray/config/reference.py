"""The reference of every config field, made from the schema of `Config`, for terminals, the documentation site and editors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import yaml

from qbert_ray.config.loading import ConfigError
from qbert_ray.config.schema import Config, Section

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
ANY_NAME = "<name>"  # placeholder for the keys of a mapping that the user chooses


class Field(NamedTuple):
    path: str  # dotted
    type: str
    default: str  # as YAML and the command line take it
    description: str
    paper: str  # section and value in the paper


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, with the `extends` that only files have."""
    schema = Config.model_json_schema()
    for model in _subclasses(Section):
        for name, content in schema["$defs"].get(model.__name__, {}).get("properties", {}).items():
            if description := _inherited(model, name):
                content["description"] = description
    extends = {"type": "string", "description": "config file next to this one, whose values this one overrides"}
    return schema | {"title": "qbert-ray config", "properties": {"extends": extends} | schema["properties"]}


def fields(prefix: str = "") -> list[Field]:
    """Every field in the order of the schema, or those at or under a dotted path.

    Raises:
        ConfigError: there is nothing under that path.
    """
    known = _every_field()
    wanted = re.sub(r"^(data\.domains\.)[\w-]+", rf"\1{ANY_NAME}", prefix.strip("."))
    found = [field for field in known if not wanted or field.path == wanted or field.path.startswith(f"{wanted}.")]
    if not found:
        names = {path for field in known for path in (field.path, field.path.rpartition(".")[0])} - {""}
        near = difflib.get_close_matches(prefix, sorted(names), n=1) or sections()
        raise ConfigError(
            f"{prefix}: no such section or field; {'did you mean' if len(near) == 1 else 'the sections are'} {', '.join(near)}"
        )
    return found


@cache
def _every_field() -> tuple[Field, ...]:
    schema = json_schema()
    return tuple(field for field in _walk(schema, schema, "") if field.path != "extends")


def sections() -> list[str]:
    return list(Config.model_fields)


def about(section: str) -> str:
    """Description of a section; empty if its name is enough."""
    return (Config.model_fields[section].annotation.__doc__ or "").strip()  # type: ignore[union-attr]


def markdown() -> str:
    """The reference of every field as Markdown: a heading and a table for each section."""
    return "\n".join("\n".join([f"### {section}", "", about(section), "", *rows([section]), ""]) for section in sections())


def rows(prefixes: list[str]) -> list[str]:
    """Lines of a Markdown table of the fields at or under some dotted paths.

    Raises:
        ConfigError: there is nothing under one of them.
    """
    lines = ["| field | type | default | meaning | paper |", "|---|---|---|---|---|"]
    for field in (field for prefix in prefixes for field in fields(prefix)):
        path, kind, default, *rest = (text.replace("|", "\\|") for text in field)
        lines.append(f"| `{path}` | {kind} | `{default}` | {' | '.join(rest)} |")
    return lines


def _subclasses(model: type[Section]) -> Iterator[type[Section]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)


def _inherited(model: type[Section], name: str) -> str:
    """The description of a field, or of the one that it overrides without a description of its own."""
    for parent in model.__mro__:
        field = getattr(parent, "model_fields", {}).get(name)
        if field is not None and field.description:
            return field.description
    return ""


def _walk(schema: dict[str, Any], root: dict[str, Any], path: str) -> Iterator[Field]:
    for name, content in schema["properties"].items():
        here = f"{path}.{name}" if path else name
        inner = _resolve(content, root)
        entries = _resolve(inner.get("additionalProperties"), root)
        if "properties" in inner:
            yield from _walk(inner, root, here)
        elif "properties" in entries:
            yield from _walk(entries, root, f"{here}.{ANY_NAME}")
        else:
            yield Field(
                here, _type(content), _text(content.get("default")), _null(content.get("description", "")), content.get("paper", "")
            )


def _text(default: Any) -> str:
    """A default as written on the command line; quoted only if YAML would otherwise read it differently."""
    quoted = json.dumps(default, ensure_ascii=False)
    plain = quoted.replace('"', "")
    return plain if yaml.safe_load(plain) == default else quoted


def _null(description: str) -> str:
    return re.sub(r"\bNone\b", "null", description)


def _resolve(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(schema, dict):
        return {}
    return root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "const" in schema:
        return json.dumps(schema["const"]).strip('"')
    if "enum" in schema:
        return " or ".join(filter(None, [", ".join(schema["enum"][:-1]), schema["enum"][-1]]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"{{{_type(schema.get('propertyNames', {'type': 'string'}))}: {_type(schema['additionalProperties'])}}}"
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    return f"{kind} {bounds}".strip()
