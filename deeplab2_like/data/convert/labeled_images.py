"""Shared by converters of images with label maps: pairs files, maps pixel values to classes, and makes records."""

import dataclasses
import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, Unpack

import cv2
import numpy as np

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.convert import common
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.exif import apply_orientation, find_orientation
from deeplab2_like.data.images import decode_image, encode_jpeg, encode_png, is_jpeg, list_images
from deeplab2_like.data.label_runs import find_run_values
from deeplab2_like.errors import UserError


class Named(Protocol):
    """An item to convert; `name` is the file name of its image, which becomes the `image_id` of its record."""

    @property
    def name(self) -> str:
        """The file name of the image, which may contain folders."""


NamedItem = TypeVar("NamedItem", bound=Named)


class LabelOptions(common.WriteOptions, total=False):
    """Options that users may choose for any source.

    Attributes:
        label_divisor: Factor between class and instance ids; None: that of the folder, or else the smallest that fits.
        max_side: Downscale images whose longer side has more pixels to this size; None: keep all sizes.
    """

    label_divisor: int | None
    max_side: int | None


def write_labeled_images(  # noqa: PLR0913 - converters pass their options through
    items: Sequence[NamedItem],
    load: Callable[[NamedItem, DatasetInfo], tuple[bytes, np.ndarray]],
    *,
    inputs_of: Callable[[NamedItem], Sequence[Path]],
    choices: Mapping[str, Any] | None = None,
    source: Sequence[Path],
    info: DatasetInfo,
    output_dir: Path,
    split: str,
    max_instances: int = 0,
    label_divisor: int | None = None,
    max_side: int | None = None,
    **options: Unpack[common.WriteOptions],
) -> common.ConversionReport:
    """Writes one split.

    Args:
        items: The images, in the order of the records.
        load: Returns the content of an item's image file and its panoptic map, int32 [H, W], encoded for the given
            `DatasetInfo`; raises `UserError` if the image or its label is faulty.
        inputs_of: The files that `load` reads for an item, the image first; see `common.write_split`.
        choices: Everything else that affects the results of `load`, except the classes, by name; must be JSON values.
        source: The files or folders that the user gave, see `common.write_split`; error messages name the first.
        info: The `DatasetInfo` of the source; its label divisor is ignored.
        output_dir: The record folder; several splits of a data set go to one folder.
        split: The split's name.
        max_instances: Largest number of instances of a class in any image, if known in advance.
        label_divisor: See `LabelOptions`.
        max_side: See `LabelOptions`.
        **options: See `common.write_split`.

    Returns:
        The numbers of written and skipped examples, and statistics.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    if max_side is not None and max_side < 1:
        raise UserError(f"max_side must be 1 or more, got {max_side}.")
    agreed = common.agree_on_dataset_info(
        info, output_dir=output_dir, split=split, max_instances=max_instances, label_divisor=label_divisor
    )

    def make_record(item: NamedItem) -> common.Record:
        try:
            image, panoptic = load(item, agreed)
            image = match_label_orientation(image, panoptic.shape, name=item.name)
            if max_side is not None:
                image, panoptic = downscale(image, panoptic, max_side, name=item.name)
            return common.make_labeled_record(image=image, panoptic=panoptic, filename=item.name, info=agreed)
        except UserError as error:
            raise common.fault_of_image(item.name, source[0], error) from error

    return common.write_split(
        items,
        make_record,
        info=agreed,
        output_dir=output_dir,
        split=split,
        source=source,
        inputs_of=inputs_of,
        options={"max_side": max_side, **(choices or {})},
        **options,
    )


def match_label_orientation(image: bytes, label_size: tuple[int, ...], *, name: str) -> bytes:
    """Turns an image to match its label.

    Some tools draw labels on the pixels as stored, others on the image turned by its EXIF orientation. If the two have
    different sizes, the size of the label decides.

    Args:
        image: The content of a whole image file.
        label_size: Height and width of its label.
        name: The file name for error messages.

    Returns:
        The same content, or a PNG file of the turned image.

    Raises:
        UserError: If the image has an orientation, and the size of the label does not decide.
    """
    orientation = find_orientation(image)
    if orientation == 1:
        return image
    stored = decode_image(image, name)
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


def downscale(image: bytes, panoptic: np.ndarray, max_side: int, *, name: str) -> tuple[bytes, np.ndarray]:
    """Downscales an image and its label if the longer side has more than `max_side` pixels.

    Args:
        image: The content of a whole image file.
        panoptic: int32 [H, W], panoptic map.
        max_side: Largest allowed length of the longer side, in pixels.
        name: The file name for error messages.

    Returns:
        The content of an image file (a JPEG if it was one, else a PNG), and a panoptic map, int32 [h, w], of its size.

    Raises:
        UserError: If the image cannot be decoded.
    """
    pixels = decode_image(image, name)
    height, width = pixels.shape[:2]
    # A label of another size is kept, so that `serialize_example` reports both sizes.
    if max(height, width) <= max_side or panoptic.shape != (height, width):
        return image, panoptic
    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))  # Width and height, as OpenCV expects.
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    panoptic = cv2.resize(panoptic, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return encode_jpeg(pixels) if is_jpeg(image) else encode_png(pixels), panoptic


def values_to_panoptic(
    values: np.ndarray, meaning: Callable[[int], tuple[int, bool] | None], info: DatasetInfo
) -> np.ndarray:
    """Converts a map of a data set's own values to a panoptic map.

    Instances of a class are numbered from 1 in the order of their values.

    Args:
        values: Integers [H, W]; equal values belong to the same segment.
        meaning: Returns for a value the contiguous class id and whether it is an instance of a thing class, otherwise
            it gets instance 0, like stuff and crowd regions; or None for void. Raises `UserError` for unknown values.
        info: The meaning of the panoptic map.

    Returns:
        int32 [H, W], panoptic map.

    Raises:
        UserError: If a value is unknown, or a class has too many instances for the label divisor.
    """
    lengths, (run_values,) = find_run_values(values.reshape(-1))
    present, index = np.unique(run_values, return_inverse=True)
    panoptic_values = np.full(present.size, info.void, np.int32)
    instances = [0] * info.num_classes
    for position, value in enumerate(present.tolist()):
        found = meaning(value)
        if found is None:
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


def pair_images(images: Path, labels: Path, *, ending: str = ".png") -> list[Pair]:
    """Pairs images with label PNGs of the same name, including those in subfolders.

    Args:
        images: Folder of the images.
        labels: Folder of the PNGs; may be the same.
        ending: Ending of a PNG's name, in place of the image's suffix.

    Returns:
        A pair for each image and for each PNG without an image, sorted by name; reading a missing file fails later.

    Raises:
        UserError: If a folder is missing, or there is no image.
    """
    common.require_folder(images, "image folder")
    common.require_folder(labels, "folder of label PNGs")
    pairs, stems = [], set()
    for image in list_images(images, recursive=True):
        if images == labels and image.name.endswith(ending):
            continue
        stem = image.relative_to(images).with_suffix("").as_posix()
        stems.add(stem)
        pairs.append(Pair(image.relative_to(images).as_posix(), image, labels / f"{stem}{ending}"))
    for label in labels.rglob(f"*{glob.escape(ending)}"):
        stem = label.relative_to(labels).as_posix().removesuffix(ending)
        if stem not in stems:
            pairs.append(Pair(stem, images / stem, label))
    return sorted(pairs, key=lambda pair: pair.name)
