"""Prediction of images with an exported model.

Needs TensorFlow to load the SavedModel, but neither Keras nor the code of the systems.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from deeplab2_like.data.dataset_info import FILE_NAME as INFO_FILE
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.export.prediction import PanopticPrediction, Segment, make_prediction
from deeplab2_like.export.versions import MODEL_FILE, newest_export
from deeplab2_like.files import hash_files, literal_folder, require_local

__all__ = ["PanopticPrediction", "Predictor", "Segment"]


class Predictor:
    """An exported model, which can be called with images of any size.

    Example:
        predictor = Predictor("models/panoptic")
        prediction = predictor(image)  # uint8 [H, W, 3], RGB
        prediction.draw(image)

    Attributes:
        dataset_info: The meaning of the predicted maps.
        identity: Hash of the export, see `ImagePredictor`.

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
        # The index of the variables has a checksum of each, so the weights themselves need not be read.
        self.identity = hash_files([folder / name for name in (MODEL_FILE, "variables/variables.index", INFO_FILE)])

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
