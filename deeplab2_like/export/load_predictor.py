"""Finds out whether a folder is an export or a model folder, and loads it for prediction.

A model folder needs Keras and the code of its system; they are imported only then.
"""

import os
from pathlib import Path

from deeplab2_like.errors import UserError
from deeplab2_like.export.prediction import ImagePredictor
from deeplab2_like.export.versions import MODEL_FILE, newest_export
from deeplab2_like.files import require_local


def load_predictor(
    model: str | os.PathLike[str], *, checkpoint: str | None = None, compiled: bool = False
) -> ImagePredictor:
    """Loads a model for prediction.

    Args:
        model: An export, a folder of versions, or a model folder that training or `import-weights` wrote.
        checkpoint: Of a model folder: `last`, `best` or the number of a step, see `find_checkpoint`; None: `last`.
        compiled: See `Predictor`.

    Returns:
        A `Predictor` or a `ModelFolderPredictor`.

    Raises:
        UserError: If the folder is neither, is damaged, or is an export, and a checkpoint is given.
    """
    require_local(model)
    folder = Path(model)
    if (folder / "checkpoints").is_dir() and not (folder / MODEL_FILE).is_file() and newest_export(folder) is None:
        from deeplab2_like.export.model_folder_predictor import ModelFolderPredictor

        return ModelFolderPredictor(folder, checkpoint=checkpoint or "last", compiled=compiled)
    if checkpoint is not None:
        raise UserError(
            f"'{model}' is no model folder, so it has no checkpoint '{checkpoint}'; leave out --checkpoint."
        )
    from deeplab2_like.export.predictor import Predictor

    return Predictor(model, compiled=compiled)
