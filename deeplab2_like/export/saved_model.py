"""Export of a system to a SavedModel that needs neither this package nor Keras to load, and has no custom op.

The folder holds the SavedModel, `dataset_info.json` and, if known, `config.yaml`. For TensorFlow Serving, which wants a
folder per version, export to `NAME/1`.

Signatures, all returning the dictionary of `PanopticSystem.postprocess`:

- `serving_default`: `images`, uint8 [B, H, W, 3] RGB; B, H and W are free.
- `encoded`: `image_bytes`, string [B] of whole JPEG, PNG, BMP or GIF files, all of one size; B is at least 1.
- `compiled`: as `serving_default`, its post-processing compiled by XLA in stages. A new image size is compiled on its
  first use (seconds), and stays in memory. Not the default, as a server may be built without XLA.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.configs import Config, save_config
from deeplab2_like.data import dataset_info as dataset_info_module
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.evaluate import compile_with_xla
from deeplab2_like.model.base import PanopticSystem
from deeplab2_like.model.stages import compiled_stages

_MODEL_FILE = "saved_model.pb"

# The image, odd-sized, on which a new export must agree with the system, and the least share of pixels that do. It is
# not 1, as some devices choose their algorithms anew, which rounds differently, and two classes may be almost equal.
_CHECK_SIZE = (97, 131)
_CHECK_AGREEMENT = 0.98


def export_saved_model(
    system: PanopticSystem,
    output_dir: str | os.PathLike[str],
    *,
    config: Config | None = None,
    check: bool = True,
) -> Path:
    """Exports a system; the module describes the result.

    The folder appears whole or not at all. An earlier export is replaced; any other folder with something in it is not.

    Args:
        system: With its variables created.
        output_dir: The SavedModel's folder; its parents are made if missing.
        config: Where the system comes from; kept as `config.yaml`.
        check: Whether to load the SavedModel and compare it with the system before it appears.

    Returns:
        The folder.

    Raises:
        UserError: If Keras does not run on TensorFlow, or the folder is in use by something else or cannot be written.
        RuntimeError: If the check fails.
    """
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"Keras runs on {keras.backend.backend()}, but only TensorFlow can write a SavedModel; set "
            "KERAS_BACKEND=tensorflow."
        )
    folder = Path(output_dir).resolve()
    _require_free(folder, name=str(output_dir))
    with _folder_beside(folder, name=str(output_dir)) as beside:
        signatures = _trace(system)
        # Only variables are tracked, not the Keras objects, whose own saving would store them a second time.
        module = tf.Module()
        module.weights = [weight.value for weight in system.weights]
        tf.saved_model.save(module, str(beside), signatures=signatures)
        system.dataset_info.save(beside)
        if config is not None:
            save_config(config, beside / "config.yaml")
        if check:
            _check(beside, signatures["serving_default"])
    return folder


def export_model_folder(
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    checkpoint: str = "last",
) -> Path:
    """Exports a checkpoint of a model folder, see `export_saved_model`.

    Args:
        model_dir: A folder that training wrote.
        output_dir: The SavedModel's folder.
        overrides: Changes to the config, `key.path=value`, such as thresholds of the post-processing.
        checkpoint: Which one, see `find_checkpoint`.

    Returns:
        The folder.

    Raises:
        UserError: If the model folder cannot be loaded, or the export cannot be written.
    """
    from deeplab2_like.checkpoint import load_model_folder

    _require_free(Path(output_dir).resolve(), name=str(output_dir))
    config, system, _ = load_model_folder(model_dir, overrides, checkpoint=checkpoint)
    return export_saved_model(system, output_dir, config=config)


def _trace(system: PanopticSystem) -> dict[str, tf.types.experimental.ConcreteFunction]:
    """Traces the signatures of a system, by name."""
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")

    def infer_compiled(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return system.infer(images)

    infer = tf.function(system.infer, input_signature=[images], autograph=False).get_concrete_function()

    def infer_encoded(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return infer(_decode_images(image_bytes))

    # Servers' REST interfaces know by the ending `_bytes` that a value is base64.
    image_bytes = tf.TensorSpec([None], tf.string, name="image_bytes")
    return {
        "serving_default": infer,
        "encoded": tf.function(infer_encoded, input_signature=[image_bytes], autograph=False).get_concrete_function(),
        "compiled": tf.function(infer_compiled, input_signature=[images], autograph=False).get_concrete_function(),
    }


def _decode_images(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes image files, string [B], all of one size, to uint8 [B, H, W, 3]."""
    count = tf.size(image_bytes)

    def decode(index: tf.Tensor, images: tf.TensorArray, size: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image = tf.io.decode_image(image_bytes[index], channels=3, expand_animations=False)  # [H, W, 3]
        size_here = tf.shape(image)
        tf.debugging.Assert(
            (index == 0) | tf.reduce_all(size_here == size),
            ["The images of one request must be of equal size; send them one by one. Two sizes:", size, size_here],
        )
        return index + 1, images.write(index, image), size_here

    images = tf.TensorArray(tf.uint8, size=count, element_shape=[None, None, 3], infer_shape=False)
    state = (tf.constant(0), images, tf.zeros([3], tf.int32))
    _, images, _ = tf.while_loop(lambda index, *_: index < count, decode, state)
    return images.stack()  # [B, H, W, 3]


def _require_free(folder: Path, *, name: str) -> None:
    """Raises `UserError` unless `folder` is missing, empty or an export; `name` is what the user called it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"Cannot export to '{name}', which is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise UserError(
            f"Folder '{name}' holds something else than an export, which would be lost; give a new folder, or that of "
            "an earlier export to replace it."
        )


def _is_export(folder: Path) -> bool:
    return (folder / _MODEL_FILE).is_file() and (folder / dataset_info_module.FILE_NAME).is_file()


@contextlib.contextmanager
def _folder_beside(folder: Path, *, name: str) -> Iterator[Path]:
    """Gives a hidden folder beside `folder` to write into, and puts it in the place of `folder` at the end.

    If an error ends the block, `folder` is as it was.

    Raises:
        UserError: If nothing can be written there.
    """
    beside = files.beside(folder)
    replaced = beside.with_name(f"{beside.name}.replaced")
    try:
        try:
            beside.mkdir(parents=True)
            yield beside
            if folder.exists():
                folder.rename(replaced)
            try:
                beside.rename(folder)
            except OSError:
                if replaced.exists():
                    replaced.rename(folder)
                raise
        finally:
            for leftover in (beside, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
    except (OSError, tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError) as error:
        raise files.cannot_write(name, error) from error


def _check(folder: Path, infer: tf.types.experimental.ConcreteFunction) -> None:
    """Compares the SavedModel in `folder` with the function it was made of, on an image of coloured noise.

    Raises:
        RuntimeError: If they differ.
    """
    loaded = tf.saved_model.load(str(folder)).signatures["serving_default"]
    noise = np.random.default_rng(0).integers(0, 256, (1, *_CHECK_SIZE, 3), np.uint8)
    expected = infer(tf.constant(noise))["panoptic"].numpy()
    received = loaded(images=tf.constant(noise))["panoptic"].numpy()
    agreement = float(np.mean(expected == received))
    if agreement < _CHECK_AGREEMENT:
        raise RuntimeError(
            f"The exported model agrees with the system on only {100 * agreement:.1f} % of a test image's pixels, so "
            "it was discarded; this is a fault of the library."
        )
