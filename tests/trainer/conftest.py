"""Records of a few scenes, and what a small system leaves behind when it is trained on them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from one_convolution import one_convolution_config, one_convolution_registered

from deeplab2_like.data.convert.scenes import convert_scenes
from deeplab2_like.trainer.train import train


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    convert_scenes(train=8, val=2, size=(32, 64), output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with one_convolution_registered():
        yield


@pytest.fixture(scope="module")
def trained_folder(registered: None, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of the system of one convolution, checkpoints after steps 4 and 6. Copy before changing it."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    train(one_convolution_config(data={"path": str(records)}), folder)
    return folder
