"""The earlier place of `read_checkpoint`, for programs that import it from here; it is in `files` now."""

from deeplab2_like.weights.files import read_checkpoint

__all__ = ["read_checkpoint"]
