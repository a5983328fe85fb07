"""`BUILD` says the same as the tree: every module and test has its target, every dependency is there and is real.

Bazel's language is a part of Python's, so the file is run here with functions that write down what they are given.
"""

import ast
import graphlib
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "deeplab2_like"
# Where a package is imported by another name than it is installed by.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "grpc": "grpcio",
    "official": "tf-models-official",
    "orbit": "tf-models-official",
    "tensorflow_serving": "tensorflow-serving-api",
    "yaml": "pyyaml",
}


@pytest.fixture(scope="module")
def targets() -> dict[str, dict[str, Any]]:
    """All targets by name: the arguments they are declared with, and their `rule`."""
    found: dict[str, dict[str, Any]] = {}

    def rule(kind: str) -> Any:
        def declare(*, name: str, **arguments: Any) -> None:
            assert name not in found, f"BUILD declares the target '{name}' twice"
            found[name] = {"rule": kind, "srcs": [], "deps": [], **arguments}

        return declare

    rules = {kind: rule(kind) for kind in ("py_library", "py_binary", "py_test", "filegroup")}
    nothing = {"load": lambda *_: None, "package": lambda **_: None, "glob": lambda *_, **__: []}
    exec(compile((ROOT / "BUILD").read_text(), "BUILD", "exec"), {**rules, **nothing})
    return found


def python_files(folder: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}


def library_of(module: str, targets: dict[str, dict[str, Any]]) -> str | None:
    """Name of the library that holds a module given by its dotted name; None if there is none."""
    path = module.replace(".", "/")
    for name, target in targets.items():
        if target["rule"] == "py_library" and {f"{path}.py", f"{path}/__init__.py"} & set(target["srcs"]):
            return name
    return None


def statements(tree: ast.AST, *, in_functions: bool) -> Iterator[ast.AST]:
    """All nodes below `tree`; those inside functions, which run later or never, on request."""
    for node in ast.iter_child_nodes(tree):
        if in_functions or not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from statements(node, in_functions=in_functions)


def imported_modules(path: str, *, in_functions: bool) -> set[str]:
    """Dotted names of what a file imports; for `from a import b`, both `a` and `a.b`."""
    names = set()
    for node in statements(ast.parse((ROOT / path).read_text()), in_functions=in_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def label(distribution: str) -> str:
    """What Bazel calls an installed package."""
    return "@pypi//" + distribution.replace("-", "_").lower()


def declared(*extras: str) -> set[str]:
    """Labels of the requirements in pyproject.toml, and of those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {label(requirement.partition(">=")[0]) for requirements in lists for requirement in requirements}


def needed_dependencies(name: str, targets: dict[str, dict[str, Any]]) -> set[str]:
    """What a library's modules import: other libraries, unless inside functions, and installed packages.

    An optional package, which is in an extra only, is no dependency.
    """
    needed = set()
    for path in targets[name]["srcs"]:
        for module in imported_modules(path, in_functions=False):
            home = library_of(module, targets)
            if home not in (None, name):
                needed.add(f":{home}")
        for module in imported_modules(path, in_functions=True):
            root = module.partition(".")[0]
            is_ours = root == PACKAGE or (ROOT / "tests" / f"{root}.py").is_file()
            if not is_ours and root not in sys.stdlib_module_names:
                needed.add(label(DISTRIBUTIONS.get(root, root)))
    return needed - (declared("jax", "mlserver", "pretrained", "serving", "supervision") - declared())


def test_every_module_is_in_one_library(targets: dict[str, dict[str, Any]]) -> None:
    listed = Counter(path for target in targets.values() if target["rule"] == "py_library" for path in target["srcs"])
    in_package = {path for path in listed if path.startswith(f"{PACKAGE}/")}
    missing = sorted(python_files(PACKAGE) - in_package)
    assert not missing, "Add to the srcs of a py_library in BUILD: " + " ".join(f'"{path}",' for path in missing)
    gone = sorted(in_package - python_files(PACKAGE))
    assert not gone, f"Remove from BUILD, as there are no such files: {', '.join(gone)}"
    doubled = sorted(path for path, count in listed.items() if count > 1)
    assert not doubled, f"In more than one py_library in BUILD: {', '.join(doubled)}"


def test_every_subpackage_is_one_library(targets: dict[str, dict[str, Any]]) -> None:
    subpackages = sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py"))
    for name in subpackages:
        assert name in targets, f'Add to BUILD: py_library(name = "{name}", srcs = [...], ...)'
        folder = f"{PACKAGE}/{name}"
        assert set(targets[name]["srcs"]) == python_files(folder), f"BUILD: ':{name}' must hold all of {folder}"


def test_every_test_file_is_one_test(targets: dict[str, dict[str, Any]]) -> None:
    listed = Counter(
        path
        for target in targets.values()
        if target["rule"] == "py_test"
        for path in target["srcs"]
        if Path(path).name.startswith("test_")
    )
    files = {path for path in python_files("tests") if Path(path).name.startswith("test_")}
    missing = sorted(files - set(listed))
    assert not missing, "Add to TESTS in BUILD: " + " ".join(f'"{path}",' for path in missing)
    gone = sorted(set(listed) - files)
    assert not gone, f"Remove from TESTS in BUILD, as there are no such files: {', '.join(gone)}"
    assert set(listed.values()) == {1}


def test_what_tests_share_is_in_one_library(targets: dict[str, dict[str, Any]]) -> None:
    shared = {path for path in python_files("tests") if not Path(path).name.startswith("test_")}
    assert set(targets["test_support"]["srcs"]) == shared, "BUILD: srcs of ':test_support' must be: " + " ".join(
        f'"{path}",' for path in sorted(shared)
    )


def test_every_dependency_exists(targets: dict[str, dict[str, Any]]) -> None:
    known = declared("dev") | {f":{name}" for name in targets}
    for name, target in targets.items():
        unknown = sorted(set(target["deps"]) - known)
        assert not unknown, f"BUILD: deps of ':{name}' neither in BUILD nor in pyproject.toml: {', '.join(unknown)}"


def test_libraries_depend_on_what_they_import(targets: dict[str, dict[str, Any]]) -> None:
    for name in [name for name, target in targets.items() if target["rule"] == "py_library"]:
        needed = needed_dependencies(name, targets)
        if name == PACKAGE:  # The whole library: its commands import the rest when they run.
            others = {other for other, target in targets.items() if target["rule"] == "py_library"}
            needed |= {f":{other}" for other in others - {name, "test_support"}}
        lines = " ".join(f'"{dependency}",' for dependency in sorted(needed))
        assert sorted(targets[name]["deps"]) == sorted(needed), f"BUILD: deps of ':{name}' must be: {lines}"


def test_libraries_do_not_depend_on_themselves(targets: dict[str, dict[str, Any]]) -> None:
    graph = {f":{name}": target["deps"] for name, target in targets.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # Raises CycleError, naming the circle.
    assert set(graph) <= set(order)
