"""Reads untrusted YAML within bounds.

A few lines of YAML can expand to gigabytes: an alias repeats all that it refers to, and aliases may refer to aliases. The
expanded size is counted before anything is built.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES, MOST_NODES, MOST_NESTED = 4 << 20, 200_000, 64
NUMBERS, LONGEST_NUMBER = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), 100


class YamlError(ValueError):
    """A text is not valid YAML or is beyond a bound; the message says why, without the file's name."""


def read_yaml(text: str | bytes) -> Any:
    """The content of a YAML text: mappings, lists, texts and numbers; dates stay text, since a folder may be called 2024-01-01.

    Raises:
        YamlError: it cannot be read, or is larger than a config can be.
    """
    if len(text) > MOST_BYTES:
        raise YamlError(f"is larger than {MOST_BYTES >> 20} MiB")
    try:
        root = yaml.compose(text, Loader=_WithoutDates)
        if root is not None:
            _count(root)
        return _WithoutDates(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise YamlError(f"is not valid YAML: {reason}") from None


class _WithoutDates(yaml.SafeLoader):
    """Loader that reads dates as text."""


_WithoutDates.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _count(root: yaml.Node) -> None:
    """Raise YamlError if a text, with aliases expanded, has more than `MOST_NODES` nodes, is nested too deeply or contains itself."""
    sizes: dict[int, int] = {}  # of counted nodes, by identity: all aliases of a node are one object
    depths: dict[int, int] = {}
    above: set[int] = set()

    def visit(node: yaml.Node) -> None:
        mine = id(node)
        if mine in sizes:
            return
        if mine in above:
            raise YamlError("holds itself: an alias names something that it is a part of")
        if len(above) >= MOST_NESTED:
            raise YamlError(f"is nested more than {MOST_NESTED} levels deep")
        above.add(mine)
        if _is_leaf(node) and node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise YamlError(f"holds a number of {len(node.value):,} digits")  # whose reading takes time by their square
        inner = [each for pair in node.value for each in (pair if isinstance(pair, tuple) else (pair,))] if not _is_leaf(node) else []
        for each in inner:
            visit(each)
        above.remove(mine)
        sizes[mine] = 1 + sum(sizes[id(each)] for each in inner)
        depths[mine] = 1 + max((depths[id(each)] for each in inner), default=0)
        if sizes[mine] > MOST_NODES:
            raise YamlError(f"holds more than {MOST_NODES:,} values once its aliases are written out")
        if depths[mine] > MOST_NESTED:
            raise YamlError(f"is nested more than {MOST_NESTED} levels deep")

    visit(root)


def _is_leaf(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)
