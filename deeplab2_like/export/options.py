"""The options of an export; this module does not import TensorFlow."""

import dataclasses

from deeplab2_like.errors import UserError

# Enough for the cameras of today, and few enough that one image does not take all memory of a server.
DEFAULT_MAX_PIXELS = 50_000_000


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export is made for.

    Attributes:
        size: Height and width of all images; None: any.
        max_pixels: Largest number of pixels of an encoded image that is decoded.
        flip: Whether the network sees the mirror images, too, which doubles the time.
        xla: Whether to add the signature `compiled`, which a server without XLA may be unable to load.
        warmup_sizes: Heights and widths for which to add warm-up requests of TensorFlow Serving.

    Raises:
        UserError: If the options do not fit together.
    """

    size: tuple[int, int] | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    flip: bool = False
    xla: bool = False
    warmup_sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for what, size in (("size", self.size), *(("warm-up size", size) for size in self.warmup_sizes)):
            if size is None:
                continue
            if size[0] * size[1] > self.max_pixels:
                raise UserError(
                    f"The {what} {size[0]}x{size[1]} has more pixels than the limit of {self.max_pixels}; raise the "
                    "limit with --max-pixels, or give a smaller size."
                )
            if self.size is not None and size != self.size:
                raise UserError(
                    f"The {what} {size[0]}x{size[1]} differs from the only size of the export, "
                    f"{self.size[0]}x{self.size[1]}; give that, or leave out --size."
                )
