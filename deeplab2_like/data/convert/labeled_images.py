"""Shared by converters of images with label maps: pairs files, maps pixel values to classes, and makes records."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import cv2
import numpy as np

from deeplab2_like import files
from deeplab2_like.data import panoptic_label
from deeplab2_like.data.convert import common
from deeplab2_like.data.convert.losses import DOWNSCALED, FAULTY, Losses
from deeplab2_like.data.convert.splits import NamedItem, share_out
from deeplab2_like.data.convert.unfinished import plans_of_source
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.exif import apply_orientation, find_orientation
from deeplab2_like.data.images import (
    LOSSY_SUFFIXES,
    decode_image,
    encode_jpeg,
    encode_png,
    is_jpeg,
    list_images,
    turn_upright,
)
from deeplab2_like.data.label_runs import find_run_values, list_segments
from deeplab2_like.data.records import LabelFormat
from deeplab2_like.errors import UserError


class OrphanError(UserError):
    """An item is an annotation without an image.

    Args:
        message: The fault.
        name: The name of its class for the user.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class LabelOptions(common.WriteOptions, total=False):
    """Options that users may choose for any source.

    Attributes:
        label_divisor: Factor between class and instance ids; None: that of the folder, or else the smallest that fits.
        max_side: Downscale images whose longer side has more pixels to this size; None: keep all sizes.
        bit_depth: Number of bits that images of more than 8 bits per channel use; None: found from their largest value.
        val_share: Share of the images that go to a split `val` instead, see `splits.share_out`.
        label_format: How records hold their labels: "png", or "raw" for DeepLab2, see `records.serialize_example`.
    """

    label_divisor: int | None
    max_side: int | None
    bit_depth: int | None
    val_share: float | None
    label_format: LabelFormat


def write_labeled_images(  # noqa: PLR0913 - converters pass their options through
    splits: Mapping[str, Sequence[NamedItem]],
    load: Callable[[NamedItem, DatasetInfo, Losses], tuple[bytes, np.ndarray]],
    *,
    inputs_of: Callable[[NamedItem], Sequence[Path]],
    choices: Mapping[str, Any] | None = None,
    source: Sequence[Path],
    info: DatasetInfo,
    output_dir: Path,
    max_instances: int = 0,
    notes: Sequence[str] = (),
    by_subsets: bool = False,
    label_divisor: int | None = None,
    max_side: int | None = None,
    bit_depth: int | None = None,
    val_share: float | None = None,
    label_format: LabelFormat = "png",
    **options: Unpack[common.WriteOptions],
) -> tuple[common.ConversionReport, ...]:
    """Writes one or more splits of a source.

    Args:
        splits: The images of each split, in the order of the records.
        load: Returns the content of an item's image file and its panoptic map, int32 [H, W], encoded for the given
            `DatasetInfo`, and counts what of the labels is not in it; raises `UserError` if the image or its label is
            faulty, and `OrphanError` if the item is an annotation without an image.
        inputs_of: The files that `load` reads for an item, the image first; see `common.write_split`.
        choices: Everything else that affects the results of `load`, except the classes, by name; must be JSON values.
        source: The files or folders that the user gave, see `common.write_split`; error messages name the first.
        info: The `DatasetInfo` of the source; its label divisor is ignored.
        output_dir: The record folder; several splits of a data set go to one folder.
        max_instances: Largest number of instances of a class in any image, if known in advance.
        notes: Sentences for the user on the choices that the converter made.
        by_subsets: Whether the images were divided by the subsets of the source, see `splits.split_by_subsets`.
        label_divisor: See `LabelOptions`.
        max_side: See `LabelOptions`.
        bit_depth: See `LabelOptions`.
        val_share: See `LabelOptions`.
        label_format: See `LabelOptions`.
        **options: See `common.write_split`.

    Returns:
        A report per split; the first has the notes.

    Raises:
        UserError: If an input is missing or faulty; splits that were written before stay.
    """
    if max_side is not None and max_side < 1:
        raise UserError(f"max_side must be 1 or more, got {max_side}.")
    splits = share_out(splits, val_share)
    division = "subsets" if by_subsets else None if val_share is None else f"val_share {val_share}"
    notes = [*notes, *_find_common_images(output_dir, splits, source, division)]
    on_error = options.get("on_error", "stop")
    common.require_replaceable(output_dir, dict.fromkeys(splits, source), replace=options.get("replace", False))

    def make_record(item: NamedItem, info: DatasetInfo) -> common.Record:
        losses = Losses(may_skip=common.may_skip_annotations(on_error))
        try:
            image, panoptic = load(item, info, losses)
            upright = match_label_orientation(image, panoptic.shape, name=item.name, bit_depth=info.bit_depth)
            losses.is_turned |= upright is not image
            label_size, objects = panoptic.size, _count_objects(panoptic, info) if max_side is not None else Counter()
            image, panoptic = fit_image_and_label(upright, panoptic, max_side, name=item.name, info=info)
            if max_side is not None:
                losses.rescale_pixels(panoptic.size / max(label_size, 1))
                for name, number in (objects - _count_objects(panoptic, info)).items():
                    losses.add(DOWNSCALED, name, objects=number)
            record = common.make_labeled_record(
                image=image,
                panoptic=panoptic,
                filename=item.name,
                info=info,
                losses=losses,
                label_format=label_format,
            )
        except OrphanError as error:
            losses.leave_out(UserError(f"'{source[0]}': {error}"), error.name)
            return common.Record(None, lost=losses.counts, skipped_annotations=losses.faults)
        except UserError as error:
            raise common.fault_of_image(item.name, source[0], error) from error
        faults = [str(common.fault_of_image(item.name, source[0], UserError(fault))) for fault in losses.faults]
        return dataclasses.replace(record, skipped_annotations=faults)

    reports: list[common.ConversionReport] = []
    for split, items in splits.items():
        class_notes = common.describe_classes(common.known_categories(output_dir, split), info, split)
        agreed = common.agree_on_dataset_info(
            info, output_dir=output_dir, split=split, max_instances=max_instances, label_divisor=label_divisor
        )
        if label_divisor is None and agreed.label_divisor != common.LABEL_DIVISORS[0]:
            class_notes.append(f"The label divisor is {agreed.label_divisor}; --label-divisor sets another one.")
        images = [path for item in items for path in inputs_of(item)[:1]]
        agreed = common.agree_on_bit_depth(agreed, images, output_dir=output_dir, split=split, bit_depth=bit_depth)
        report = common.write_split(
            items,
            functools.partial(make_record, info=agreed),
            info=agreed,
            output_dir=output_dir,
            split=split,
            source=source,
            inputs_of=inputs_of,
            options={
                **image_choices(max_side, agreed),
                **format_choices(label_format),
                "division": division,
                **(choices or {}),
            },
            **options,
        )
        reports.append(dataclasses.replace(report, notes=(*(() if reports else notes), *class_notes)))
    return tuple(reports)


def _find_common_images(
    output_dir: Path, splits: Collection[str], source: Sequence[Path], division: str | None
) -> list[str]:
    """Returns a warning if the record folder has other splits of a source that may hold the same images."""
    others = [
        split
        for split, plan in plans_of_source(output_dir, source).items()
        if split not in splits and (division is None or plan.get("division") != division)
    ]
    if not others:
        return []
    return [
        f"Warning: the split {', '.join(others)} in '{output_dir}' was made from the same files in another way, so it "
        f"may hold images of {', '.join(splits)}, too."
    ]


def _count_objects(panoptic: np.ndarray, info: DatasetInfo) -> Counter[str]:
    """Counts the objects of each thing class in a panoptic map, int32 [H, W], by class name."""
    values = list_segments(panoptic).values
    objects = values[values % info.label_divisor > 0] // info.label_divisor
    return Counter(info.categories[class_id].name for class_id in objects.tolist())


def image_choices(max_side: int | None, info: DatasetInfo) -> dict[str, Any]:
    """Returns what affects the pixels of records, for `common.write_split`."""
    return {"max_side": max_side, **({} if info.bit_depth is None else {"bit_depth": info.bit_depth})}


def format_choices(label_format: LabelFormat) -> dict[str, Any]:
    """Returns what affects the format of labels in records, for `common.write_split`."""
    return {} if label_format == "png" else {"label_format": label_format}


def set_upright(image: bytes, name: str, info: DatasetInfo, losses: Losses) -> bytes:
    """Turns an image by its EXIF orientation, where labels were drawn on the image as viewers show it.

    Args:
        image: The content of a whole image file.
        name: The file name for error messages.
        info: Gives the bit depth of the images.
        losses: Notes that the image was turned.

    Returns:
        The same content, or a PNG file of the turned image.

    Raises:
        UserError: If the image cannot be decoded.
    """
    upright = turn_upright(image, name, bit_depth=info.bit_depth)
    losses.is_turned |= upright is not image
    return upright


def fit_image_and_label(
    image: bytes, panoptic: np.ndarray, max_side: int | None, *, name: str, info: DatasetInfo
) -> tuple[bytes, np.ndarray]:
    """Turns an image to match its label, and downscales both to `max_side` if that is not None.

    Args:
        image: The content of a whole image file.
        panoptic: int32 [H, W], panoptic map.
        max_side: Largest allowed length of the longer side, in pixels; None: any.
        name: The file name for error messages.
        info: Gives the bit depth of the images.

    Returns:
        The content of an image file, and a panoptic map, int32 [h, w].

    Raises:
        UserError: If the image cannot be decoded, or its orientation is ambiguous.
    """
    image = match_label_orientation(image, panoptic.shape, name=name, bit_depth=info.bit_depth)
    if max_side is not None:
        image, panoptic = downscale(image, panoptic, max_side, name=name, bit_depth=info.bit_depth)
    return image, panoptic


def match_label_orientation(
    image: bytes, label_size: tuple[int, ...], *, name: str, bit_depth: int | None = None
) -> bytes:
    """Turns an image to match its label.

    Some tools draw labels on the pixels as stored, others on the image turned by its EXIF orientation. If the two have
    different sizes, the size of the label decides.

    Args:
        image: The content of a whole image file.
        label_size: Height and width of its label.
        name: The file name for error messages.
        bit_depth: See `images.decode_image`.

    Returns:
        The same content, or a PNG file of the turned image.

    Raises:
        UserError: If the image has an orientation, and the size of the label does not decide.
    """
    orientation = find_orientation(image)
    if orientation == 1:
        return image
    stored = decode_image(image, name, bit_depth=bit_depth)
    shown = apply_orientation(stored, orientation)
    if stored.shape != shown.shape:
        return encode_png(shown) if label_size == shown.shape[:2] else image
    if label_size == stored.shape[:2]:
        raise UserError(
            f"its EXIF orientation is {orientation}, and the size does not tell whether its label was drawn on the "
            "image as it is stored or as viewers show it; save the image without an orientation, turned (say with "
            "`mogrify -auto-orient`) or as it is stored (`exiftool -Orientation=`), whichever fits the label."
        )
    return image  # The sizes differ, which `serialize_example` reports.


def downscale(
    image: bytes, panoptic: np.ndarray, max_side: int, *, name: str, bit_depth: int | None = None
) -> tuple[bytes, np.ndarray]:
    """Downscales an image and its label if the longer side has more than `max_side` pixels.

    Args:
        image: The content of a whole image file.
        panoptic: int32 [H, W], panoptic map.
        max_side: Largest allowed length of the longer side, in pixels.
        name: The file name for error messages.
        bit_depth: See `images.decode_image`.

    Returns:
        The content of an image file (a JPEG if it was one, else a PNG), and a panoptic map, int32 [h, w], of its size.

    Raises:
        UserError: If the image cannot be decoded.
    """
    pixels = decode_image(image, name, bit_depth=bit_depth)
    height, width = pixels.shape[:2]
    # A label of another size is kept, so that `serialize_example` reports both sizes.
    if max(height, width) <= max_side or panoptic.shape != (height, width):
        return image, panoptic
    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))  # Width and height, as OpenCV expects.
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    panoptic = cv2.resize(panoptic, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return encode_jpeg(pixels) if is_jpeg(image) else encode_png(pixels), panoptic


@dataclasses.dataclass(frozen=True)
class Void:
    """The meaning of a value that becomes void although it is a label.

    Attributes:
        reason: Why, see `losses`.
        name: The name of the label for the user.
    """

    reason: str
    name: str


def values_to_panoptic(
    values: np.ndarray,
    meaning: Callable[[int], tuple[int, bool] | Void | None],
    info: DatasetInfo,
    losses: Losses | None = None,
    *,
    describe: Callable[[int], str] = "value {}".format,
) -> np.ndarray:
    """Converts a map of a data set's own values to a panoptic map.

    Instances of a class are numbered from 1 in the order of their values.

    Args:
        values: Integers [H, W]; equal values belong to the same segment.
        meaning: Returns for a value the contiguous class id and whether it is an instance of a thing class, otherwise
            it gets instance 0, like stuff and crowd regions; or None for void, or a `Void` whose pixels are counted.
            Raises `UserError` for unknown values.
        info: The meaning of the panoptic map.
        losses: Counts the pixels of each `Void`. Values that are left out as faulty become void.
        describe: Returns the name of a faulty value for the user.

    Returns:
        int32 [H, W], panoptic map.

    Raises:
        UserError: If a value is unknown, or a class has too many instances for the label divisor.
    """
    losses = Losses() if losses is None else losses
    lengths, (run_values,) = find_run_values(values.reshape(-1))
    present, index = np.unique(run_values, return_inverse=True)
    panoptic_values = np.full(present.size, info.void, np.int32)
    instances = [0] * info.num_classes
    for position, value in enumerate(present.tolist()):
        found: tuple[int, bool] | Void | None = Void(FAULTY, describe(value))
        with losses.skip_faulty():
            found = meaning(value)
        if isinstance(found, Void):
            losses.add(found.reason, found.name, pixels=int(lengths[index == position].sum()))
        if not isinstance(found, tuple):
            continue
        class_id, is_instance = found
        instances[class_id] += is_instance
        if instances[class_id] >= info.label_divisor:
            raise UserError(
                f"it has more than {info.label_divisor - 1} instances of '{info.categories[class_id].name}'; use a "
                f"label_divisor above {instances[class_id]}."
            )
        instance = instances[class_id] if is_instance else 0
        panoptic_values[position] = panoptic_label.encode(class_id, instance, info.label_divisor)
    return np.repeat(panoptic_values[index], lengths).reshape(values.shape)  # [H, W]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its label.

    Attributes:
        name: The image's file name, relative to the folder of the images.
        image: The image file.
        label: The label PNG.
    """

    name: str
    image: Path
    label: Path


def pair_images(images: Path, labels: Path, *, ending: str = ".png", image_ending: str = "") -> list[Pair]:
    """Pairs images with label PNGs of the same name, including those in subfolders.

    Args:
        images: Folder of the images.
        labels: Folder of the PNGs; may be the same.
        ending: Ending of a PNG's name, in place of the image's suffix.
        image_ending: Ending of an image's name before its suffix that the PNG's name lacks; other images do not count.

    Returns:
        A pair for each image and for each PNG without an image, sorted by name; reading a missing file fails later.

    Raises:
        UserError: If a folder is missing, there is no image, or the labels are of a lossy format.
    """
    common.require_folder(images, "image folder")
    common.require_folder(labels, "folder of label PNGs")
    label_files = sorted(path for path in files.walk(labels) if path.name.endswith(ending))
    if ending.lower().endswith(LOSSY_SUFFIXES):
        first = label_files[0] if label_files else labels / f"*{ending}"
        raise UserError(
            f"The label '{first}' is of a lossy format, which changes the values of pixels; export the labels as PNG."
        )
    pairs, stems = [], set()
    for image in list_images(images, recursive=True):
        stem = image.relative_to(images).with_suffix("").as_posix()
        if (images == labels and image.name.endswith(ending)) or not stem.endswith(image_ending):
            continue
        stem = stem.removesuffix(image_ending)
        stems.add(stem)
        label = labels / f"{stem}{ending}"
        if not label.exists():
            label = _find_lossy(label, image) or label  # Reading it fails with the reason.
        pairs.append(Pair(image.relative_to(images).as_posix(), image, label))
    for label in label_files:
        stem = label.relative_to(labels).as_posix().removesuffix(ending)
        if stem not in stems:
            pairs.append(Pair(stem, images / stem, label))
    return sorted(pairs, key=lambda pair: pair.name)


def _find_lossy(label: Path, image: Path) -> Path | None:
    """Returns the file of a lossy format that is there in place of a label, None if there is none."""
    candidates = [label.with_suffix(suffix) for suffix in LOSSY_SUFFIXES]
    return next((path for path in candidates if path != image and path.exists()), None)
