"""The package as a user meets it: installed, imported, started from the command line, on another Keras backend."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import deeplab2_like

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", deeplab2_like.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(deeplab2_like, name).__name__ == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'deeplab2_like' has no attribute 'predictor_'"):
        deeplab2_like.predictor_  # noqa: B018


def test_importing_the_package_is_quick() -> None:
    loaded = run_python("-c", "import sys, deeplab2_like; print({'tensorflow', 'keras'} & set(sys.modules))")
    assert loaded.stdout.strip() == "set()", loaded.stderr


def test_loading_a_config_imports_no_heavy_package() -> None:
    program = (
        "import sys, deeplab2_like.configs as configs; configs.load_config('panoptic_deeplab/scenes_tiny'); "
        "print({'tensorflow', 'keras', 'cv2'} & set(sys.modules))"
    )
    loaded = run_python("-c", program)
    assert loaded.stdout.strip() == "set()", loaded.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["convert", "cityscapes", "--help"],
        ["train", "--config", "panoptic_deeplab/scenes_tiny", "--model-dir", "model", "--set", "trainer.stepz=1"],
        ["describe", "--config", "panoptic_deeplab/scenes_tiny", "--set", "trainer.stepz=1"],
        ["demo", "--set", "trainer.stepz=1"],
        ["configs"],
    ],
)
def test_help_and_wrong_configs_import_no_heavy_package(arguments: list[str]) -> None:
    program = (
        f"import sys, deeplab2_like.cli as cli; cli.main({arguments}); "
        "print({'tensorflow', 'keras', 'cv2', 'numpy', 'rich'} & set(sys.modules))"
    )
    ended = run_python("-c", program)
    assert ended.stdout.splitlines()[-1] == "set()", ended.stderr


def test_the_command_line_starts() -> None:
    started = run_python("-m", "deeplab2_like", "--help")
    assert started.returncode == 0, started.stderr
    for command in ("demo", "convert", "train", "evaluate", "export", "predict", "describe", "configs"):
        assert re.search(rf"^ +{command} ", started.stdout, re.MULTILINE), f"'{command}' is not in:\n{started.stdout}"


def test_the_installed_command_is_the_command_line(project: dict[str, Any]) -> None:
    module, _, function = project["scripts"]["deeplab2-like"].partition(":")
    assert getattr(importlib.import_module(module), function)(["--help"]) == 0


def test_the_version_is_told_once(project: dict[str, Any]) -> None:
    assert deeplab2_like.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").partition(".")[0]) < 77,
    reason="setuptools is older than the version that pyproject.toml asks for to build the package",
)
def test_a_wheel_holds_every_module_and_config(tmp_path: Path) -> None:
    # In a copy, as building leaves files beside the sources, and older ones would get into the wheel.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "deeplab2_like", source / "deeplab2_like", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path))
    built = run_python(*build, str(source))
    assert built.returncode == 0, built.stderr

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    # `pip wheel` builds in the folder itself, so the modules are counted where nothing was built.
    package = ROOT / "deeplab2_like"
    files = [path for kind in ("*.py", "*.yaml", "py.typed") for path in package.rglob(kind)]
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


# Runs a small network from image to panoptic map, then prints which of TensorFlow's packages were imported on the way.
NETWORK_WITHOUT_TENSORFLOW = """
import sys
import numpy as np
import deeplab2_like.model
from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import Category, DatasetInfo

assert "tensorflow" not in sys.modules, "import"
info = DatasetInfo("test", (Category(1, "stuff", False, (0, 0, 0)), Category(2, "thing", True, (9, 9, 9))))
system = deeplab2_like.model.build_system(load_config("panoptic_deeplab/scenes_tiny"), info)
outputs = system.postprocess(system(np.zeros((1, 45, 64, 3), np.uint8)), (45, 64))
assert "tensorflow" not in sys.modules, "network"
print("panoptic", outputs["panoptic"].shape, outputs["panoptic"].dtype)
"""


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed: pip install '.[jax]'")
def test_networks_do_without_tensorflow() -> None:
    ended = run_python("-c", NETWORK_WITHOUT_TENSORFLOW, KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "panoptic (1, 45, 64) int32"
