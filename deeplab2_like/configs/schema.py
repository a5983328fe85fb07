"""The schema of a config: every field, its type, its default and its meaning.

The `model` section is declared in the `config.py` of each system and found through the registry of systems.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeGuard

import pydantic

from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local


class StrictModel(pydantic.BaseModel):
    """A config section: immutable, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def was_saved_before(content: Any, new_key: str, *, saved_keys: Collection[str]) -> TypeGuard[dict[str, Any]]:
    """Returns whether a section was saved by an earlier version of the library, which did not know a key.

    A model folder must keep the behavior that it was trained with, even if the default of a new key differs from it.
    Its config has all keys of its version, so a section that lacks only newer keys comes from an earlier version. A
    user writes only some keys of a section, and gets the defaults of the others.

    Args:
        content: The section before it is checked; of any type.
        new_key: The key that the earlier version did not know.
        saved_keys: The keys that the section had before this key was added.
    """
    return isinstance(content, dict) and content.keys() >= set(saved_keys) and new_key not in content


class ColorJitterConfig(StrictModel):
    """Random changes of color, in the order of the fields; each value is the largest change, 0 for none."""

    brightness: float = pydantic.Field(0.0, ge=0, le=1, description="Colors are multiplied by 1 +- this.")
    contrast: float = pydantic.Field(
        0.0, ge=0, lt=1, description="Differences from the mean gray of the image are multiplied by 1 +- this."
    )
    saturation: float = pydantic.Field(
        0.0, ge=0, lt=1, description="Differences from the gray of each pixel are multiplied by 1 +- this."
    )
    hue: float = pydantic.Field(
        0.0, ge=0, le=0.5, description="Hue is rotated by +- this fraction of the color circle."
    )


class SideChoices(StrictModel):
    """Sizes of the shorter side, one of which is drawn for each image."""

    choices: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        min_length=1, description="Sizes in pixels, one of which is drawn for each image."
    )


class SideLimit(StrictModel):
    """A limit of the longer side."""

    max: pydantic.PositiveInt = pydantic.Field(
        description="Limit in pixels: an image whose longer side would exceed it is resized to this longer side."
    )


class ResizeConfig(StrictModel):
    """A size to which images are resized; they keep their aspect ratio."""

    shorter_side: pydantic.PositiveInt | tuple[pydantic.PositiveInt, pydantic.PositiveInt] | SideChoices | None = (
        pydantic.Field(
            None,
            description="Size of the shorter side, in pixels. In `data` also a range such as [640, 800] or choices "
            "such as {choices: [640, 672, 704]}, from which a size is drawn for each image.",
        )
    )
    longer_side: pydantic.PositiveInt | SideLimit | None = pydantic.Field(
        None,
        description="Without `shorter_side`, the size of the longer side, in pixels. With it, a limit of the longer "
        "side such as {max: 1333}, or null for none.",
    )

    @property
    def smallest_shorter_side(self) -> int | None:
        """The smallest size that `shorter_side` allows; None without it."""
        sides = self.shorter_side.choices if isinstance(self.shorter_side, SideChoices) else self.shorter_side
        return min(sides) if isinstance(sides, tuple) else sides

    def scales(self, shorter: Any, longer: Any, *, target: Any = None) -> list[Any]:
        """Returns one or two factors for an image; the smaller one resizes it.

        Args:
            shorter: Shorter side of the image, a number or a float tensor.
            longer: Longer side of the image, a number or a float tensor.
            target: A value of `shorter_side`, where that is a range or choices; by default the fixed size.
        """
        if self.longer_side is not None and not isinstance(self.longer_side, SideLimit):
            return [self.longer_side / longer]
        size: Any = self.shorter_side if target is None else target
        scale = size / shorter
        return [scale] if self.longer_side is None else [scale, self.longer_side.max / longer]

    @pydantic.field_validator("shorter_side", mode="wrap")
    @classmethod
    def _check_shorter_side(cls, value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> Any:
        # One sentence instead of pydantic's one for each member of the union.
        try:
            checked = handler(value)
        except pydantic.ValidationError as error:
            raise ValueError(
                "must be a size such as 800, a range such as [640, 800] or choices such as {choices: [640, 672, 704]}"
            ) from error
        if isinstance(checked, tuple) and checked[0] > checked[1]:
            raise ValueError("must be two sizes, the smaller one first")
        return checked

    @pydantic.field_validator("longer_side", mode="wrap")
    @classmethod
    def _check_longer_side(cls, value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except pydantic.ValidationError as error:
            raise ValueError("must be a size such as 1025 or a limit such as {max: 1333}") from error

    @pydantic.model_validator(mode="after")
    def _sides_fit_together(self) -> "ResizeConfig":
        if self.shorter_side is None and not isinstance(self.longer_side, int):
            raise ValueError("it needs a size, `shorter_side` such as 800 or `longer_side` such as 1025")
        if self.shorter_side is not None and isinstance(self.longer_side, int):
            raise ValueError(
                f"`longer_side: {self.longer_side}` sets the size alone; remove `shorter_side` or set a limit, "
                f"`longer_side: {{max: {self.longer_side}}}`"
            )
        smallest = self.smallest_shorter_side
        if smallest is not None and isinstance(self.longer_side, SideLimit) and self.longer_side.max < smallest:
            limit = self.longer_side.max
            raise ValueError(
                f"`longer_side: {{max: {limit}}}` is below the shorter side of {smallest}; set a limit of at least "
                f"{smallest}, or `longer_side: {limit}` without `shorter_side`"
            )
        return self


class DataConfig(StrictModel):
    """Records and the augmentation of training examples."""

    path: str | None = pydantic.Field(None, description="Folder of TFRecords written by `deeplab2-like convert`.")
    train_split: str = pydantic.Field("train", description="Split of the records to train on; `train+val` is both.")
    val_split: str = pydantic.Field("val", description="Split of the records to evaluate on.")
    crop_size: tuple[int, int] = pydantic.Field(description="Height and width of training crops, in pixels.")
    resize: ResizeConfig | None = pydantic.Field(
        None,
        description="Size to which a training image is resized first, such as {shorter_side: [640, 800], longer_side: "
        "{max: 1333}} or {longer_side: 1025}; `scale_range` multiplies it. null keeps the size of the image.",
    )
    scale_range: tuple[float, float] = pydantic.Field(
        (1.0, 1.0),
        description="Range of the random scale: a training image is resized by a factor from this range before it is "
        "cropped.",
    )
    scale_step: float | None = pydantic.Field(
        None,
        gt=0,
        description="Step between the possible scales: the smallest of `scale_range`, the smallest + 1 step and so on, "
        "up to the largest. null for any scale in the range.",
    )
    flip: bool = pydantic.Field(True, description="Flip half of the examples left to right.")
    dihedral: bool = pydantic.Field(
        False,
        description="Random rotations by 90 degrees and flips up to down, for images without a natural orientation.",
    )
    color_jitter: ColorJitterConfig = pydantic.Field(ColorJitterConfig(), description="Random changes of color.")

    @property
    def train_splits(self) -> list[str]:
        """The splits to train on."""
        return self.train_split.split("+")

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

    @pydantic.field_validator("train_split")
    @classmethod
    def _different_splits(cls, value: str) -> str:
        splits = value.split("+")
        if not all(splits) or len(set(splits)) < len(splits):
            raise ValueError("must be one split or several different ones joined by '+', such as train+val")
        return value

    @pydantic.field_validator("val_split")
    @classmethod
    def _one_split(cls, value: str) -> str:
        if "+" in value:
            raise ValueError("must be one split; several joined by '+' are for `train_split` only")
        return value

    @pydantic.field_validator("crop_size")
    @classmethod
    def _positive_crop(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("must be a height and a width of at least 1")
        return value

    @pydantic.field_validator("scale_range")
    @classmethod
    def _ordered_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller one first")
        return value

    @property
    def possible_scales(self) -> Sequence[float] | None:
        """The values of the random scale with `scale_step`; None without it."""
        if self.scale_step is None:
            return None
        smallest, largest = self.scale_range
        num_steps = round((largest - smallest) / self.scale_step)
        return [smallest + step * self.scale_step for step in range(num_steps + 1)]

    @pydantic.model_validator(mode="after")
    def _whole_steps(self) -> "DataConfig":
        scales = self.possible_scales
        if scales is not None and abs(scales[-1] - self.scale_range[1]) > 1e-3 * scales[-1]:
            smallest, largest = self.scale_range
            raise ValueError(
                f"`scale_step` {self.scale_step} does not lead from {smallest} to {largest} in whole steps; change it "
                "or `scale_range`"
            )
        return self


class OptimizerConfig(StrictModel):
    """The optimizer and the regularization."""

    name: Literal["adam", "sgd"] = pydantic.Field("adam", description="`adam` or `sgd`.")
    momentum: float = pydantic.Field(0.9, ge=0, lt=1, description="Momentum of SGD; Adam's betas stay 0.9 and 0.999.")
    weight_decay: float = pydantic.Field(
        0.0, ge=0, description="L2 penalty on kernels and biases; normalization parameters have none."
    )
    clip_norm: float | None = pydantic.Field(
        None, gt=0, description="Largest global norm of the gradient, which is summed over all devices first."
    )
    clip_value: float | None = pydantic.Field(
        None, gt=0, description="Largest absolute value of each element of the gradient; applied after `clip_norm`."
    )
    multipliers: dict[str, pydantic.NonNegativeFloat] = pydantic.Field(
        {},
        description="Factors of the learning rate by part of the network, such as {backbone: 0.1, backbone/stem: 0}; "
        "the longest matching name wins. 0 freezes a part, and its batch normalization uses the stored "
        "statistics.",
    )


class ScheduleConfig(StrictModel):
    """The learning rate schedule."""

    name: Literal["poly", "step", "cosine", "constant"] = pydantic.Field(
        "poly",
        description="`poly` and `cosine` decay to zero at `trainer.steps`; `step` decays at `boundaries`; `constant` "
        "does not decay.",
    )
    power: float = pydantic.Field(0.9, gt=0, description="Exponent of `poly`.")
    boundaries: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (), description="Steps at which `step` multiplies the learning rate by `decay_factor`."
    )
    decay_factor: float = pydantic.Field(0.1, gt=0, lt=1, description="Factor of `step` at each boundary.")
    warmup_steps: int = pydantic.Field(
        0,
        ge=0,
        description="Steps of the linear warm-up: a factor that grows to 1. It multiplies the decayed learning rate; "
        "the decay starts at step 0.",
    )
    warmup_start: float = pydantic.Field(
        0.0,
        ge=0,
        le=1,
        description="First value of that factor: step n of the warm-up, counted from 1, has warmup_start + (1 - "
        "warmup_start) * n / warmup_steps.",
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
    """Training: length, batches, precision, checkpoints."""

    steps: int = pydantic.Field(ge=1, description="Total optimizer steps.")
    batch_size: int = pydantic.Field(ge=1, description="Images per batch, over all devices.")
    accumulate_steps: int = pydantic.Field(
        1,
        ge=1,
        description="Batches whose gradients are averaged for one optimizer step, if memory is too small for one "
        "large batch. The result equals that of one larger batch if the loss normalizers of the batches "
        "are equal, except for batch normalization, which sees one batch at a time.",
    )
    learning_rate: float = pydantic.Field(gt=0, description="Peak learning rate.")
    optimizer: OptimizerConfig = pydantic.Field(OptimizerConfig(), description="Optimizer and regularization.")
    schedule: ScheduleConfig = pydantic.Field(ScheduleConfig(), description="Learning rate schedule.")
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = pydantic.Field(
        "float32",
        description="Dtype of the activations; losses and weights are always float32. `mixed_bfloat16` is for TPUs, "
        "recent GPUs and CPUs; `mixed_float16` is for older GPUs: it scales the loss and skips steps "
        "whose gradient overflows.",
    )
    ema_decay: float | None = pydantic.Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights, for instance 0.9999; the average is then evaluated and "
        "exported. In step n, counted from 0, the decay is at most (1 + n) / (10 + n). null for no "
        "average.",
    )
    checkpoint_every: int = pydantic.Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = pydantic.Field(3, ge=1, description="Number of newest checkpoints to keep.")
    log_every: int = pydantic.Field(
        50,
        ge=1,
        description="Steps between two lines of the log and of TensorBoard. Values are means over these steps; the "
        "last step is always logged.",
    )
    pictures_every: int | None = pydantic.Field(
        1000,
        ge=1,
        description="Steps between pictures of a few images of `data.val_split` in TensorBoard; the first pictures "
        "come after `log_every` steps. null for none; there are none without this split, either.",
    )
    evaluate_every: int | None = pydantic.Field(
        None,
        ge=1,
        description="Steps between evaluations on `data.val_split`, also after the last step; the checkpoint of the "
        "highest PQ is kept as `best`. null for none.",
    )
    seed: int = pydantic.Field(
        0, ge=0, le=2**32 - 1, description="Seed of initial weights, data order and augmentation."
    )
    strategy: Literal["one_device", "mirrored", "multi_worker", "tpu"] = pydantic.Field(
        "one_device",
        description="`one_device`; `mirrored` for all GPUs of this machine; `multi_worker` for those of several "
        "machines, named by the environment variable TF_CONFIG; `tpu`.",
    )
    tpu: str = pydantic.Field("local", description="Name or address of the TPU; `local` for that of this machine.")


class Config(StrictModel):
    """The settings of one run; `config.yaml` in a model folder holds them fully resolved."""

    system: str = pydantic.Field(description="Name of the system.")
    data: DataConfig = pydantic.Field(description="Records and augmentation.")
    model: pydantic.SerializeAsAny[StrictModel] = pydantic.Field(
        description="The network, losses and post-processing of the system."
    )
    trainer: TrainerConfig = pydantic.Field(description="Length, batches, precision, checkpoints.")
