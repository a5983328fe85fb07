"""Prediction of images with a checkpoint, without an export."""

import os
from pathlib import Path

from deeplab2_like.checkpoint_files import find_checkpoint
from deeplab2_like.data.dataset_info import FILE_NAME as INFO_FILE
from deeplab2_like.evaluation.inference import make_inference_function
from deeplab2_like.export.predictor import Predictor
from deeplab2_like.files import hash_files
from deeplab2_like.model_folder import CONFIG_FILE, load_model_folder


class ModelFolderPredictor(Predictor):
    """A checkpoint of a model folder, which can be called like a `Predictor`.

    Attributes:
        dataset_info: The meaning of the predicted maps.
        identity: Hash of config, classes and checkpoint, see `ImagePredictor`.

    Args:
        model_dir: A folder that training or `import-weights` wrote.
        checkpoint: See `find_checkpoint`.
        compiled: Compile the post-processing with XLA, see `Predictor`.

    Raises:
        UserError: If this is no model folder, or has no such checkpoint.
    """

    def __init__(self, model_dir: str | os.PathLike[str], *, checkpoint: str = "last", compiled: bool = False) -> None:
        _, system, _ = load_model_folder(model_dir, checkpoint=checkpoint)
        self.dataset_info = system.dataset_info
        infer = make_inference_function(system, compiled=compiled)
        self._infer = lambda images: infer(images)
        # The index of a checkpoint has a checksum of each variable.
        index = f"{find_checkpoint(model_dir, checkpoint)}.index"
        self.identity = hash_files([Path(model_dir) / CONFIG_FILE, Path(model_dir) / INFO_FILE, Path(index)])
