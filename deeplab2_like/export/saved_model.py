"""Export of a system to a SavedModel, which needs neither this package nor Keras to load, and has no custom ops.

An export is a folder with the SavedModel, `dataset_info.json` and, if known, `config.yaml`. `export_model_folder`
numbers exports, because TensorFlow Serving expects a folder per version: `NAME/1`, `NAME/2` and so on.

`signatures` lists what it answers.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import tensorflow as tf

import deeplab2_like
from deeplab2_like import files
from deeplab2_like.configs import Config, save_config
from deeplab2_like.errors import UserError
from deeplab2_like.export.options import ExportOptions
from deeplab2_like.export.parity import Parity, ParityImage, check_parity, generate_parity_images, read_parity_images
from deeplab2_like.export.signatures import trace_signatures
from deeplab2_like.export.versions import MODEL_FILE, is_export, list_versions, newest_export, version_number
from deeplab2_like.export.warmup import require_serving_api, write_warmup_requests
from deeplab2_like.model.base import PanopticSystem
from deeplab2_like.temporary import TemporaryFolder, remove_leftovers

ParityReport = Callable[[Sequence[Parity]], None]


@dataclasses.dataclass(frozen=True, eq=False)
class _Export:
    """What is written into the folder of an export; see `export_saved_model` for the attributes."""

    system: PanopticSystem
    config: Config | None
    step: int | None
    options: ExportOptions
    check: bool = True
    parity_images: Sequence[ParityImage] | None = None
    report: ParityReport | None = None


def export_saved_model(
    system: PanopticSystem,
    output_dir: str | os.PathLike[str],
    *,
    config: Config | None = None,
    step: int | None = None,
    options: ExportOptions | None = None,
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
        step: Number of training steps of the weights, for the signature `metadata`.
        options: What the export is made for; by default, images of any size.
        check: Whether to load the SavedModel and compare it with the system before it appears.
        replace: Whether to replace an earlier export. Other folders are never replaced unless they are empty.

    Returns:
        The folder.

    Raises:
        UserError: If Keras does not run on TensorFlow, or the folder is in use or cannot be written.
        RuntimeError: If the check fails.
    """
    _require_tensorflow()
    export = _Export(system, config, step, options or ExportOptions(), check)
    return _export_to(output_dir, export, replace=replace)


def export_model_folder(
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    checkpoint: str = "last",
    replace: bool = False,
    options: ExportOptions | None = None,
    averaged: bool | None = None,
    bfloat16: bool = False,
    parity_images: str | os.PathLike[str] | None = None,
    report: ParityReport | None = None,
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
        options: What the export is made for; by default, images of any size.
        averaged: See `load_model_folder`.
        bfloat16: Whether the network computes with 16 bits per number.
        parity_images: An image file or a folder of images on which the export is compared with the checkpoint; None:
            generated images.
        report: Called with the figures of the comparison.

    Returns:
        The folder that was written.

    Raises:
        UserError: If the model folder cannot be loaded, an export already exists and `replace` is False, or the export
            cannot be written.
        RuntimeError: If the export differs from the checkpoint.
    """
    from deeplab2_like.model_folder import load_model_folder

    _require_tensorflow()
    options = options or ExportOptions()
    if options.warmup_sizes:
        require_serving_api()  # Now, because loading the model takes a while.
    folder = _place(Path(output_dir), replace=replace)
    config, system, step = load_model_folder(
        model_dir, overrides, checkpoint=checkpoint, averaged=averaged, precision="mixed_bfloat16" if bfloat16 else None
    )
    images = None
    if parity_images is not None:
        images = read_parity_images(Path(parity_images), options, bit_depth=system.dataset_info.bit_depth)
    export = _Export(system, config, step, options, parity_images=images, report=report)
    if folder is not None:
        return _export_to(folder, export, replace=replace)
    return _export_new_version(export, Path(output_dir))


def _export_to(output_dir: str | os.PathLike[str], export: _Export, *, replace: bool) -> Path:
    """Exports to exactly this folder, and returns it."""
    files.require_local(output_dir)
    folder = Path(output_dir).resolve()
    _clean_up(folder)
    _require_free(folder, name=str(output_dir), replace=replace)
    with _folder_beside(folder, name=str(output_dir), replace=replace) as beside:
        _write(export, beside)
        _require_free(folder, name=str(output_dir), replace=replace)  # Again, as writing takes a while.
    return Path(output_dir)


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


def _export_new_version(export: _Export, output_dir: Path) -> Path:
    """Exports to the next free number in a folder of versions; returns the folder that was written."""
    versions_dir = output_dir.resolve()
    number = max(list_versions(versions_dir), default=0) + 1
    with _write_errors(str(output_dir)), _temporary_folder(versions_dir / str(number)) as temporary:
        _write(export, temporary.path)
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


def _write(export: _Export, folder: Path) -> None:
    """Writes all files of an export into an empty folder, and compares it with the system."""
    system, options = export.system, export.options
    signatures = trace_signatures(system, options, _metadata(export))
    # Only variables are tracked, because Keras objects would store their state a second time.
    module = tf.Module()
    module.weights = [weight.value for weight in system.weights]
    tf.saved_model.save(module, str(folder), signatures=signatures)
    system.dataset_info.save(folder)
    if export.config is not None:
        save_config(export.config, folder / "config.yaml")
    if options.warmup_sizes:
        write_warmup_requests(folder, signatures, options.warmup_sizes)
    if export.check:
        with files.literal_folder(folder) as readable:
            loaded = tf.saved_model.load(str(readable))
        images = export.parity_images or generate_parity_images(options)
        figures = check_parity(loaded.signatures, system, images, flip=options.flip)
        if export.report is not None:
            export.report(figures)


def _metadata(export: _Export) -> dict[str, str]:
    """Returns the answer of the signature `metadata`, all of it JSON."""
    info = export.system.dataset_info
    config = None if export.config is None else export.config.model_dump(mode="json")
    if config is not None:
        config["data"]["path"] = None  # Clients need not know the folders of the training.
    content = {
        "classes": info.to_coco_categories(),
        "label_divisor": info.label_divisor,
        "ignore_label": info.ignore_label,
        "system": export.system.name,
        "step": export.step,
        "library_version": deeplab2_like.__version__,
        "precision": export.system.dtype_policy.name,
        "options": dataclasses.asdict(export.options),
        "config": config,
    }
    return {name: json.dumps(value) for name, value in content.items()}


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
