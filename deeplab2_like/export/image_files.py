"""Prediction of image files in memory, as servers receive them: of any sizes in one batch, and bad ones fail alone."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from deeplab2_like.data.exif import apply_orientation, find_orientation
from deeplab2_like.data.images import decode_image, encode_png
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.errors import UserError
from deeplab2_like.export.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image file in memory.

    Attributes:
        content: The content of a JPEG, PNG, BMP, GIF, WebP or TIFF file.
        name: Its name in messages.
    """

    content: bytes
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class ImageAnswer:
    """The prediction for one image file.

    Attributes:
        status: Empty, or why there is no prediction; all other fields are empty or 0 then.
        panoptic_png: A PNG of the panoptic map, `value = R + 256 G + 65536 B`; not of COCO's ids, which are value + 1.
        image_size: int32 [2], height and width of the map, after the photograph was turned by its EXIF orientation.
        segment_id: int32 [K], see `PanopticSystem.postprocess`, as are the other two.
        segment_class: int32 [K].
        segment_score: float32 [K].
    """

    status: str
    panoptic_png: bytes
    image_size: np.ndarray
    segment_id: np.ndarray
    segment_class: np.ndarray
    segment_score: np.ndarray


class ImageFilePredictor:
    """Predicts image files with an export; images of one size share a call of the model.

    Args:
        predictor: The export.
        workers: Number of threads that decode and encode; None: one per CPU core.
    """

    def __init__(self, predictor: Predictor, *, workers: int | None = None) -> None:
        self.predictor = predictor
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers=workers or os.cpu_count())

    def __call__(self, images: Sequence[ImageFile]) -> list[ImageAnswer]:
        """Predicts a batch; never raises for an image, whose status says what is wrong with it."""
        answers: list[ImageAnswer] = [_refusal("")] * len(images)
        by_size: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for index, pixels in enumerate(self._threads.map(self._decode, images)):
            if isinstance(pixels, str):
                answers[index] = _refusal(pixels)
            else:
                by_size.setdefault(pixels.shape, []).append((index, pixels))
        for same_size in by_size.values():
            rows = self._predict([pixels for _, pixels in same_size])
            for (index, _), row in zip(same_size, self._threads.map(_answer, rows), strict=True):
                answers[index] = row
        return answers

    def _decode(self, image: ImageFile) -> np.ndarray | str:
        """Returns the pixels, uint8 [H, W, 3], or what is wrong with the file."""
        try:
            pixels = decode_image(image.content, image.name, bit_depth=self.predictor.dataset_info.bit_depth)
            return apply_orientation(pixels, find_orientation(image.content))
        except UserError as error:
            return str(error)
        except MemoryError:
            return f"'{image.name}' needs more memory than there is; downscale it."

    def _predict(self, images: list[np.ndarray]) -> list[dict[str, np.ndarray] | str]:
        """Predicts images of one size; returns the outputs of each, or why there are none."""
        try:
            outputs = self.predictor.infer(np.stack(images))
        except (UserError, MemoryError) as error:
            if len(images) > 1:  # Too many for the memory, so one by one.
                return [row for image in images for row in self._predict([image])]
            return [str(error) or "The image needs more memory than there is; downscale it."]
        return [{key: value[row] for key, value in outputs.items()} for row in range(len(images))]


def _answer(outputs: dict[str, np.ndarray] | str) -> ImageAnswer:
    if isinstance(outputs, str):
        return _refusal(outputs)
    panoptic = outputs["panoptic"]
    return ImageAnswer(
        status="",
        panoptic_png=encode_png(ids_to_rgb(panoptic), is_label=True),
        image_size=np.array(panoptic.shape, np.int32),
        segment_id=outputs["segment_id"],
        segment_class=outputs["segment_class"],
        segment_score=outputs["segment_score"],
    )


def _refusal(status: str) -> ImageAnswer:
    none = np.zeros(0, np.int32)
    return ImageAnswer(status, b"", np.zeros(2, np.int32), none, none, none.astype(np.float32))
