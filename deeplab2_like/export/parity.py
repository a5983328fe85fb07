"""Comparison of an export with the system it was made from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import tensorflow as tf

from deeplab2_like.data.images import encode_png, is_jpeg, list_images, read_image
from deeplab2_like.data.scenes import render_scene
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.inference import make_inference_function
from deeplab2_like.export.options import ExportOptions
from deeplab2_like.model.base import PanopticSystem

# Minimum share of equal pixels, and largest difference of a score. They are not 1 and 0, because devices may choose
# other algorithms with other rounding, and scores may be almost equal.
_MIN_AGREEMENT = 0.98
_MAX_SCORE_DIFFERENCE = 0.05

# Height and width of the generated images; no multiples of what networks need.
_GENERATED_SIZES = ((97, 131), (64, 75))


@dataclasses.dataclass(frozen=True, eq=False)
class ParityImage:
    """An image on which an export is compared with its system.

    Attributes:
        name: Its name in messages.
        pixels: uint8 [H, W, 3], RGB, upright.
        content: The same as a file.
    """

    name: str
    pixels: np.ndarray
    content: bytes


@dataclasses.dataclass(frozen=True)
class Parity:
    """How well a signature agrees with the system.

    Attributes:
        signature: The name of the signature.
        images: Number of images.
        agreement: Share of pixels that belong to equal segments in both, 0..1, in the worst image.
        score_difference: Largest difference of a segment's score.
    """

    signature: str
    images: int
    agreement: float
    score_difference: float

    def __str__(self) -> str:
        return f"{self.signature}: {100 * self.agreement:.2f} % of pixels, scores to {self.score_difference:.1e}"


def read_parity_images(folder: Path, options: ExportOptions, *, bit_depth: int | None = None) -> list[ParityImage]:
    """Reads images for the comparison.

    Args:
        folder: An image file, or a folder of images.
        options: The options of the export; with a fixed size, the images are resized to it.
        bit_depth: See `images.decode_image`.

    Raises:
        UserError: If there is no image, one cannot be read, or one has more pixels than the export allows.
    """
    found = []
    for file in list_images(folder):
        pixels = read_image(file, bit_depth=bit_depth)
        content = file.read_bytes()
        if options.size is not None and pixels.shape[:2] != options.size:
            pixels = cv2.resize(pixels, options.size[::-1], interpolation=cv2.INTER_AREA)
            content = b""
        if pixels.shape[0] * pixels.shape[1] > options.max_pixels:
            raise UserError(
                f"'{file}' has {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), more than the limit of "
                f"the export, {options.max_pixels}; leave it out, or raise the limit with --max-pixels."
            )
        found.append(ParityImage(f"'{file}'", pixels, content if is_jpeg(content) else encode_png(pixels)))
    return found


def generate_parity_images(options: ExportOptions) -> list[ParityImage]:
    """Renders images for the comparison, of the fixed size of the export or of two sizes."""
    images = []
    for index, (height, width) in enumerate((options.size,) if options.size else _GENERATED_SIZES):
        pixels = render_scene(index, height=max(height, 16), width=max(width, 16))[0][:height, :width]
        images.append(ParityImage(f"generated image {index}", pixels, encode_png(pixels)))
    return images


def check_parity(
    signatures: Mapping[str, Callable[..., Mapping[str, tf.Tensor]]],
    system: PanopticSystem,
    images: Sequence[ParityImage],
    *,
    flip: bool = False,
) -> list[Parity]:
    """Compares the signatures of a loaded export with the system, run eagerly, on each image.

    Args:
        signatures: The signatures by name; `metadata` is left out.
        system: The system that was exported.
        images: The images.
        flip: Whether the network sees the mirror images, too.

    Returns:
        The figures of each signature.

    Raises:
        RuntimeError: If a signature differs from the system.
    """
    infer = make_inference_function(system, flip=flip).python_function  # type: ignore[attr-defined]
    expected = [
        {name: value[0].numpy() for name, value in infer(tf.constant(image.pixels[None])).items()} for image in images
    ]
    figures = []
    for name in signatures:
        if name == "metadata":
            continue
        pairs = []
        for image, truth in zip(images, expected, strict=True):
            if name in ("serving_default", "compiled"):
                answer = signatures[name](images=tf.constant(image.pixels[None]))
            else:
                answer = signatures[name](image_bytes=tf.constant([image.content]))
            pairs.append(_compare({key: value[0].numpy() for key, value in answer.items()}, truth))
        figure = Parity(name, len(images), min(pair[0] for pair in pairs), max(pair[1] for pair in pairs))
        if figure.agreement < _MIN_AGREEMENT or figure.score_difference > _MAX_SCORE_DIFFERENCE:
            worst = images[int(np.argmin([pair[0] for pair in pairs]))]
            raise RuntimeError(
                f"Signature '{name}' of the exported model agrees with the system on only {100 * figure.agreement:.1f} "
                f"% of the pixels of {worst.name}, with scores that differ by up to {figure.score_difference:.3f}, so "
                "the export was discarded; this is a bug in the library."
            )
        figures.append(figure)
    return figures


def _compare(answer: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Returns the share of pixels that agree, and the largest difference of a score, for one image."""
    scores, expected_scores = _by_id(answer, "segment_score"), _by_id(expected, "segment_score")
    difference = max((abs(scores[i] - expected_scores[i]) for i in scores.keys() & expected_scores.keys()), default=0.0)
    panoptic = expected["panoptic"]
    if "panoptic" in answer:
        return float(np.mean(answer["panoptic"] == panoptic)), difference
    if "panoptic_png_bytes" in answer:
        png = np.frombuffer(answer["panoptic_png_bytes"], np.uint8)
        rgb = np.asarray(cv2.imdecode(png, cv2.IMREAD_COLOR_RGB), np.int32)
        return float(np.mean(rgb @ np.array([1, 256, 65536], np.int32) == panoptic)), difference
    areas = _by_id(answer, "segment_area")
    wrong = sum(abs(np.count_nonzero(panoptic == i) - areas.get(i, 0)) for i in scores.keys() | expected_scores.keys())
    return 1 - wrong / panoptic.size, difference


def _by_id(outputs: Mapping[str, np.ndarray], column: str) -> dict[int, float]:
    """Returns a column of the table by segment id, without unused rows, whose id is 0 as that of a segment may be."""
    used = outputs["segment_score"] > 0
    return dict(zip(outputs["segment_id"][used].tolist(), outputs[column][used].tolist(), strict=True))
