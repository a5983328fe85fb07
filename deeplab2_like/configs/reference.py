"""Generates texts about configs from the schema: lists, annotated YAML, and the key tables of the guides.

`python -m deeplab2_like.configs.reference docs/*.md` rewrites the key tables between the lines

    <!-- keys: model of panoptic_fcn -->
    <!-- end of keys -->
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from deeplab2_like.configs.loader import builtin_config_file, list_configs, load_config
from deeplab2_like.configs.schema import DataConfig, StrictModel, TrainerConfig
from deeplab2_like.configs.systems import find_config_class

_TABLE = re.compile(r"(<!-- keys: (\w+)(?: of (\w+))? -->\n).*?(<!-- end of keys -->)", re.DOTALL)
_COMMENT_WIDTH = 100


def list_config_summaries() -> list[dict[str, str]]:
    """Lists the built-in configs.

    Returns:
        For each config: `name`; `backbone`; `machine`, CPU or accelerators; and `summary`, the first line of its file,
        with data set and expected quality.
    """
    summaries = []
    for name in list_configs():
        config: Any = load_config(name)
        summary = builtin_config_file(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        backbone = config.model.backbone.name
        machine = (
            "CPU"
            if backbone in ("resnet_tiny", "efficientnet_lite0")
            else f"accelerators, batch {config.trainer.batch_size}"
        )
        summaries.append({"name": name, "backbone": backbone, "machine": machine, "summary": summary})
    return summaries


def annotate_config(name_or_file: str, overrides: list[str] | None = None) -> str:
    """Writes a config as YAML, fully resolved, with the meaning of each key as a comment above it.

    Args:
        name_or_file: As for `load_config`.
        overrides: As for `load_config`.

    Returns:
        The text, which `load_config` reads back equal from a file.
    """
    config = load_config(name_or_file, overrides or [])
    return "\n".join(_annotated_lines(config, indent=0)) + "\n"


def _annotated_lines(section: pydantic.BaseModel, indent: int) -> Iterator[str]:
    margin = " " * indent
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        text = field.description or _summary(type(value))
        yield from textwrap.wrap(text, _COMMENT_WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
        if isinstance(value, StrictModel):
            yield f"{margin}{key}:"
            yield from _annotated_lines(value, indent + 2)
        else:
            yield f"{margin}{key}: {_yaml_value(section.model_dump(mode='json')[key])}"


def key_table(section: type[StrictModel], prefix: str) -> str:
    """Makes a Markdown table of all keys of a config section: key, default, meaning.

    Args:
        section: The class of the section.
        prefix: The path of the section, such as `model`.
    """
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, meaning in _key_rows(section, prefix):
        rows.append(f"| `{key}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def _key_rows(section: type[StrictModel], prefix: str, values: Any = None) -> Iterator[tuple[str, str, str]]:
    """Yields path, default and meaning of each key; `values` has the defaults that the enclosing section sets."""
    for key, field in section.model_fields.items():
        path = f"{prefix}.{key}"
        default = field.get_default(call_default_factory=True) if values is None else getattr(values, key)
        inner = _inner_section(field.annotation)
        if isinstance(default, StrictModel):
            yield from _key_rows(type(default), path, default)
            continue
        required = values is None and field.is_required()
        shown = "required" if required else f"`{_yaml_value(_plain(default))}`"
        yield path, shown, field.description or ""
        if inner is not None and default is None:
            yield from _key_rows(inner, path)


def undescribed_keys(section: type[StrictModel], prefix: str) -> list[str]:
    """Lists the keys of a section and its subsections that have no description."""
    return [path for path, _, meaning in _key_rows(section, prefix) if not meaning]


def write_key_tables(text: str) -> str:
    """Replaces the key tables of a guide with those of the current schema.

    Args:
        text: The guide, with the lines that the module's docstring shows.

    Returns:
        The guide with current tables.
    """

    def table(match: re.Match[str]) -> str:
        begin, part, system, end = match.groups()
        sections: dict[str, type[StrictModel]] = {"data": DataConfig, "trainer": TrainerConfig}
        section = find_config_class(system) if system else sections[part]
        return f"{begin}{key_table(section, part)}{end}"

    return _TABLE.sub(table, text)


def _inner_section(annotation: Any) -> type[StrictModel] | None:
    """Returns the section of a key that is a section or null; a key that may also be a value describes both itself."""
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    is_section = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], StrictModel)
    return kinds[0] if is_section else None


def _summary(kind: type) -> str:
    """Returns the first line of a class's docstring."""
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _plain(value: Any) -> Any:
    """Turns tuples into lists, as YAML has no tuples."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _yaml_value(value: Any) -> str:
    """Writes a value in one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
        .removesuffix("...\n")
        .strip()
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        guide = Path(argument)
        guide.write_text(write_key_tables(guide.read_text(encoding="utf-8")), encoding="utf-8")
