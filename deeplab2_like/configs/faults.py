"""Checks config sections with pydantic, and describes each fault in a sentence of the library.

Pydantic's own messages name Python's types and do not say what to do.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import pydantic

from deeplab2_like.configs.schema import StrictModel

_Section = TypeVar("_Section", bound=StrictModel)

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
        return section.model_validate(content), []
    except pydantic.ValidationError as error:
        faults = [_make_fault(section, details, prefix) for details in error.errors()]
        # One fault for a key: pydantic reports each entry that a list lacks, the last one last.
        return None, list({(fault.keys, fault.kind): fault for fault in faults}.values())


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


def describe_fault(fault: Fault, source: str) -> str:
    """Describes a fault in one sentence.

    Args:
        fault: The fault.
        source: Where the value comes from, such as "config 'mine.yaml'".
    """
    key = _format_key(fault.keys)
    if fault.kind == "extra_forbidden":
        close = difflib.get_close_matches(str(fault.keys[-1]), fault.known, n=1)
        suggestion = f" Did you mean '{_format_key([*fault.keys[:-1], *close])}'?" if close else ""
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
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _format_value(value: Any) -> str:
    """Formats a value as in YAML, with quotes around strings."""
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def _find_annotation(section: type[StrictModel], keys: Sequence[int | str]) -> Any:
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
