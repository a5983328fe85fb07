"""Writes the synthetic scenes of `data/scenes` as records, for the demo, tests and experiments."""

from pathlib import Path

from deeplab2_like.data import scenes
from deeplab2_like.data.convert import common
from deeplab2_like.data.convert.labeled_images import format_choices
from deeplab2_like.data.records import LabelFormat
from deeplab2_like.errors import UserError

# Validation scenes are numbered from here, so that none of them is a training scene.
FIRST_VAL_INDEX = 1_000_000


def convert_scenes(
    *,
    train: int,
    val: int,
    size: tuple[int, int],
    output_dir: Path,
    seed: int = 0,
    shards: int | None = None,
    workers: int = 1,
    progress: common.Progress | None = None,
    replace: bool = False,
    label_format: LabelFormat = "png",
) -> tuple[common.ConversionReport, ...]:
    """Renders a training and a validation split.

    Args:
        train: Number of training scenes; with 0 there is no such split.
        val: Number of validation scenes; with 0 there is no such split.
        size: Height and width in pixels.
        output_dir: The record folder.
        seed: The seed of the random scenes.
        shards: Number of files per split; None: about one per 500 scenes.
        workers: Number of scenes rendered at once.
        progress: Called after each scene of a split with the number of scenes done and the total.
        replace: Whether to replace splits that were made from something else.
        label_format: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an argument is wrong, or the folder has another data set or one of the splits from another source.
    """
    if train < 0 or val < 0 or train + val == 0 or train > FIRST_VAL_INDEX:
        raise UserError(
            f"scenes needs train and val of 0 or more, not both 0, and train up to {FIRST_VAL_INDEX}; "
            f"got train {train}, val {val}."
        )
    height, width = size
    info = scenes.scenes_info()

    def make_record(index: int) -> common.Record:
        image, panoptic = scenes.render_scene(index, height=height, width=width, seed=seed)
        name = f"scene_{index:07d}.png"
        return common.make_labeled_record(
            image=image, panoptic=panoptic, filename=name, info=info, label_format=label_format
        )

    planned = [part for part in (("train", 0, train), ("val", FIRST_VAL_INDEX, val)) if part[2]]
    common.require_replaceable(Path(output_dir), {split: () for split, _, _ in planned}, replace=replace)
    reports = []
    for split, first, count in planned:
        agreed = common.agree_on_dataset_info(
            info, output_dir=Path(output_dir), split=split, max_instances=0, label_divisor=info.label_divisor
        )
        if agreed.categories != info.categories:
            raise UserError(f"'{output_dir}' holds records of another data set; choose another output folder.")
        reports.append(
            common.write_split(
                range(first, first + count),
                make_record,
                info=agreed,
                output_dir=Path(output_dir),
                split=split,
                shards=shards,
                workers=workers,
                progress=progress,
                replace=replace,
                inputs_of=lambda _: (),
                options={"seed": seed, "size": size, **format_choices(label_format)},
            )
        )
    return tuple(reports)
