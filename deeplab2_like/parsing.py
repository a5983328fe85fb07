"""Parses JSON and YAML from any source: what is damaged or hostile is an error with a short message.

All of the library parses through here, because the parsers themselves can raise errors of many types, and a few
hundred bytes of YAML can stand for gigabytes.
"""

import dataclasses
import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from deeplab2_like.errors import shorten

# Limits of YAML. Built-in configs have some 100 values in 4 levels.
MAX_YAML_BYTES = 1_000_000
_MAX_DEPTH = 50
_MAX_VALUES = 20_000

_MAX_REASON = 300


def parse_json(content: str | bytes) -> Any:
    """Parses JSON.

    Args:
        content: The text, or its bytes in UTF-8, UTF-16 or UTF-32.

    Returns:
        The value. `NaN` and numbers such as 1e400 become floats that are not finite, and whole numbers may have any
        size, so check numbers before use, for example with `dataset_info.whole_number`.

    Raises:
        ValueError: If it is not JSON or is nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in YAML. Where text is expected, such as the name of a folder, it is the text.

    Attributes:
        text: The number as it is written, such as `007`.
        value: The value.
    """

    text: str
    value: int | float


def parse_yaml(content: str) -> Any:
    """Parses YAML.

    Dates stay text, and so do `yes`, `no`, `on` and `off`, which are read as true or false where that is expected.

    Args:
        content: The text.

    Returns:
        The value, of dictionaries, lists, strings, `Number`, booleans and None.

    Raises:
        ValueError: If it is not YAML, has a key twice, is nested too deeply, or is too large, aliases included.
    """
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES} characters")
    try:
        _check_size(content)
        return yaml.load(content, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from error
    except UnicodeError as error:  # Half of a character of two parts.
        raise ValueError("it has characters that are not Unicode text") from error


def _reason(error: yaml.YAMLError) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return shorten(" ".join(str(error).split()), _MAX_REASON)
    return f"{shorten(problem, _MAX_REASON)} in line {mark.line + 1}"


# The loader in C is ten times as fast, but some builds of PyYAML lack it.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TAG = "tag:yaml.org,2002:"
_BOOL, _INT, _FLOAT, _TIMESTAMP = (f"{_TAG}{name}" for name in ("bool", "int", "float", "timestamp"))
# The types of values, and `merge` for keys such as `<<`; None is that of unknown types, which are refused.
_TYPES = (*(f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")), None)


def _check_size(content: str) -> None:
    """Raises `ValueError` if YAML has too many values or levels; it does so before anything is built."""
    # Of the open collections, from the outermost one: the anchor, and the number of values so far.
    open_collections: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}  # Number of values of each anchor.
    total = 0
    for event in yaml.parse(content, Loader=_SafeLoader):
        start = total
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, start))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_collections.pop()
            if anchor is not None:
                sizes[anchor] = total - start
        elif isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if any(anchor == name for anchor, _ in open_collections):
                raise ValueError(f"'*{name[:50]}' stands for a value that it is a part of")
            total += sizes.get(name, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_collections) > _MAX_DEPTH:
            raise ValueError(f"it is nested in more than {_MAX_DEPTH} levels")
        if total > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES} values, those of aliases included")


class _Loader(_SafeLoader):
    """Makes the values that `parse_yaml` describes."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Makes a value; whatever fails for text that does not fit its tag is an error of YAML."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            problem = f"a value of the type !!{node.tag.removeprefix(_TAG)} cannot be read"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Makes a dictionary, and refuses a key that is there twice, of which one would be lost."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys: set[tuple[str, str]] = set()
        for key, _ in pairs:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.constructor.ConstructorError(
                        problem=f"it has the key '{key.value[:50]}' twice", problem_mark=key.start_mark
                    )
                keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Number | str:
        """Makes a number; text that only looks like one, such as `0x_`, stays text."""
        construct = self.construct_yaml_int if node.tag == _INT else self.construct_yaml_float
        try:
            return Number(node.value, construct(node))
        except (ValueError, OverflowError):
            if self.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag:
                raise  # It was tagged as a number.
            return node.value


# Only `true` and `false` are booleans, and dates are text.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for letter, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.yaml_constructors = {tag: make for tag, make in _SafeLoader.yaml_constructors.items() if tag in _TYPES}
_Loader.add_constructor(_INT, _Loader.construct_number)
_Loader.add_constructor(_FLOAT, _Loader.construct_number)
