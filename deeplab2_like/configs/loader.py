"""Reads a config by name or from a file, applies overrides, and checks every key and value."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deeplab2_like.configs.faults import check_section, describe_faults
from deeplab2_like.configs.schema import Config, StrictModel
from deeplab2_like.configs.systems import find_config_class
from deeplab2_like.errors import UserError, did_you_mean, shorten
from deeplab2_like.files import read_file, require_local, write_atomically
from deeplab2_like.parsing import Number, parse_yaml

_FOLDER = Path(__file__).parent
_YAML_SUFFIXES = (".yaml", ".yml")
# Characters of a name or an override in a message.
_MAX_QUOTED = 300


def list_configs() -> list[str]:
    """Returns the names of the configs that come with the library, such as `panoptic_deeplab/scenes_tiny`."""
    return sorted(str(path.relative_to(_FOLDER).with_suffix("")) for path in _FOLDER.glob("*/*.yaml"))


def builtin_config_file(name: str) -> Path:
    """Returns the YAML file of a built-in config; the error for an unknown name suggests the closest ones."""
    if name not in list_configs():
        suggestion = did_you_mean(name, list_configs(), n=3)
        raise UserError(
            f"Unknown config '{shorten(name, _MAX_QUOTED)}'.{suggestion} `deeplab2-like configs` lists them."
        )
    return _FOLDER / f"{name}.yaml"


def load_config(name_or_file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Loads a config.

    A config may name another one under the key `base`, a built-in one or a file (relative to the folder of the file
    that names it); its own keys then replace those of the base one by one.

    Args:
        name_or_file: The name of a built-in config (see `list_configs`) or the path of a YAML file.
        overrides: Strings `key.path=value`; the value is read as YAML.

    Returns:
        The checked config.

    Raises:
        UserError: If the config does not exist, a key is unknown, or a value is not allowed.
    """
    content = _read(name_or_file, asked_by=())
    for override in overrides:
        _apply_override(content, override)
    source = f"config '{name_or_file}'"
    system = content.get("system")
    if system is None:
        raise UserError(f"{source[0].upper()}{source[1:]} has no key 'system'; add the name of the system to train.")
    config_class = find_config_class(system if isinstance(system, str) else _written(system))
    model_content = content.get("model")
    model, faults = check_section(config_class, {} if model_content is None else model_content, prefix=("model",))
    # A section with faults is replaced by an empty one, so that the faults of other sections are found, too.
    config, more_faults = check_section(Config, {**content, "model": model or StrictModel()}, prefix=())
    if config is None or faults or more_faults:
        raise UserError(
            describe_faults((*faults, *more_faults), lambda fault: _find_source(fault.keys, source, overrides))
        )
    return config


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes a config, fully resolved, as YAML (whole or not at all); `load_config` reads it back equal.

    Raises:
        UserError: If the file cannot be written.
    """
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def _read(name_or_file: str | os.PathLike[str], *, asked_by: tuple[str, ...]) -> dict[str, Any]:
    """Reads a YAML file, merged into the configs that it is based on, without checking keys.

    `asked_by` lists the configs that are based on this one, to find cycles.
    """
    name = str(name_or_file)
    require_local(name_or_file)
    if name in asked_by:
        raise UserError(
            f"Config '{name}' is based on itself through {' -> '.join(asked_by)}; remove one of these `base` keys."
        )
    path = Path(name_or_file)
    if path.suffix not in _YAML_SUFFIXES:
        path = builtin_config_file(name)
    if not path.is_file():
        raise UserError(f"Config file '{path}' does not exist; `deeplab2-like configs` lists the built-in ones.")
    try:
        content = parse_yaml(read_file(path, "Config file").decode())
    except UserError:
        raise
    except ValueError as error:  # Also of bytes that are not UTF-8.
        raise UserError(f"Config file '{path}' is not valid YAML: {str(error).rstrip('.')}.") from error
    if not isinstance(content, dict):
        raise UserError(f"Config file '{path}' must hold keys and values (system, data, model, trainer).")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"Key 'base' in '{path}' must be the name of a config or a YAML file, but is {_written(base)}.")
    require_local(base)
    if Path(base).suffix in _YAML_SUFFIXES:
        # Relative to the folder of the file that names it; normalized, so that a cycle comes back to the same name.
        base = os.path.normpath(path.parent / base)
    return _merge(_read(base, asked_by=(*asked_by, name)), content)


def _written(value: Any) -> str:
    """Returns a value of YAML as it is shown in messages."""
    return shorten(value.text if isinstance(value, Number) else repr(value), _MAX_QUOTED)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _split_override(override: str) -> tuple[tuple[str, ...], str]:
    """Returns the keys of an override, from the section down, and the text of its value."""
    path, separator, text = override.partition("=")
    keys = tuple(path.strip().split("."))
    if not separator or not all(keys):
        raise UserError(
            f"Override '{shorten(override, _MAX_QUOTED)}' must have the form key.path=value, such as "
            "trainer.steps=1000."
        )
    return keys, text


def _apply_override(content: dict[str, Any], override: str) -> None:
    keys, text = _split_override(override)
    quoted = shorten(override, _MAX_QUOTED)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"The value of override '{quoted}' is not valid YAML ({error}); quote it.") from error
    section = content
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise UserError(f"Override '{quoted}' fails: '{'.'.join(keys[:depth])}' is a value, not a section.")
    section[keys[-1]] = value


def _find_source(keys: Sequence[int | str], source: str, overrides: Sequence[str]) -> str:
    """Returns where the value of a key comes from: the last override that set it or a part of it, or else `source`."""
    for override in reversed(overrides):
        changed, _ = _split_override(override)
        shared = min(len(changed), len(keys))
        if changed[:shared] == tuple(map(str, keys[:shared])):
            return f"--set '{shorten(override, _MAX_QUOTED)}'"
    return source
