"""YAML and JSON that people write, as plain values: bounded, no key twice, one message for all else.

The parsers of both raise whatever their code meets (a date of month 13 is a ValueError, a boolean of `x` a
KeyError), and a few lines of YAML aliases can stand for more values than memory holds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from metalm.errors import ConfigError
from metalm.regular_files import read_regular

MAX_BYTES = 4 << 20
MAX_VALUES = 200_000
"""In one file, with every alias written out."""
MAX_DEPTH = 64

_MERGE_TAG = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses what YAML would silently read as something else: a key given twice, of
    which the last would win, and numbers in base 60 (`1:30`) or 8 (`010`)."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _refuse_other_bases(node, value := int(super().construct_yaml_int(node)))
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        _refuse_other_bases(node, value := float(super().construct_yaml_float(node)))
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:  # `<<: *anchor`
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise ConfigError(f"a key is no plain word{key_node.start_mark}")
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _refuse_other_bases(node: yaml.ScalarNode, value: float) -> None:
    base = 60 if ":" in node.value else 8 if re.fullmatch(r"[-+]?0[0-7_]+", node.value) else 10
    if base != 10:
        raise ConfigError(
            f"YAML reads {node.value} in base {base}, as {value}: write the decimal number, "
            f"or put a text into quotes{node.start_mark}"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: it is missing, unreadable, no regular file, no YAML or no mapping.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not UTF-8: {error}") from None
    content = parse_yaml(text, f"config {path}")
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} must hold a mapping, not {type(content).__name__}")
    return content


def parse_yaml(text: str, origin: str) -> Any:
    """A YAML text as plain values.

    Args:
        text: the YAML.
        origin: what it is, for messages.

    Raises:
        ConfigError: it is no YAML or more than a config needs, or has a key twice or numbers in base 60 or 8.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = origin
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, MAX_DEPTH)
        return loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin} is nested too deeply (at most {MAX_DEPTH} levels)") from None
    except Exception as error:
        raise ConfigError(f"{origin} is not YAML: {error}") from None


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        ConfigError: it is missing, unreadable, no regular file, no JSON or no object.
    """
    try:
        content = json.loads(read_regular(path, MAX_BYTES), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{what} {path} is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{what} {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path} must hold an object, not {type(content).__name__}")
    return content


def _count_values(node: yaml.Node, counted: dict[int, int | None], depth: int) -> int:
    """Values under a node with aliases written out; each node is looked at once.

    Raises:
        ConfigError: too many, too deep, or a value inside itself.
    """
    if depth == 0:
        raise ConfigError(f"nested too deeply (at most {MAX_DEPTH} levels){node.start_mark}")
    known = counted.get(id(node), 0)
    if known is None:
        raise ConfigError(f"a value holds itself by an alias{node.start_mark}")
    if known:
        return known
    counted[id(node)] = None
    held: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        held = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        held = node.value
    total = 1 + sum(_count_values(part, counted, depth - 1) for part in held)
    if total > MAX_VALUES:
        raise ConfigError(f"its aliases stand for more than {MAX_VALUES:,} values{node.start_mark}")
    counted[id(node)] = total
    return total


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return content
