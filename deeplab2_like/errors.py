"""The exception type for mistakes that a user can fix, and helpers for its messages."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping

# A message may quote values of files. Some hundred characters are usual.
MAX_MESSAGE = 2000
_MAX_NAME = 100


class UserError(ValueError):
    """A wrong config, file, record or request.

    The message is one sentence that names the thing (file, key, value), the allowed values, and the fix. The command
    line prints it without a traceback and exits with status 2.

    Args:
        message: The message; of a message beyond 2,000 characters the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message, MAX_MESSAGE))


def shorten(text: str, length: int) -> str:
    """Leaves out the middle of a long text.

    Args:
        text: The text.
        length: Largest number of characters of the result.
    """
    if len(text) <= length:
        return text
    gap = " ... "
    begin = (length - len(gap)) // 2
    return text[:begin] + gap + text[len(text) - (length - len(gap) - begin) :]


@contextlib.contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Turns lack of memory for one input into a `UserError`, so that it counts as a faulty input.

    Args:
        name: Begins the message, such as "'a.png'".
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{name} needs more memory than there is; make it smaller, or free some memory.") from error


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Builds the error for a name that is not in a registry.

    Args:
        kind: Kind of the name ("system", "config key", ...).
        name: The unknown name.
        known: All allowed names.

    Returns:
        A `UserError` that lists the allowed names and suggests the closest one.
    """
    known = sorted(known)
    text = shorten(str(name), _MAX_NAME)
    return UserError(f"Unknown {kind} '{text}'.{did_you_mean(text, known)} Known: {', '.join(known) or 'none'}.")


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, shown: Mapping[str, str] | None = None) -> str:
    """Suggests known names.

    Args:
        name: The unknown name.
        known: All allowed names.
        n: Largest number of suggestions.
        shown: How each known name is written in the sentence; by default as it is.

    Returns:
        A sentence that begins with a space, such as " Did you mean 'steps'?"; empty if no name is close.
    """
    # The search takes time that grows with the square of the length.
    close = difflib.get_close_matches(name[:_MAX_NAME], list(known), n=n)
    quoted = (f"'{shown[other] if shown else other}'" for other in close)
    return f" Did you mean {' or '.join(quoted)}?" if close else ""
