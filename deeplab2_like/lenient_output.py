"""Text outputs for terminals and pipes. Imports nothing that takes time, as every command uses them."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from deeplab2_like.printing import printable


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


class PrintableOutput(io.TextIOBase):
    """Text output that escapes the control characters of what is printed, which may be names from any source.

    Rich, which writes codes for colors and bars, escapes names itself and writes to the stream directly.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # The attribute in which Rich looks for the stream.

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self.rich_proxied_file.encoding

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return self.rich_proxied_file.fileno()

    def write(self, text: str) -> int:
        """Writes the text with escapes in place of control characters; line breaks are kept."""
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def flush(self) -> None:
        """Flushes."""
        self.rich_proxied_file.flush()


def unescaped(stream: TextIO) -> TextIO:
    """Returns the stream below a `PrintableOutput`, for output that has codes of its own; other streams as they are."""
    return stream.rich_proxied_file if isinstance(stream, PrintableOutput) else stream
