"""Prediction of files: images to pictures and to files of several formats, videos to videos.

While the network runs on one image, threads decode the next ones and write the results of the one before. Each finished
image is noted in a journal, so the same command continues after an interruption.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from deeplab2_like.data.images import find_bit_depth, read_image, write_png
from deeplab2_like.errors import UserError, enough_memory, unknown_name
from deeplab2_like.export.inputs import Input, list_inputs
from deeplab2_like.export.journal import Entry, Journal, stamp_of
from deeplab2_like.export.load_predictor import load_predictor
from deeplab2_like.export.prediction import ImagePredictor, PanopticPrediction, require_classes
from deeplab2_like.export.prediction_files import FORMATS, PredictionFormat, check_formats, make_formats
from deeplab2_like.export.tiles import DEFAULT_OVERLAP, TiledPredictor, check_tile
from deeplab2_like.export.video import VideoInfo, draw_video, output_suffix, read_video_info
from deeplab2_like.files import read_reserved, reserve_outputs
from deeplab2_like.parallel import map_in_order
from deeplab2_like.temporary import remove_leftovers
from deeplab2_like.visualize import side_by_side

PICTURES, VIDEOS = "pictures", "videos"
# Larger images are drawn at a half, a third and so on of their height and width: nobody looks at more at once, and a
# picture takes several times the memory of the image.
_MAX_PICTURE_PIXELS = 2**25


@dataclasses.dataclass(frozen=True)
class PredictionSummary:
    """The result of `predict_files`.

    Attributes:
        images: Number of images predicted.
        videos: Number of videos predicted.
        done_before: Number of images and videos that an earlier run has predicted.
        skipped: The fault of each skipped image or video.
        notes: What the user should know about single results.
        outputs: The files and folders in the output folder.
        first_picture: The picture of the first image, or the first video.
        bit_depth: Number of bits for which images of more than 8 bits per channel were scaled; None: there were none.
    """

    images: int
    videos: int
    done_before: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    outputs: tuple[Path, ...]
    first_picture: Path
    bit_depth: int | None = None


def predict_files(  # noqa: PLR0913 - its arguments are the options of the command
    model: str | os.PathLike[str] | ImagePredictor,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    formats: Sequence[str] | None = None,
    min_score: float = 0.0,
    classes: Sequence[str] = (),
    tile: int | None = None,
    overlap: int = DEFAULT_OVERLAP,
    checkpoint: str | None = None,
    compiled: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    bit_depth: int | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PredictionSummary:
    """Predicts images and videos.

    Writes `OUTPUT_DIR/pictures/NAME.png` (image and prediction) and the files of the formats; and for a video
    `OUTPUT_DIR/videos/NAME.mp4` with the prediction drawn over each frame. NAME is the path of the input without
    suffix, see `list_inputs`. The image id in the COCO JSON is NAME, or, as in COCO, the number if all names are
    different numbers.

    Repeating the call predicts only what is missing, has failed or has changed.

    Args:
        model: See `load_predictor`; or an object that predicts images.
        inputs: Image files, videos, folders and patterns, see `list_inputs`.
        output_dir: The folder of the results; created if missing.
        formats: Keys of `FORMATS`; None: "coco". They are for images only.
        min_score: Segments with a smaller score become void.
        classes: Names of the classes to keep; segments of others become void. None given means all.
        tile: Height and width of tiles, see `TiledPredictor`; None: images are predicted whole.
        overlap: Smallest number of pixels that neighboring tiles share.
        checkpoint: See `load_predictor`.
        compiled: See `Predictor`.
        on_error: "stop" at the first image that cannot be read, or "skip" such images and report them.
        bit_depth: Number of bits that images of more than 8 bits per channel use; None: that of the training images, or
            else found from the largest value.
        replace: Whether to replace the results of another model or of other options in the folder.
        progress: Called after each image and each frame with the number of them done and the total.

    Returns:
        What was predicted and skipped, and the paths of the results.

    Raises:
        UserError: If there is no input, one cannot be read and `on_error` is "stop", or none can be read (then no JSON
            is written); or the folder has other results.
    """
    if on_error not in ("stop", "skip"):
        raise unknown_name("value of on_error", on_error, ("stop", "skip"))
    check_formats(formats or ["coco"])
    if tile is not None:
        check_tile(tile, overlap)
    folder = Path(output_dir)
    folders = [folder / name for name in (PICTURES, VIDEOS, *_names_of(FORMATS)) if not Path(name).suffix]
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found = list_inputs(given, results=folders)
    _require_no_inputs(found, folders)
    images = [item for item in found if not item.is_video]
    if formats and not images:
        raise UserError("Formats are for images, but all inputs are videos; leave out --format.")

    predictor = model
    if isinstance(predictor, str | os.PathLike):
        predictor = load_predictor(predictor, checkpoint=checkpoint, compiled=compiled)
    info = predictor.dataset_info
    require_classes(classes, info)
    bit_depth = bit_depth or info.bit_depth or find_bit_depth(item.path for item in images)
    writers = make_formats(formats or ["coco"], folder, info) if images else []
    options = {
        "format": sorted({*formats}) if formats else ["coco"],
        "min-score": min_score,
        "classes": sorted({*classes}),
        "tile": tile,
        "overlap": overlap if tile else None,
        "compile": compiled,
        "bit-depth": bit_depth,
    }
    with Journal(folder, {"model": predictor.identity, **options}, replace=replace) as journal:
        if tile is not None:
            predictor = TiledPredictor(predictor, tile=tile, overlap=overlap)
        run = _Run(predictor, folder, writers, journal, min_score, classes, bit_depth, progress)
        run.start(has_images=bool(images), has_videos=len(images) < len(found))
        return run.predict(found, skips=on_error == "skip")


class _Run:
    """A run of `predict_files`; its arguments are those of the function, checked."""

    def __init__(
        self,
        predictor: ImagePredictor,
        folder: Path,
        formats: Sequence[PredictionFormat],
        journal: Journal,
        min_score: float,
        classes: Sequence[str],
        bit_depth: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._predictor = predictor
        self._folder = folder
        self._formats = formats
        self._journal = journal
        self._min_score, self._classes = min_score, classes
        self._bit_depth = bit_depth
        self._progress = progress
        self._done = self._total = 0
        self._outputs: list[str] = []

    def start(self, *, has_images: bool, has_videos: bool) -> None:
        """Makes the output folder, and removes JSONs of an earlier run and leftovers of killed runs.

        Such a JSON would describe other files should this run end early.
        """
        self._outputs = [PICTURES] * has_images + [VIDEOS] * has_videos
        self._outputs += [name for writer in self._formats for name in writer.outputs]
        reserve_outputs(self._folder, self._outputs)
        for name in {*self._outputs, PICTURES, VIDEOS}:
            remove_leftovers(self._folder / name, recursive=True)
        stale = read_reserved(self._folder) if self._journal.has_earlier else self._outputs
        for name in _names_of(FORMATS):
            if Path(name).suffix and name in stale:
                (self._folder / name).unlink(missing_ok=True)
        self._journal.start()

    def predict(self, inputs: Sequence[Input], *, skips: bool) -> PredictionSummary:
        """Predicts what is not done; see `predict_files`."""
        to_do = [item for item in inputs if self._journal.find(item.name, item.path) is None]
        done_before = len(inputs) - len(to_do)
        images = [item for item in to_do if not item.is_video]
        videos, skipped = self._read_headers([item for item in to_do if item.is_video], skips=skips)
        self._total = len(images) + sum(max(1, info.frames) for info in videos.values())
        notes = []
        failed = {*(item.name for item in to_do if item.is_video)} - {item.name for item in videos}
        # Three stages, of which the first and the last run in threads.
        decoded = map_in_order(self._decode, images, workers=2)
        predicted = (self._predict(item, image) for item, image in zip(images, decoded, strict=True))
        for item, result in zip(images, map_in_order(self._write, predicted, workers=1), strict=True):
            if result is not None:
                if not skips:
                    raise result
                skipped.append(str(result))
                failed.add(item.name)
            self._advance()
        for item, info in videos.items():
            try:
                notes += self._predict_video(item, info)
            except UserError as error:
                if not skips:
                    raise
                skipped.append(str(error))
                failed.add(item.name)
        if len(skipped) == len(inputs):
            raise UserError(f"None of the {len(skipped)} inputs can be predicted, the first: {skipped[0]}")
        finished = [item for item in inputs if item.name not in failed]
        names = [item.name for item in finished if not item.is_video]
        for writer in self._formats:
            writer.finish(self._journal, names)
        self._journal.finish([item.name for item in finished])
        num_videos = sum(item.name not in failed for item in videos)
        first = next(self._journal.read([finished[0].name]))
        return PredictionSummary(
            images=len(finished) - done_before - num_videos,
            videos=num_videos,
            done_before=done_before,
            skipped=tuple(skipped),
            notes=tuple(notes),
            outputs=tuple(self._folder / name for name in self._outputs),
            first_picture=self._folder / first.files[0],
            bit_depth=self._bit_depth,
        )

    def _decode(self, item: Input) -> np.ndarray | UserError:
        try:
            return read_image(item.path, bit_depth=self._bit_depth)
        except UserError as error:
            return error

    def _predict(
        self, item: Input, image: np.ndarray | UserError
    ) -> tuple[Input, np.ndarray, PanopticPrediction] | UserError:
        if isinstance(image, UserError):
            return image
        try:
            with enough_memory("it"):
                return item, image, self._select(self._predictor(image))
        except UserError as error:
            return UserError(f"'{item.path}' cannot be predicted: {error}")

    def _select(self, prediction: PanopticPrediction) -> PanopticPrediction:
        return prediction.select(min_score=self._min_score, classes=self._classes)

    def _write(self, result: tuple[Input, np.ndarray, PanopticPrediction] | UserError) -> UserError | None:
        """Writes the files of an image and notes it in the journal; returns the error of an earlier stage.

        Errors of writing are raised, as they concern all images. One thread calls this, and finishes what it has begun
        also if the run is stopped.
        """
        if isinstance(result, UserError):
            return result
        item, image, prediction = result
        stamp = stamp_of(item.path)
        picture = f"{PICTURES}/{item.name}.png"
        files = [file for writer in self._formats for file in writer.write(item.name, prediction)]
        write_png(self._folder / picture, _draw(image, prediction))
        height, width = prediction.panoptic.shape
        self._journal.add(_make_entry(item, stamp, (height, width), [picture, *files], prediction))
        return None

    def _read_headers(self, items: Sequence[Input], *, skips: bool) -> tuple[dict[Input, VideoInfo], list[str]]:
        """Reads the headers of videos; returns them and the faults of skipped ones."""
        infos, faults = {}, []
        for item in items:
            try:
                infos[item] = read_video_info(item.path)
            except UserError as error:
                if not skips:
                    raise
                faults.append(str(error))
        return infos, faults

    def _predict_video(self, item: Input, info: VideoInfo) -> list[str]:
        """Writes a video and its entry; returns notes."""
        name = f"{VIDEOS}/{item.name}{output_suffix(item.path)}"
        stamp = stamp_of(item.path)

        def draw(frame: np.ndarray) -> np.ndarray:
            return self._select(self._predictor(frame)).draw(frame)

        frames = draw_video(item.path, self._folder / name, draw, after_frame=self._advance)
        self._journal.add(_make_entry(item, stamp, (info.height, info.width), [name], None))
        if frames < info.frames:
            return [f"'{item.path}': {frames} of {info.frames} frames could be read."]
        return []

    def _advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _make_entry(
    item: Input,
    stamp: tuple[int, int],
    size: tuple[int, int],
    files: Sequence[str],
    prediction: PanopticPrediction | None,
) -> Entry:
    return Entry(
        name=item.name,
        source=os.path.abspath(item.path),
        stamp=stamp,
        file_name=item.file_name,
        height=size[0],
        width=size[1],
        files=tuple(files),
        segments=prediction.to_coco() if prediction else [],
    )


def _draw(image: np.ndarray, prediction: PanopticPrediction) -> np.ndarray:
    """Draws an image beside its prediction, downscaled if it is very large; uint8 [H', W', 3]."""
    step = 1
    while image.size / 3 / step**2 > _MAX_PICTURE_PIXELS:
        step += 1
    image, panoptic = (np.ascontiguousarray(pixels[::step, ::step]) for pixels in (image, prediction.panoptic))
    return side_by_side(image, None, panoptic, prediction.dataset_info)


def _names_of(formats: dict[str, type[PredictionFormat]]) -> list[str]:
    return [name for writer in formats.values() for name in writer.outputs]


def _require_no_inputs(inputs: Sequence[Input], folders: Sequence[Path]) -> None:
    """Raises `UserError` if an input is in a folder of results."""
    input_folders = {item.path.parent.resolve() for item in inputs}
    for folder in folders:
        if any(path.is_relative_to(folder.resolve()) for path in input_folders):
            raise UserError(f"The output would replace the images in '{folder}'; choose another output folder.")
