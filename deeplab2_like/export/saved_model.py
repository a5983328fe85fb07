"""Export of a system to a SavedModel, which needs neither this package nor Keras to load, and has no custom ops.

An export is a folder with the SavedModel, `dataset_info.json` and, if known, `config.yaml`. `export_model_folder`
numbers exports, because TensorFlow Serving expects a folder per version: `NAME/1`, `NAME/2` and so on.

The signatures all return the dictionary of `PanopticSystem.postprocess`:

- `serving_default`: `images`, uint8 [B, H, W, 3] RGB; B, H and W are arbitrary.
- `encoded`: `image_bytes`, string [B] of whole JPEG, PNG, BMP or GIF files, all of the same size; B is at least 1.
- `compiled`: like `serving_default`, with post-processing compiled by XLA in stages. A new image size is compiled on
  its first use (seconds), and stays in memory. Not the default, because a server may be built without XLA.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.configs import Config, save_config
from deeplab2_like.data.records import is_readable_by_tensorflow
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.inference import compile_with_xla
from deeplab2_like.export.versions import MODEL_FILE, is_export, list_versions, newest_export, version_number
from deeplab2_like.model.base import PanopticSystem
from deeplab2_like.model.stages import compiled_stages
from deeplab2_like.temporary import TemporaryFolder, remove_leftovers

# Height and width of the image on which a new export is compared with the system, and the minimum share of equal
# pixels. It is not 1, because devices may choose other algorithms with other rounding, and scores may be almost equal.
_CHECK_SIZE = (97, 131)
_CHECK_AGREEMENT = 0.98


def export_saved_model(
    system: PanopticSystem,
    output_dir: str | os.PathLike[str],
    *,
    config: Config | None = None,
    check: bool = True,
    replace: bool = False,
) -> Path:
    """Exports a system to a folder; see the module for its content.

    The folder appears whole or not at all. If it replaces an earlier export, there is always the old or the new one,
    where the operating system can exchange two folders in one step.

    Args:
        system: The system, with its variables created.
        output_dir: The folder of the export; its parents are created if missing.
        config: The config of the system, saved as `config.yaml`.
        check: Whether to load the SavedModel and compare it with the system before it appears.
        replace: Whether to replace an earlier export. Other folders are never replaced unless they are empty.

    Returns:
        The folder.

    Raises:
        UserError: If Keras does not run on TensorFlow, or the folder is in use or cannot be written.
        RuntimeError: If the check fails.
    """
    _require_tensorflow()
    files.require_local(output_dir)
    folder = Path(output_dir).resolve()
    _clean_up(folder)
    _require_free(folder, name=str(output_dir), replace=replace)
    with _folder_beside(folder, name=str(output_dir), replace=replace) as beside:
        _write(system, beside, config=config, check=check)
        _require_free(folder, name=str(output_dir), replace=replace)  # Again, as writing takes a while.
    return Path(output_dir)


def export_model_folder(
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    checkpoint: str = "last",
    replace: bool = False,
) -> Path:
    """Exports a checkpoint of a model folder as a version, see `export_saved_model`.

    Args:
        model_dir: A folder that training wrote.
        output_dir: A folder of versions, in which the next free number is used, at first 1; or, if its name is a
            number, the version itself.
        overrides: Changes to the config, `key.path=value`, such as thresholds of the post-processing.
        checkpoint: The checkpoint, see `find_checkpoint`.
        replace: Whether to replace an earlier export: the version that `output_dir` names, the export that
            `output_dir` itself is, or else the newest version in it.

    Returns:
        The folder that was written.

    Raises:
        UserError: If the model folder cannot be loaded, an export already exists and `replace` is False, or the export
            cannot be written.
    """
    from deeplab2_like.model_folder import load_model_folder

    _require_tensorflow()
    folder = _place(Path(output_dir), replace=replace)
    config, system, _ = load_model_folder(model_dir, overrides, checkpoint=checkpoint)
    if folder is not None:
        return export_saved_model(system, folder, config=config, replace=replace)
    return _export_new_version(system, Path(output_dir), config=config)


def _place(output_dir: Path, *, replace: bool) -> Path | None:
    """Decides where to write an export, see `export_model_folder`; None for a new version in `output_dir`."""
    files.require_local(output_dir)
    # The name as given, not that of a link's target.
    is_version = version_number(Path(os.path.abspath(output_dir)).name) is not None
    versions_dir = output_dir.resolve()
    _clean_up(versions_dir)
    if is_version or (versions_dir / MODEL_FILE).is_file():
        _require_free(versions_dir, name=str(output_dir), replace=replace)
        return output_dir
    _require_folder(versions_dir, name=str(output_dir))
    remove_leftovers(versions_dir)
    newest = newest_export(versions_dir) if replace else None
    return None if newest is None else output_dir / newest.name


def _export_new_version(system: PanopticSystem, output_dir: Path, *, config: Config) -> Path:
    """Exports to the next free number in a folder of versions; returns the folder that was written."""
    versions_dir = output_dir.resolve()
    number = max(list_versions(versions_dir), default=0) + 1
    with _write_errors(str(output_dir)), _temporary_folder(versions_dir / str(number)) as temporary:
        _write(system, temporary.path, config=config, check=True)
        while True:
            try:
                temporary.publish(versions_dir / str(number))
                return output_dir / str(number)
            except OSError:
                if not os.path.lexists(versions_dir / str(number)):
                    raise
                number += 1  # Another export has taken the number.


def _require_tensorflow() -> None:
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"Keras runs on {keras.backend.backend()}, but only TensorFlow can write a SavedModel; set "
            "KERAS_BACKEND=tensorflow."
        )


def _write(system: PanopticSystem, folder: Path, *, config: Config | None, check: bool) -> None:
    """Writes all files of an export into an empty folder; see `export_saved_model` for `check`."""
    signatures = _trace(system)
    # Only variables are tracked, because Keras objects would store their state a second time.
    module = tf.Module()
    module.weights = [weight.value for weight in system.weights]
    tf.saved_model.save(module, str(folder), signatures=signatures)
    system.dataset_info.save(folder)
    if config is not None:
        save_config(config, folder / "config.yaml")
    if check:
        _check(folder, signatures["serving_default"])


def _trace(system: PanopticSystem) -> dict[str, tf.types.experimental.ConcreteFunction]:
    """Traces the signatures of a system, by name."""
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")

    def infer_compiled(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return system.infer(images)

    infer = tf.function(system.infer, input_signature=[images], autograph=False).get_concrete_function()

    def infer_encoded(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return infer(_decode_images(image_bytes, system.dataset_info.bit_depth))

    # TensorFlow Serving's REST interface recognizes base64 values by the suffix `_bytes`.
    image_bytes = tf.TensorSpec([None], tf.string, name="image_bytes")
    return {
        "serving_default": infer,
        "encoded": tf.function(infer_encoded, input_signature=[image_bytes], autograph=False).get_concrete_function(),
        "compiled": tf.function(infer_compiled, input_signature=[images], autograph=False).get_concrete_function(),
    }


def _decode_images(image_bytes: tf.Tensor, bit_depth: int | None) -> tf.Tensor:
    """Decodes image files, string [B], all of one size, to uint8 [B, H, W, 3]; see `_decode_image`."""
    count = tf.size(image_bytes)

    def decode(index: tf.Tensor, images: tf.TensorArray, size: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image = _decode_image(image_bytes[index], bit_depth)  # [H, W, 3]
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


def _decode_image(content: tf.Tensor, bit_depth: int | None) -> tf.Tensor:
    """Decodes an image file, string [], to uint8 [H, W, 3]; PNGs of 16 bits as those of the training images.

    Args:
        content: The content of the file.
        bit_depth: See `DatasetInfo`.
    """
    tf.debugging.Assert(
        is_readable_by_tensorflow(content), ["A BMP with a palette or few bits cannot be read; send the image as PNG."]
    )

    def decode() -> tf.Tensor:
        return tf.io.decode_image(content, channels=3, expand_animations=False)

    if bit_depth is None:
        return decode()
    shift = bit_depth - 8

    def decode_wide() -> tf.Tensor:
        values = tf.cast(tf.io.decode_png(content, channels=3, dtype=tf.uint16), tf.int32)
        return tf.saturate_cast(tf.bitwise.right_shift(values, shift), tf.uint8)

    # Byte 24 of a PNG is the number of bits; a file that ends before it is faulty anyway.
    header = tf.strings.join([content, "\0" * 25])
    is_wide = tf.equal(tf.strings.substr(header, 0, 4), b"\x89PNG") & tf.equal(
        tf.strings.substr(header, 24, 1), b"\x10"
    )
    return tf.cond(is_wide, decode_wide, decode)


def _require_folder(folder: Path, *, name: str) -> None:
    """Raises `UserError` if `folder`, which the user gave as `name`, is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"Cannot export to '{name}', which is a file; give a folder.")


def _require_free(folder: Path, *, name: str, replace: bool) -> None:
    """Raises `UserError` unless `folder`, which the user gave as `name`, is missing, empty or an export to replace."""
    _require_folder(folder, name=name)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_export(folder):
        raise UserError(
            f"Folder '{name}' has files that are not an export and would be lost; give a new folder, or that of an "
            "earlier export to replace it."
        )
    if not replace:
        is_version = version_number(folder.name) is not None
        other = f"'{Path(name).parent}' to write the next version" if is_version else "a new folder"
        raise UserError(
            f"'{name}' already has an export; give {other}, or replace this one with --replace (in Python with "
            "replace=True)."
        )


@contextlib.contextmanager
def _folder_beside(folder: Path, *, name: str, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary folder beside `folder` to write into, and renames it to `folder` at the end.

    After an error `folder` is unchanged.

    Args:
        folder: The folder to write; its parents are created if missing.
        name: The path as the user gave it.
        replace: Whether to replace an existing folder, which is an error otherwise.

    Raises:
        UserError: If the folder cannot be written.
    """
    with _write_errors(name), _temporary_folder(folder) as temporary:
        yield temporary.path
        if replace:
            temporary.replace()
        else:
            temporary.publish()


def _temporary_folder(folder: Path) -> TemporaryFolder:
    """Creates a temporary folder beside `folder`, and missing parents of it; raises `OSError`."""
    if not folder.parent.exists():  # If it is a file, the error below is clearer.
        folder.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(folder)
    return TemporaryFolder(folder)


def _clean_up(folder: Path) -> None:
    """Removes leftovers of killed exports beside `folder`, and restores an export that one was replacing."""
    is_version = version_number(folder.name) is not None
    remove_leftovers(folder.parent, of=None if is_version else folder.name)


@contextlib.contextmanager
def _write_errors(name: str) -> Iterator[None]:
    """Turns errors about a folder that cannot be written into `UserError`; `name` is the folder as the user gave it."""
    try:
        yield
    except (OSError, tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError) as error:
        raise files.cannot_write(name, error) from error


def _check(folder: Path, infer: tf.types.experimental.ConcreteFunction) -> None:
    """Compares the SavedModel in `folder` with the function it was made from, on an image of random noise.

    Raises:
        RuntimeError: If they differ.
    """
    with files.literal_folder(folder) as readable:
        loaded = tf.saved_model.load(str(readable)).signatures["serving_default"]
    noise = np.random.default_rng(0).integers(0, 256, (1, *_CHECK_SIZE, 3), np.uint8)
    expected = infer(tf.constant(noise))["panoptic"].numpy()
    received = loaded(images=tf.constant(noise))["panoptic"].numpy()
    agreement = float(np.mean(expected == received))
    if agreement < _CHECK_AGREEMENT:
        raise RuntimeError(
            f"The exported model agrees with the system on only {100 * agreement:.1f} % of a test image's pixels, so "
            "it was discarded; this is a bug in the library."
        )
