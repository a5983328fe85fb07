"""The shape of a config: every field, its type, its default and what it means.

A system's own part (`model`) is declared in the system's file and is found through the registry of systems.
"""

from typing import Literal

import pydantic

from deeplab2_like.errors import UserError


class StrictModel(pydantic.BaseModel):
    """A config section: immutable, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ColorJitterConfig(StrictModel):
    """Random colour changes, in the order of the fields; each is the largest change, 0 switches it off."""

    brightness: float = pydantic.Field(0.0, ge=0, le=1, description="Colours are multiplied by 1 +- this.")
    contrast: float = pydantic.Field(
        0.0, ge=0, lt=1, description="Distances from the image's mean grey are multiplied by 1 +- this."
    )
    saturation: float = pydantic.Field(
        0.0, ge=0, lt=1, description="Distances from each pixel's own grey are multiplied by 1 +- this."
    )
    hue: float = pydantic.Field(0.0, ge=0, le=0.5, description="Hue is turned by +- this part of the colour circle.")


class DataConfig(StrictModel):
    """Which records are read and how training examples are varied."""

    path: str | None = pydantic.Field(None, description="Folder of TFRecords written by `deeplab2-like convert`.")
    train_split: str = "train"
    val_split: str = "val"
    crop_size: tuple[int, int] = pydantic.Field(description="Height and width of training crops, in pixels.")
    scale_range: tuple[float, float] = pydantic.Field((1.0, 1.0), description="Range of the random scale.")
    flip: bool = pydantic.Field(True, description="Mirror left to right, in half of the examples.")
    dihedral: bool = pydantic.Field(
        False, description="Random quarter turns and mirroring up to down; for images without a natural 'up'."
    )
    color_jitter: ColorJitterConfig = ColorJitterConfig()

    @property
    def record_folder(self) -> str:
        """The value of `path`; raises `UserError` if it is not set."""
        if self.path is None:
            raise UserError(
                "Config key 'data.path' is not set; give a folder that `deeplab2-like convert` wrote, as with "
                "--set data.path=DIR."
            )
        return self.path

    @pydantic.field_validator("crop_size")
    @classmethod
    def _positive_crop(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("height and width must be at least 1")
        return value

    @pydantic.field_validator("scale_range")
    @classmethod
    def _ordered_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller one first")
        return value


class OptimizerConfig(StrictModel):
    """The optimiser."""

    name: Literal["adam", "sgd"] = "adam"
    momentum: float = pydantic.Field(0.9, ge=0, lt=1, description="Momentum of SGD; Adam's betas stay 0.9 and 0.999.")
    weight_decay: float = pydantic.Field(
        0.0, ge=0, description="L2 penalty on kernels and biases, never on normalisation parameters."
    )
    clip_norm: float | None = pydantic.Field(
        None, gt=0, description="Largest global norm of the gradient, after summing over replicas."
    )


class ScheduleConfig(StrictModel):
    """The learning rate over time."""

    power: float = pydantic.Field(0.9, gt=0, description="Exponent of the 'poly' decay to zero.")
    warmup_steps: int = pydantic.Field(
        0,
        ge=0,
        description="Steps over which a factor grows linearly from 1 / warmup_steps to 1; it multiplies the decay, "
        "which starts at step 0 all the same.",
    )


class TrainerConfig(StrictModel):
    """How long and how to train."""

    steps: int = pydantic.Field(ge=1, description="Optimiser steps in all.")
    batch_size: int = pydantic.Field(ge=1, description="Images per step over all devices.")
    learning_rate: float = pydantic.Field(gt=0, description="Peak learning rate.")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["float32", "mixed_bfloat16"] = pydantic.Field(
        "float32", description="Type of the network's activations; losses and weights are float32 always."
    )
    checkpoint_every: int = pydantic.Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = pydantic.Field(3, ge=1, description="How many of the newest checkpoints stay.")
    log_every: int = pydantic.Field(
        50,
        ge=1,
        description="Steps between two lines of the log and of TensorBoard; checkpoints and the last step log, too.",
    )
    seed: int = pydantic.Field(
        0, ge=0, le=2**32 - 1, description="Seed of initial weights, data order and augmentation."
    )
    strategy: Literal["one_device", "mirrored"] = pydantic.Field(
        "one_device", description="`one_device`, or `mirrored` for all GPUs of this machine."
    )


class Config(StrictModel):
    """Everything that one run needs; `config.yaml` in a model folder is this, fully resolved."""

    system: str = pydantic.Field(description="Name of the system, a key of `deeplab2_like.model.SYSTEMS`.")
    data: DataConfig
    model: pydantic.SerializeAsAny[StrictModel] = pydantic.Field(description="The system's own part.")
    trainer: TrainerConfig
