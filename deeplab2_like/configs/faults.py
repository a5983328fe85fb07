"""Checks config sections with pydantic, and describes each fault in a sentence of the library.

Pydantic's own messages name Python's types and do not say what to do.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.errors import did_you_mean, shorten
from deeplab2_like.parsing import Number

_Section = TypeVar("_Section", bound=StrictModel)

# Of a value or a key in a message.
_MAX_LENGTH = 200
_MAX_NAMED = 5
# TensorFlow and NumPy have whole numbers of 64 bits.
_MAX_INT = 2**63 - 1

# Pydantic's type of an error -> the requirement, with the values of the error's context.
_REQUIREMENTS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a section of keys and values",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": f"must be at most {_MAX_INT}",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "model_type": "must be a section of keys and values",
    "string_type": "must be a string",
    "too_long": "must be a list of length {max_length}",  # No list has a largest length but those of one length.
    "too_short": "must be a list of length {min_length} or more",
    "tuple_type": "must be a list such as [512, 1024]",
    "wrong_length": "must be a list of length {length}",
}


class Fault(NamedTuple):
    """A fault of one config key.

    Attributes:
        keys: The key, from the section down; a number is a position in a list.
        kind: Pydantic's type of the error, such as `missing`; or `wrong_length`, of a list with too few entries.
        message: Pydantic's message.
        context: Pydantic's context of the error, such as the limit of a number.
        value: The value at the key.
        is_nullable: Whether the key may be null.
        own_keys: The keys of the section that the key should be; empty for other values.
        known: All keys of the section that the key is in.
    """

    keys: tuple[int | str, ...]
    kind: str
    message: str
    context: Mapping[str, Any]
    value: Any
    is_nullable: bool
    own_keys: Sequence[str]
    known: Sequence[str]


def check_section(
    section: type[_Section], content: Any, *, prefix: tuple[str, ...]
) -> tuple[_Section | None, Sequence[Fault]]:
    """Validates a section.

    Args:
        section: The class of the section.
        content: The content of the section, of any type.
        prefix: The path of the section in the config.

    Returns:
        The section, or None if it has faults, and all its faults.
    """
    try:
        checked = section.model_validate(_as_declared(content, section))
        return checked, [_too_large(keys, value, prefix) for keys, value in _find_large_numbers(checked)]
    except pydantic.ValidationError as error:
        faults = [_make_fault(section, details, prefix) for details in error.errors()]
        # One fault for a key: pydantic reports each entry that a list lacks, the last one last.
        return None, list({(fault.keys, fault.kind): fault for fault in faults}.values())


def _as_declared(value: Any, annotation: Any) -> Any:
    """Returns a value with its numbers as text where the type is text, and otherwise as plain numbers."""
    if isinstance(value, Number):
        # `str` or `str | None`, but not `dict[str, float]`.
        is_text = annotation is str or (get_origin(annotation) in (Union, UnionType) and str in get_args(annotation))
        return value.text if is_text else value.value
    if isinstance(value, list):
        return [_as_declared(item, None) for item in value]
    if isinstance(value, dict):
        section = _find_section(annotation)
        return {
            key.value if isinstance(key, Number) else key: _as_declared(item, _find_annotation(section, [str(key)]))
            for key, item in value.items()
        }
    return value


def _find_large_numbers(value: Any, keys: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], int]]:
    """Yields key and value of the whole numbers in a section that need more than 64 bits."""
    items: Iterable[tuple[int | str, Any]] = ()
    if isinstance(value, pydantic.BaseModel):
        items = value
    elif isinstance(value, tuple):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, int) and abs(value) > _MAX_INT:
        yield keys, value
    for key, item in items:
        yield from _find_large_numbers(item, (*keys, key))


def _too_large(keys: tuple[int | str, ...], value: int, prefix: tuple[str, ...]) -> Fault:
    requirement = f"must be between -{_MAX_INT} and {_MAX_INT}"
    return Fault((*prefix, *keys), "value_error", requirement, {}, value, False, (), ())


def _make_fault(section: type[StrictModel], details: Mapping[str, Any], prefix: tuple[str, ...]) -> Fault:
    kind, keys, context = details["type"], details["loc"], details.get("ctx", {})
    if kind == "missing" and isinstance(keys[-1], int):
        kind, keys, context = "wrong_length", keys[:-1], {"length": keys[-1] + 1}
    if kind == "invalid_key":  # Such as a number.
        kind, keys = "extra_forbidden", (*keys[:-1], str(keys[-1]))
    annotation = _find_annotation(section, keys)
    return Fault(
        keys=(*prefix, *keys),
        kind=kind,
        message=details["msg"].removeprefix("Value error, "),
        context=context,
        value=details["input"],
        is_nullable=type(None) in get_args(annotation),
        own_keys=_list_keys(annotation),
        known=_list_keys(_find_annotation(section, keys[:-1])),
    )


def describe_faults(faults: Sequence[Fault], find_source: Callable[[Fault], str]) -> str:
    """Describes faults, one sentence each, of which the first few are enough.

    Args:
        faults: The faults, at least one.
        find_source: Returns where the value of a fault comes from, such as "config 'mine.yaml'".
    """
    sentences = [describe_fault(fault, find_source(fault)) for fault in faults[:_MAX_NAMED]]
    if len(faults) > _MAX_NAMED:
        sentences.append(f"There are {len(faults) - _MAX_NAMED} more faults.")
    return " ".join(sentences)


def describe_fault(fault: Fault, source: str) -> str:
    """Describes a fault in one sentence.

    Args:
        fault: The fault.
        source: Where the value comes from, such as "config 'mine.yaml'".
    """
    key = _format_key(fault.keys)
    if fault.kind == "extra_forbidden":
        paths = {name: _format_key([*fault.keys[:-1], name]) for name in fault.known}
        suggestion = did_you_mean(str(fault.keys[-1]), fault.known, shown=paths)
        where = f" in '{_format_key(fault.keys[:-1])}'" if fault.keys[:-1] else ""
        return f"Unknown config key '{key}'.{suggestion} Known{where}: {', '.join(sorted(fault.known)) or 'none'}."
    if fault.kind == "missing":
        return f"Config key '{key}' is missing in {source}; set it there or with --set."
    if fault.keys[-1] == "[key]":  # Of a dictionary; the name before it is that key.
        key = _format_key(fault.keys[:-2])
        return f"Config key '{key}' in {source} has the key {_format_value(fault.value)}, but its keys must be strings."
    requirement = _describe_requirement(fault)
    is_section = isinstance(fault.value, dict)
    if not requirement.startswith("must "):
        return f"Config {'section' if is_section else 'key'} '{key}' in {source} is invalid: {requirement}."
    # A whole section as a value would bury the message.
    value = "" if is_section else f"is {_format_value(fault.value)}, but "
    return f"Config key '{key}' in {source} {value}{requirement}."


def _describe_requirement(fault: Fault) -> str:
    """Returns what the value must be, beginning with `must`; the message of a validator may begin with anything."""
    if fault.kind == "value_error":
        return fault.message
    if fault.kind not in _REQUIREMENTS:
        return f"must be valid ({fault.message})"
    # Limits of a float, such as 0.0, are written without a fraction; choices without `or`.
    context = {
        name: int(value) if isinstance(value, float) and value.is_integer() else str(value).replace(" or ", ", ")
        for name, value in fault.context.items()
    }
    requirement = _REQUIREMENTS[fault.kind].format(**context)
    null = ", or null" if fault.is_nullable else ""
    own_keys = f"; its keys are {', '.join(sorted(fault.own_keys))}" if fault.own_keys else ""
    return f"{requirement}{null}{own_keys}"


def _format_key(keys: Sequence[int | str]) -> str:
    """Formats a key, such as `data.crop_size[0]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
    return shorten(text, _MAX_LENGTH)


def _format_value(value: Any) -> str:
    """Formats a value as in YAML, with quotes around strings; of a long one the middle is left out."""
    if isinstance(value, list):
        text = f"[{', '.join(map(_format_value, value[:_MAX_LENGTH]))}]"
    elif value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    elif isinstance(value, int) and abs(value) > _MAX_INT:
        text = f"a number of {value.bit_length()} bits"  # Python refuses to print the longest numbers.
    else:
        text = repr(value) if isinstance(value, str) else str(value)
    return shorten(text, _MAX_LENGTH)


def _find_annotation(section: type[StrictModel] | None, keys: Sequence[int | str]) -> Any:
    """Returns the type of the key at the path `keys` in a section; None if there is no such key."""
    annotation: Any = section
    for key in keys:
        kind = _find_section(annotation)
        if kind is None or key not in kind.model_fields:
            return None
        annotation = kind.model_fields[str(key)].annotation
    return annotation


def _find_section(annotation: Any) -> type[StrictModel] | None:
    """Returns the section that a type is; a section that may be null is a union."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, StrictModel):
            return kind
    return None


def _list_keys(annotation: Any) -> list[str]:
    """Lists the keys of a section, given its type; empty for other types."""
    section = _find_section(annotation)
    return [] if section is None else list(section.model_fields)
