"""Prediction with an exported model: of single images in Python, or of files, to pictures and COCO panoptic files.

Needs TensorFlow to load the SavedModel, but neither Keras nor the code of the systems.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import find_bit_depth, list_images, read_image, write_png
from deeplab2_like.errors import UserError, enough_memory, unknown_name
from deeplab2_like.evaluation.coco_format import CocoPanopticWriter, segments_info
from deeplab2_like.export.versions import MODEL_FILE, newest_export
from deeplab2_like.files import distinct_names, image_ids_of_names, literal_folder, require_local
from deeplab2_like.temporary import remove_leftovers
from deeplab2_like.visualize import draw_overlay, side_by_side


@dataclasses.dataclass(frozen=True)
class Segment:
    """One segment of a prediction.

    Attributes:
        id: Its id in COCO panoptic PNG and JSON files, which is its value in the panoptic map + 1.
        category_id: The data set's id of its class.
        category_name: The name of its class.
        is_thing: Whether it is a countable object.
        score: Confidence of the model, 0 or more.
        area: Number of pixels.
        bbox: Tight box y_min, x_min, y_max, x_max in pixels; the maxima are exclusive (height is y_max - y_min). COCO
            files have COCO's x, y, width, height instead.
    """

    id: int
    category_id: int
    category_name: str
    is_thing: bool
    score: float
    area: int
    bbox: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class PanopticPrediction:
    """The prediction for one image.

    Attributes:
        panoptic: int32 [H, W], panoptic map, see `DatasetInfo`.
        segments: The segments of the map in ascending order of their ids, without void.
        dataset_info: The meaning of the map.
    """

    panoptic: np.ndarray
    segments: tuple[Segment, ...]
    dataset_info: DatasetInfo

    @property
    def scores(self) -> dict[int, float]:
        """The score of each segment by its value in the panoptic map, as `CocoPanopticWriter.add` expects."""
        return {segment.id - 1: segment.score for segment in self.segments}

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Draws the prediction over its image, uint8 [H, W, 3]; returns uint8 [H, W, 3]."""
        return draw_overlay(image, self.panoptic, self.dataset_info)

    def save_coco(self, output_dir: str | os.PathLike[str], file_name: str, image_id: int | str | None = None) -> Path:
        """Writes `OUTPUT_DIR/panoptic.json` for this image alone, and its PNG into `OUTPUT_DIR/panoptic/`.

        For several images in one JSON use `predict_files` or `CocoPanopticWriter`.

        Args:
            output_dir: The folder; created if missing.
            file_name: The image's file name; that of the PNG has the suffix `.png` instead.
            image_id: The data set's id of the image; by default the file name without suffix.

        Returns:
            The path of the JSON.

        Raises:
            UserError: If the name leads out of the folder, or a file cannot be written.
        """
        image_id = Path(file_name).stem if image_id is None else image_id
        with CocoPanopticWriter(output_dir, self.dataset_info) as writer:
            writer.add(image_id, file_name, self.panoptic, scores=self.scores)
        return writer.json_file


def make_prediction(panoptic: np.ndarray, scores: Mapping[int, float], dataset_info: DatasetInfo) -> PanopticPrediction:
    """Makes a prediction from a panoptic map.

    Args:
        panoptic: int32 [H, W], panoptic map.
        scores: Panoptic value -> score, for the segments that have one; the others have score 0.
        dataset_info: The meaning of the map.

    Returns:
        The prediction.

    Raises:
        UserError: If the map holds an unknown class.
    """
    described = segments_info(panoptic, dataset_info, scores=scores)
    return PanopticPrediction(panoptic, tuple(_make_segment(entry, dataset_info) for entry in described), dataset_info)


def _make_segment(described: Mapping[str, Any], dataset_info: DatasetInfo) -> Segment:
    """Converts an entry of `segments_info` to a `Segment`."""
    x, y, width, height = described["bbox"]
    category = dataset_info.categories[dataset_info.class_of_category_id[described["category_id"]]]
    return Segment(
        id=described["id"],
        category_id=category.id,
        category_name=category.name,
        is_thing=category.is_thing,
        # Scores that round to zero are left out of the entry.
        score=described.get("score", 0.0),
        area=described["area"],
        bbox=(y, x, y + height, x + width),
    )


class Predictor:
    """An exported model, which can be called with images of any size.

    Example:
        predictor = Predictor("models/panoptic")
        prediction = predictor(image)  # uint8 [H, W, 3], RGB
        prediction.draw(image)

    Attributes:
        dataset_info: The meaning of the predicted maps.

    Args:
        exported_dir: An export, or a folder of versions that `deeplab2-like export` wrote, of which the newest is
            used.
        compiled: Use the post-processing compiled by XLA: faster for many images of one size, but each new size is
            compiled first and stays in memory. It needs an export made with `xla`, see `ExportOptions`.

    Raises:
        UserError: If the folder is not an export, or is damaged.
    """

    def __init__(self, exported_dir: str | os.PathLike[str], *, compiled: bool = False) -> None:
        require_local(exported_dir)
        folder = find_export(Path(exported_dir))
        self.dataset_info = DatasetInfo.load(folder)
        # TensorFlow raises errors of many types for damaged files.
        try:
            with literal_folder(folder) as readable:
                self._model = tf.saved_model.load(str(readable))
        except (OSError, ValueError, RuntimeError, LookupError, AttributeError, tf.errors.OpError) as error:
            raise UserError(
                f"The exported model '{folder}' is damaged ({_first_line(error)}); export it again."
            ) from error
        name = "compiled" if compiled else "serving_default"
        if name not in self._model.signatures:
            command = "deeplab2-like export --xla" if compiled else "deeplab2-like export"
            raise UserError(f"'{folder}' has no signature '{name}'; export the model again with `{command}`.")
        self._infer = self._model.signatures[name]

    def __call__(self, image: np.ndarray) -> PanopticPrediction:
        """Predicts one image.

        Args:
            image: uint8 [H, W, 3], RGB, at least one pixel.

        Returns:
            The prediction, with the image's size.

        Raises:
            UserError: If the image has another type or shape, or memory is insufficient for its size.
        """
        if not isinstance(image, np.ndarray):
            raise UserError(f"An image must be a NumPy array, uint8 [H, W, 3], but is a {type(image).__name__}.")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
            raise UserError(
                f"An image must be uint8 [H, W, 3] (RGB, 0..255) of one pixel or more, but has type {image.dtype} and "
                f"shape {image.shape}; convert it first."
            )
        outputs = {key: value[0] for key, value in self.infer(image[None]).items()}
        return self._describe(outputs)

    def _describe(self, outputs: Mapping[str, np.ndarray]) -> PanopticPrediction:
        """Makes a prediction from the model's outputs for one image."""
        used = outputs["segment_score"] > 0
        ids, values = outputs["segment_id"][used].tolist(), outputs["segment_score"][used].tolist()
        return make_prediction(outputs["panoptic"], dict(zip(ids, values, strict=True)), self.dataset_info)

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model on a batch.

        Args:
            images: uint8 [B, H, W, 3], RGB, at least one pixel.

        Returns:
            The outputs of `PanopticSystem.postprocess`.

        Raises:
            UserError: If memory is insufficient, or the export is for images of another size.
        """
        try:
            return {key: value.numpy() for key, value in self._infer(images=tf.constant(images)).items()}
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(
                f"Not enough memory for an image of {images.shape[1]} x {images.shape[2]} pixels (height x width); "
                "downscale it."
            ) from error
        except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
            # The signature of an export with a fixed size refuses other sizes.
            raise UserError(
                f"The model cannot predict an image of {images.shape[1]} x {images.shape[2]} pixels (height x width); "
                "give an image of the size for which it was exported, or export it without --size."
            ) from error


@dataclasses.dataclass(frozen=True)
class PredictionSummary:
    """The result of `predict_files`.

    Attributes:
        images: Number of images predicted.
        skipped: The fault of each skipped image.
        pictures_dir: The folder of the pictures.
        json_file: The COCO panoptic JSON; its PNGs are in the folder of the same name beside it.
        bit_depth: Number of bits for which images of more than 8 bits per channel were scaled; None: there were none.
    """

    images: int
    skipped: tuple[str, ...]
    pictures_dir: Path
    json_file: Path
    bit_depth: int | None = None


def predict_files(
    model_dir: str | os.PathLike[str],
    input_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    compiled: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    bit_depth: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PredictionSummary:
    """Predicts an image file, or all images directly in a folder.

    Writes `OUTPUT_DIR/pictures/NAME.png` (image and prediction), `OUTPUT_DIR/panoptic/NAME.png` and, at the end,
    `OUTPUT_DIR/panoptic.json`. NAME is the image's name without suffix, or with it where several images differ
    only in that. The image id in the JSON is NAME, or, as in COCO, the number if all names are different numbers.

    Args:
        model_dir: See `Predictor`.
        input_path: An image file, or a folder; see `images.list_images`.
        output_dir: The folder of the results; created if missing.
        compiled: See `Predictor`.
        on_error: "stop" at the first image that cannot be read, or "skip" such images and report them.
        bit_depth: Number of bits that images of more than 8 bits per channel use; None: that of the training images, or
            else found from the largest value.
        progress: Called after each image with the number of images done and the total.

    Returns:
        The number of predicted images, the skipped ones, and the paths of the results.

    Raises:
        UserError: If there is no image, an image cannot be read and `on_error` is "stop", or none can be read. No
            JSON is written then.
    """
    if on_error not in ("stop", "skip"):
        raise unknown_name("value of on_error", on_error, ("stop", "skip"))
    files = list_images(Path(input_path))
    names = distinct_names(files)
    image_ids = image_ids_of_names(names)
    pictures_dir = Path(output_dir) / "pictures"
    predictor = Predictor(model_dir, compiled=compiled)
    writer = CocoPanopticWriter(output_dir, predictor.dataset_info)
    input_folders = {file.parent.resolve() for file in files}
    for folder in (pictures_dir, writer.png_dir):
        if folder.resolve() in input_folders:
            raise UserError(f"The output would replace the images in '{folder}'; choose another output folder.")
    writer.start(more_outputs=[pictures_dir.name])
    remove_leftovers(pictures_dir)

    bit_depth = bit_depth or predictor.dataset_info.bit_depth or find_bit_depth(files)
    skipped: list[str] = []
    for done, (file, name, image_id) in enumerate(zip(files, names, image_ids, strict=True), start=1):
        try:
            image = read_image(file, bit_depth=bit_depth)
            try:
                with enough_memory("it"):
                    prediction = predictor(image)
            except UserError as error:
                raise UserError(f"'{file}' cannot be predicted: {error}") from error
        except UserError as error:
            if on_error == "stop":
                raise
            skipped.append(str(error))
        else:
            writer.add(image_id, file.name, prediction.panoptic, scores=prediction.scores, png_name=f"{name}.png")
            picture = side_by_side(image, None, prediction.panoptic, predictor.dataset_info)
            write_png(pictures_dir / f"{name}.png", picture)
        if progress is not None:
            progress(done, len(files))
    if len(skipped) == len(files):
        raise UserError(f"None of the {len(files)} images in '{input_path}' can be predicted, the first: {skipped[0]}")
    return PredictionSummary(len(files) - len(skipped), tuple(skipped), pictures_dir, writer.close(), bit_depth)


def find_export(folder: Path) -> Path:
    """Returns the folder itself or its newest version; raises `UserError`, with advice, if there is no export."""
    if not folder.is_dir():
        raise UserError(f"Exported model '{folder}' does not exist; give a folder that `deeplab2-like export` wrote.")
    if (folder / MODEL_FILE).is_file():
        return folder
    newest = newest_export(folder)
    if newest is not None:
        return newest
    exports = sorted(
        file.parent.name for file in folder.glob(f"*/{MODEL_FILE}") if not file.parent.name.startswith(".")
    )
    advice = "give a folder that `deeplab2-like export` wrote"
    if exports:
        advice = f"give the folder of one, such as '{folder / exports[-1]}'"
    elif (folder / "checkpoints").is_dir():
        advice = "as it is a model folder, export it first with `deeplab2-like export`"
    raise UserError(f"'{folder}' is not an exported model, because it has no {MODEL_FILE}; {advice}.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
