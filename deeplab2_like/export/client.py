"""A client of servers that hold an export: TensorFlow Serving over gRPC or REST, and `deeplab2-like serve`.

Images travel as files (JPEG, PNG, BMP or GIF), one per call: servers join calls that wait to batches of their own, so
one bad image, or one of another size, never concerns another one. Calls that may succeed later are repeated.
"""

import concurrent.futures
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import decode_image, encode_png
from deeplab2_like.data.panoptic_label import rgb_to_ids
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.export.prediction import PanopticPrediction, make_prediction
from deeplab2_like.export.transports import TRANSPORTS, FailedError, NoModelError, RefusedError, UnavailableError
from deeplab2_like.files import read_file

# Pauses between attempts, in seconds: each twice as long as the one before, up to the longest.
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0

# The signatures for image files, best first. A map is a PNG in the answer of the first, and numbers in that of the
# second.
_SIGNATURES = ("compact", "encoded")

# An image: a file, its content, or pixels, uint8 [H, W, 3] RGB.
Image = str | os.PathLike[str] | bytes | np.ndarray
Result = TypeVar("Result")


class ServerError(UserError):
    """The server cannot be reached, is busy, or fails. The image is not at fault, so the call may succeed later."""


class Client:
    """A model on a server. Calls are safe from several threads.

    Example:
        with Client("localhost:8500", "panoptic") as client:
            prediction = client("photo.jpg")
            predictions = client.predict(["a.jpg", "b.png"])

    Args:
        address: Host and port, such as `localhost:8500`. REST addresses may begin with `http://` or `https://`, and
            have a path.
        model: The name of the model.
        protocol: "grpc" or "rest" for TensorFlow Serving (ports 8500 and 8501), "v2" for the Open Inference Protocol of
            `deeplab2-like serve` over REST (port 8080).
        version: The version of the model; None: the server chooses, usually the newest.
        dataset_info: The meaning of the predicted maps, or a folder with `dataset_info.json`; None: ask the server,
            which exports of earlier versions cannot answer.
        timeout: Seconds until a call is given up, all attempts together. The first prediction asks the server for the
            description of the model before, with the same limit.
        retries: Number of attempts after the first one, for errors that may be over soon: no connection, a server
            that starts, ends or is too busy.
        tls: Whether gRPC is encrypted. For REST use `https://`.

    Raises:
        UserError: If an argument is wrong, or gRPC lacks its package.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        protocol: Literal["grpc", "rest", "v2"] = "grpc",
        version: int | None = None,
        dataset_info: DatasetInfo | str | os.PathLike[str] | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        tls: bool = False,
    ) -> None:
        if protocol not in TRANSPORTS:
            raise unknown_name("protocol", protocol, TRANSPORTS)
        if not (timeout > 0 and retries >= 0):
            raise UserError(f"timeout must be above 0 and retries 0 or more, got {timeout} and {retries}.")
        if isinstance(dataset_info, str | os.PathLike):
            dataset_info = DatasetInfo.load(dataset_info)
        self.timeout, self.retries = timeout, retries
        self._dataset_info = dataset_info
        self._signature: str | None = None
        self._name = f"model '{model}' at '{address}'"
        self._transport = TRANSPORTS[protocol](address, model, version, tls)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    @property
    def dataset_info(self) -> DatasetInfo:
        """The meaning of the predicted maps.

        Raises:
            UserError: If the server does not know it, or cannot be reached.
        """
        if self._dataset_info is None:
            found = self._repeat(self._transport.find_dataset_info)
            if found is None:
                raise UserError(
                    f"The {self._name} does not name its classes; give Client the argument dataset_info, such as the "
                    "folder of the export."
                )
            try:
                self._dataset_info = DatasetInfo.from_dict(json.loads(found))
            except (ValueError, LookupError, TypeError, OverflowError) as error:
                raise ServerError(
                    f"The {self._name} describes its classes wrongly ({error}); export it again."
                ) from error
        return self._dataset_info

    def __call__(self, image: Image, *, name: str | None = None) -> PanopticPrediction:
        """Predicts one image.

        Args:
            image: An image file, its content, or pixels, uint8 [H, W, 3] RGB.
            name: Name of the image in errors; by default its path.

        Returns:
            The prediction, with the image's size.

        Raises:
            ServerError: If the server cannot be reached, gives no answer in time, or fails.
            UserError: If the image cannot be read or is refused, or there is no such model.
        """
        name = name or (str(image) if isinstance(image, str | os.PathLike) else "the image")
        content = _content_of(image, name)
        dataset_info = self.dataset_info
        signature = self._find_signature()
        outputs = self._repeat(lambda timeout: self._transport.infer(signature, content, name, timeout), image=name)
        try:
            return make_prediction(_read_map(outputs), _read_scores(outputs), dataset_info)
        except (KeyError, ValueError) as error:
            raise ServerError(f"The {self._name} gave an answer that is not a prediction ({error}).") from error

    def predict(
        self, images: Sequence[Image], *, names: Sequence[str] | None = None, concurrency: int = 8
    ) -> list[PanopticPrediction | UserError]:
        """Predicts several images, of any sizes, side by side.

        Args:
            images: The images, see `__call__`.
            names: Their names in errors; by default their paths, or "image 1" and so on.
            concurrency: Number of images that are sent at the same time.

        Returns:
            For each image its prediction, or the error that `__call__` would raise.
        """
        if names is None:
            names = [
                str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
                for number, image in enumerate(images, start=1)
            ]

        def predict(image: Image, name: str) -> PanopticPrediction | UserError:
            try:
                return self(image, name=name)
            except UserError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(max_workers=concurrency) as pool:
            futures = [pool.submit(predict, image, name) for image, name in zip(images, names, strict=True)]
            return [future.result() for future in futures]

    def _find_signature(self) -> str:
        """Returns the best signature for image files that the model has."""
        if self._signature is None:
            known = self._repeat(self._transport.list_signatures)
            found = [signature for signature in _SIGNATURES if signature in known]
            if not found:
                raise UserError(
                    f"The {self._name} has no signature for image files ({' or '.join(_SIGNATURES)}), but "
                    f"{', '.join(sorted(known))}; export it again with `deeplab2-like export`."
                )
            self._signature = found[0]
        return self._signature

    def _repeat(self, call: Callable[[float], Result], *, image: str = "the request") -> Result:
        """Calls with the seconds that are left, again after errors that may be over soon; see the class for limits.

        Args:
            call: One attempt, see `Transport`.
            image: The name of the image, in case it is refused.

        Raises:
            ServerError or UserError: See `__call__`.
        """
        deadline = time.monotonic() + self.timeout
        attempts = 0
        while True:
            try:
                return call(max(deadline - time.monotonic(), 0.001))
            except UnavailableError as error:
                # Clients that failed together should not come back together.
                pause = min(_FIRST_PAUSE * 2**attempts, _LONGEST_PAUSE) * random.uniform(0.5, 1)
                attempts += 1
                if attempts > self.retries or time.monotonic() + pause > deadline:
                    times = "once" if attempts == 1 else f"{attempts} times"
                    raise ServerError(
                        f"The {self._name} gave no answer, tried {times}: {error}; start the server, give another "
                        "address, or allow a longer timeout or more retries."
                    ) from error
                time.sleep(pause)
            except NoModelError as error:
                raise UserError(
                    f"There is no {self._name}: {error}; give the name and the version that the server was started "
                    "with."
                ) from error
            except RefusedError as error:
                raise UserError(f"'{image}' is refused by the {self._name}: {error}") from error
            except FailedError as error:
                raise ServerError(f"The {self._name} failed: {error}.") from error
            except UserError:
                raise
            except (LookupError, TypeError, ValueError) as error:
                raise ServerError(
                    f"The {self._name} gave an answer of another form ({error!r}), so this may be another server."
                ) from error


def _content_of(image: Image, name: str) -> bytes:
    """Returns the content of an image file to send; raises `UserError`."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        try:
            return encode_png(image)
        except UserError as error:
            raise UserError(f"'{name}' cannot be sent: {error}") from error
    return read_file(image, "the image")


def _read_map(outputs: Mapping[str, Any]) -> np.ndarray:
    """Returns the panoptic map, int32 [H, W], of the outputs for one image, from either signature."""
    if "panoptic_png_bytes" in outputs:
        content = np.asarray(outputs["panoptic_png_bytes"], object).item()
        panoptic = rgb_to_ids(decode_image(content, "panoptic map").astype(np.int32))
    else:
        panoptic = np.asarray(outputs["panoptic"], np.int32)
    if "image_size" in outputs:  # A batch of several sizes is padded.
        height, width = np.asarray(outputs["image_size"]).tolist()
        panoptic = panoptic[:height, :width]
    return np.ascontiguousarray(panoptic)


def _read_scores(outputs: Mapping[str, Any]) -> dict[int, float]:
    """Returns the score of each segment by its value in the map, without the unused rows of the table."""
    scores = np.asarray(outputs["segment_score"], np.float32)
    used = scores > 0
    return dict(zip(np.asarray(outputs["segment_id"])[used].tolist(), scores[used].tolist(), strict=True))
