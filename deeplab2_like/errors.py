"""The one exception type for mistakes a user can mend, and the helper that suggests close names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong config, file, record or request.

    The message is one sentence: what is wrong (file, key, value), what is allowed, how to mend it. The command line
    prints it without a traceback and exits with status 2.
    """


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Builds the error for a name that is not in a registry.

    Args:
        kind: What the name stands for, in words ("system", "config key", ...).
        name: The name received.
        known: All allowed names.

    Returns:
        A `UserError` that lists the allowed names, the closest first in a suggestion.
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    return UserError(f"Unknown {kind} '{name}'.{suggestion} Known: {', '.join(known) or 'none'}.")
