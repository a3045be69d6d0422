"""Plain YAML with the line of every key: no tags, no anchors, no key twice, and `1e-4` is a number.

A date is text. Numbers are finite, and whole ones have at most 63 bits.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

_PLAIN = ("bool", "float", "int", "null", "merge")
_LARGEST = 2**63
_DEEPEST = 50
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class YamlError(ValueError):
    """Text that is not plain YAML."""


class _Loader(yaml.SafeLoader):
    """SafeLoader reads `1e-4` as text, as YAML 1.1 asks; YAML 1.2, and whoever writes it, mean a number."""

    # The parent's class attribute by its own name, which PyYAML reads and never writes: no ClassVar to declare.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] in _PLAIN]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in the file `path`, and the line (from 1) of every key in it, nested keys included.

    YamlError, with file and line: the file cannot be read, is not UTF-8, not YAML, or not a mapping; it has
    an anchor, alias, tag, a key that is not text, or a key twice in one mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise YamlError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise YamlError(f"{path}:{line}: is not UTF-8 text.") from None
    lines: dict[tuple[str, ...], int] = {}
    values = _parse(text, str(path), lines)
    if not isinstance(values, dict):
        raise YamlError(f"{path}: should be a mapping of sections (student: .., data: .., ..), and is not.")
    return values, lines


def parse_value(text: str) -> Any:
    """The value of one YAML text; refused as by `read_yaml`, with the line left out."""
    return _parse(text, None, {})


def _parse(text: str, name: str | None, lines: dict[tuple[str, ...], int]) -> Any:
    try:
        loader = _Loader(text)
        try:
            _refuse_bombs(text, name)
            node = loader.get_single_node()
            return None if node is None else _value(loader, node, (), name, lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = _place(name, error.problem_mark)
        raise YamlError(f"{place}is not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise YamlError(f"{_place(name, None)}is not valid YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise YamlError(f"{_place(name, None)}is nested too deeply.") from None


def _refuse_bombs(text: str, name: str | None) -> None:
    """Before anything is composed: a few lines of aliases can stand for gigabytes, and deep nesting takes minutes."""
    depth = 0
    for token in yaml.scan(text, Loader=_Loader):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _DEEPEST:
            raise YamlError(f"{_place(name, token.start_mark)}is nested too deeply.")
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
            what = "a tag (!)" if isinstance(token, yaml.TagToken) else "an anchor or alias (& or *)"
            place = _place(name, token.start_mark)
            raise YamlError(f"{place}has {what}, which settings cannot have; is it text that needs quotes?")


def _place(name: str | None, mark: yaml.Mark | None) -> str:
    if name is None:
        return "the value "
    return f"{name}: " if mark is None else f"{name}:{mark.line + 1}: "


def _value(
    loader: _Loader,
    node: yaml.Node,
    key: tuple[str, ...],
    name: str | None,
    lines: dict[tuple[str, ...], int],
) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, key, name, {}) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        place = _place(name, node.start_mark)
        try:
            value: Any = loader.construct_object(node)
        except ValueError as error:
            raise YamlError(f"{place}cannot be read: {error}.") from None
        named = place + (f"{'.'.join(key)} " if key else "")
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise YamlError(f"{named}has over 63 bits but should be a smaller number.")
        if isinstance(value, float) and not math.isfinite(value):
            raise YamlError(f"{named}is {value} but should be a finite number.")
        return value
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(name, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError(f"{place}has a key that is not text.")
        inner = (*key, key_node.value)
        if key_node.value in values:
            raise YamlError(f"{place}{'.'.join(inner)} is set twice; keep one.")
        lines[inner] = key_node.start_mark.line + 1
        values[key_node.value] = _value(loader, value_node, inner, name, lines)
    return values
