"""Counts what a data set holds and its records do not, so that `convert` can say it at its end."""

import contextlib
from collections.abc import Iterator, Mapping

from deeplab2_like.errors import UserError

# The reasons, as the summary prints them.
CROWD = "crowd regions, which are not objects"
HIDDEN = "covered by other shapes, see --overlap"
EMPTY = "outlines without a pixel"
DOWNSCALED = "too small after --max-side"
IGNORED = "ignored, so void"
NO_CLASS = "not a class of the data set, so void"
NO_OBJECT = "pixels of a thing class without an object, so void"
OTHER_CLASS = "pixels of an object that are of another class than most of it"
FAULTY = "faulty, left out by --on-error"

# By reason and class name (or another name of the label): numbers of objects and of pixels.
Counts = Mapping[str, Mapping[str, tuple[int, int]]]


class Losses:
    """What is lost of one image, and what else the user is told about it.

    Args:
        may_skip: Whether faulty annotations are left out.

    Attributes:
        counts: Numbers of objects and of pixels by reason and class name.
        faults: The fault of each annotation that was left out.
        is_turned: Whether the image was turned by its EXIF orientation.
    """

    def __init__(self, *, may_skip: bool = False) -> None:
        self._may_skip = may_skip
        self.counts: dict[str, dict[str, tuple[int, int]]] = {}
        self.faults: list[str] = []
        self.is_turned = False

    def add(self, reason: str, name: str, *, objects: int = 0, pixels: int = 0) -> None:
        """Adds objects and pixels of a class to those that are lost for a reason."""
        names = self.counts.setdefault(reason, {})
        old_objects, old_pixels = names.get(name, (0, 0))
        names[name] = (old_objects + objects, old_pixels + pixels)

    def rescale_pixels(self, factor: float) -> None:
        """Multiplies all numbers of pixels, after the image was downscaled."""
        for names in self.counts.values():
            for name, (objects, pixels) in names.items():
                names[name] = (objects, round(pixels * factor))

    @contextlib.contextmanager
    def skip_faulty(self) -> Iterator[None]:
        """Ends quietly at a `UserError` of an annotation if such annotations are left out; otherwise raises it."""
        try:
            yield
        except UserError as error:
            if not self._may_skip:
                raise
            self.faults.append(str(error))

    def leave_out(self, error: UserError, name: str) -> None:
        """Counts a faulty object, of the class `name`, if such objects are left out; otherwise raises its error."""
        with self.skip_faulty():
            raise error
        self.add(FAULTY, name, objects=1)


def sum_counts(parts: Iterator[Counts]) -> dict[str, dict[str, tuple[int, int]]]:
    """Adds up the counts of several images or files."""
    total = Losses()
    for part in parts:
        for reason, names in part.items():
            for name, (objects, pixels) in names.items():
                total.add(reason, name, objects=objects, pixels=pixels)
    return total.counts
