"""The shape of a config: every field, its type, its default and what it means.

A system's own part (`model`) is declared in the system's file and is found through the registry of systems.
"""

from typing import Literal

import pydantic

from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local


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

    @pydantic.field_validator("path")
    @classmethod
    def _local_path(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                require_local(value)
            except UserError as error:
                raise ValueError(str(error).removesuffix(".")) from error
        return value

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
    clip_value: float | None = pydantic.Field(
        None, gt=0, description="Largest absolute value of an element of the gradient, after `clip_norm`."
    )
    multipliers: dict[str, pydantic.NonNegativeFloat] = pydantic.Field(
        {},
        description="Factors of the learning rate by part of the network, such as {backbone: 0.1, backbone/stem: 0}; "
        "the longest name that fits counts. 0 freezes a part: batch normalisation in it uses its stored statistics.",
    )


class ScheduleConfig(StrictModel):
    """The learning rate over time."""

    name: Literal["poly", "step", "cosine", "constant"] = pydantic.Field(
        "poly",
        description="`poly` and `cosine` fall to zero at `trainer.steps`; `step` falls at `boundaries`.",
    )
    power: float = pydantic.Field(0.9, gt=0, description="Exponent of `poly`.")
    boundaries: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (), description="Steps at which `step` multiplies the learning rate by `decay_factor`."
    )
    decay_factor: float = pydantic.Field(0.1, gt=0, lt=1, description="Factor of `step` at each boundary.")
    warmup_steps: int = pydantic.Field(
        0,
        ge=0,
        description="Steps over which a factor grows linearly to 1; it multiplies the decay, which starts at step 0 "
        "all the same.",
    )
    warmup_start: float = pydantic.Field(
        0.0,
        ge=0,
        le=1,
        description="Where that factor starts: step n of the warm-up, counted from 1, has "
        "warmup_start + (1 - warmup_start) * n / warmup_steps.",
    )

    @pydantic.field_validator("boundaries")
    @classmethod
    def _ordered_boundaries(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must grow from one step to the next")
        return value

    @pydantic.model_validator(mode="after")
    def _boundaries_of_step(self) -> "ScheduleConfig":
        if (self.name == "step") != bool(self.boundaries):
            raise ValueError("`boundaries` belong to the schedule `step`, which needs at least one")
        return self


class TrainerConfig(StrictModel):
    """How long and how to train."""

    steps: int = pydantic.Field(ge=1, description="Optimiser steps in all.")
    batch_size: int = pydantic.Field(ge=1, description="Images that are in memory at once, over all devices.")
    accumulate_steps: int = pydantic.Field(
        1,
        ge=1,
        description="Batches whose gradients are averaged for one optimiser step. It equals one batch as many times "
        "as large where a loss counts the same in every batch (its normalizer), and up to batch normalisation, which "
        "sees one batch at a time.",
    )
    learning_rate: float = pydantic.Field(gt=0, description="Peak learning rate.")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = pydantic.Field(
        "float32",
        description="Type of the network's activations; losses and weights are float32 always. `mixed_float16` scales "
        "the loss, and leaves out steps whose gradient overflows.",
    )
    ema_decay: float | None = pydantic.Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a running average of the weights, which then is what is evaluated and exported; in step "
        "n, counted from 0, it is at most (1 + n) / (10 + n). null: none.",
    )
    checkpoint_every: int = pydantic.Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = pydantic.Field(3, ge=1, description="How many of the newest checkpoints stay.")
    log_every: int = pydantic.Field(
        50,
        ge=1,
        description="Steps between two lines of the log and of TensorBoard, which are means over all steps since the "
        "line before; the last step logs, too.",
    )
    pictures_every: int | None = pydantic.Field(
        1000,
        ge=1,
        description="Steps between pictures of a few images of `data.val_split` in TensorBoard; the first ones come "
        "after `log_every` steps. null: none, as without such a split.",
    )
    evaluate_every: int | None = pydantic.Field(
        None,
        ge=1,
        description="Steps between evaluations on `data.val_split`, of which the checkpoint of the highest PQ is kept "
        "as `best`; also after the last step. null: none.",
    )
    seed: int = pydantic.Field(
        0, ge=0, le=2**32 - 1, description="Seed of initial weights, data order and augmentation."
    )
    strategy: Literal["one_device", "mirrored", "multi_worker", "tpu"] = pydantic.Field(
        "one_device",
        description="`one_device`; `mirrored` for all GPUs of this machine; `multi_worker` for those of several "
        "machines, which the environment variable TF_CONFIG names; `tpu`.",
    )
    tpu: str = pydantic.Field("local", description="Name or address of the TPU; `local` for that of this machine.")


class Config(StrictModel):
    """Everything that one run needs; `config.yaml` in a model folder is this, fully resolved."""

    system: str = pydantic.Field(description="Name of the system, a key of `deeplab2_like.model.SYSTEMS`.")
    data: DataConfig
    model: pydantic.SerializeAsAny[StrictModel] = pydantic.Field(description="The system's own part.")
    trainer: TrainerConfig
