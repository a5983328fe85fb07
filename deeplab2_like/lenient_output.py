"""Text output that outlives its terminal or reader. Imports nothing that takes time, as every command uses it."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class LenientOutput(io.TextIOBase):
    """Text output that drops text that cannot be written, so that a command outlives its terminal or reader.

    Args:
        stream: The stream to write to. After a failure its descriptor leads to the null device; otherwise the stream
            would try again when the process ends, and change its exit status.
        failure: The errors that count; `BrokenPipeError` is that of a reader that has ended.
    """

    def __init__(self, stream: TextIO, failure: type[OSError] = OSError) -> None:
        self._stream = stream
        self._failure = failure

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Writes, or drops the text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or drops the buffered text."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except self._failure:
            with contextlib.suppress(OSError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())
