"""`SYSTEMS`, the registry of systems. It holds names, so that configs are checked without importing networks."""

import pkgutil
from typing import Any, NamedTuple

from deeplab2_like.errors import unknown_name


class SystemEntry(NamedTuple):
    """Locations of a system's classes, as `module:name`; they are imported on first use.

    Attributes:
        system: A subclass of `deeplab2_like.model.PanopticSystem`.
        config: Its config class; the module must not import Keras.
    """

    system: str
    config: str


def _entry(folder: str, name: str) -> SystemEntry:
    package = f"deeplab2_like.model.{folder}"
    return SystemEntry(system=f"{package}.system:{name}", config=f"{package}.config:{name}Config")


SYSTEMS: dict[str, SystemEntry] = {
    "panoptic_deeplab": _entry("panoptic_deeplab", "PanopticDeepLab"),
    "panoptic_fpn": _entry("panoptic_fpn", "PanopticFPN"),
    "panoptic_fcn": _entry("panoptic_fcn", "PanopticFCN"),
    "lpsnet": _entry("lpsnet", "LPSNet"),
    "unifying": _entry("unifying", "Unifying"),
}


def check_system(name: str) -> None:
    """Raises `UserError`, listing the known names, unless a system is registered."""
    if name not in SYSTEMS:
        raise unknown_name("system", name, SYSTEMS)


def find_config_class(name: str) -> Any:
    """Returns the config class of a system; an unknown name lists the known ones."""
    check_system(name)
    return pkgutil.resolve_name(SYSTEMS[name].config)


def find_system(name: str) -> Any:
    """Returns the class of a system; an unknown name lists the known ones."""
    check_system(name)
    return pkgutil.resolve_name(SYSTEMS[name].system)
