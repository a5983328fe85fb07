"""Names of a package that are imported on first use, so that importing the package itself is quick."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a package.

    Args:
        package: The package's `__name__`.
        homes: Module that defines each name, absolute or relative to the package (`.system`).

    Returns:
        A function that imports the module of a name and returns the object; unknown names raise `AttributeError`.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(homes[name], package), name)

    return load
