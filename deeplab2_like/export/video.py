"""Videos: reads the frames of one, and writes one with the prediction drawn over each frame."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from deeplab2_like.data.image_headers import require_size
from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write
from deeplab2_like.parallel import map_in_order
from deeplab2_like.temporary import TemporaryFolder

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")

# Container -> codec. OpenCV's build has no encoder of H.264.
_CODECS = {".avi": "MJPG", ".mp4": "mp4v"}
_DEFAULT_RATE = 25.0


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says.

    Attributes:
        height: Height of a frame in pixels.
        width: Width of a frame.
        rate: Frames per second.
        frames: Number of frames, which some files state wrongly; 0 if unknown.
    """

    height: int
    width: int
    rate: float
    frames: int


def output_suffix(file: Path) -> str:
    """Returns the suffix of the video that is written for a video: `.avi` for `.avi`, else `.mp4`."""
    return ".avi" if file.suffix.lower() == ".avi" else ".mp4"


def read_video_info(file: Path) -> VideoInfo:
    """Reads the header of a video.

    Raises:
        UserError: If the file is missing or no video, or its frames have more pixels than the limit.
    """
    with _open(file) as capture:
        height, width = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        rate, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    require_size(height, width, f"'{file}'")
    is_known = math.isfinite(rate) and 0 < rate <= 1000
    return VideoInfo(height, width, rate if is_known else _DEFAULT_RATE, max(0, int(frames)))


def read_frames(file: Path) -> Iterator[np.ndarray]:
    """Yields the frames of a video, uint8 [H, W, 3] RGB, turned as the file says.

    Raises:
        UserError: If the file is missing or no video.
    """
    with _open(file) as capture:
        while True:
            is_read, frame = capture.read()
            if not is_read:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def draw_video(
    file: Path,
    target: Path,
    draw: Callable[[np.ndarray], np.ndarray],
    *,
    after_frame: Callable[[], None] | None = None,
) -> int:
    """Writes a video with a picture in place of each frame; the file appears whole or not at all, without sound.

    Args:
        file: The video to read.
        target: The video to write, `.mp4` or `.avi`; its folder is created if missing.
        draw: Makes the picture, uint8 [H, W, 3] RGB of the frame's size, from a frame.
        after_frame: Called after each frame.

    Returns:
        The number of frames.

    Raises:
        UserError: If the video cannot be read, has no frame, or the other one cannot be written.
    """
    info = read_video_info(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFolder(target) as temporary:
            path = temporary.path / f"video{target.suffix}"
            with _Writer(path, info) as writer:
                # A thread encodes a frame while the next one is drawn.
                for _ in map_in_order(writer.add, map(draw, read_frames(file)), workers=1):
                    if after_frame is not None:
                        after_frame()
            if not writer.frames:
                raise UserError(f"'{file}' has no frame that can be read; convert it to MP4 with H.264.")
            # The encoder does not report errors.
            if _count_written(path) != writer.frames:
                raise OSError(0, "the video could not be written completely; is the disk full?")
            os.replace(path, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    return writer.frames


class _Writer:
    """Writes frames to a video. A context manager, at whose end the file is complete.

    Attributes:
        frames: Number of frames.

    Args:
        path: The file; its suffix chooses the format.
        info: Frame rate.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path, info: VideoInfo) -> None:
        self.frames = 0
        self._path, self._rate = path, info.rate
        self._writer: cv2.VideoWriter | None = None
        self._shape: tuple[int, ...] = ()

    def add(self, picture: np.ndarray) -> None:
        """Adds a picture, uint8 [H, W, 3] RGB."""
        if self._writer is None:
            # The size of the first frame, because that in the header is the one before turning.
            codec = cv2.VideoWriter.fourcc(*_CODECS[self._path.suffix])
            size = (picture.shape[1], picture.shape[0])
            self._writer, self._shape = cv2.VideoWriter(str(self._path), codec, self._rate, size), picture.shape
            if not self._writer.isOpened():
                raise OSError(0, f"no video of {size[1]} x {size[0]} pixels can be opened there")
        if picture.shape != self._shape:
            raise UserError(
                f"A frame has {picture.shape[0]} x {picture.shape[1]} pixels, the first one {self._shape[0]} x "
                f"{self._shape[1]}; convert the video to one size."
            )
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        self.frames += 1

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()


@contextlib.contextmanager
def _open(file: Path) -> Iterator[cv2.VideoCapture]:
    if not file.is_file():
        raise UserError(f"Video '{file}' does not exist, or is no regular file; check the path.")
    # As an absolute path, because FFmpeg takes a name with a colon for an address; and not by OpenCV's other readers,
    # which take a name with a percent sign for that of many files.
    capture = cv2.VideoCapture(os.path.abspath(file), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise UserError(f"'{file}' is not a readable video, or cut short; convert it to MP4 with H.264.")
        yield capture
    finally:
        capture.release()


def _count_written(path: Path) -> int:
    """Returns the number of frames of a video that was written, 0 if it is damaged."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    finally:
        capture.release()
