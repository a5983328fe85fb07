"""The exception type for mistakes that a user can fix, and a helper that suggests close names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong config, file, record or request.

    The message is one sentence that names the thing (file, key, value), the allowed values, and the fix. The command
    line prints it without a traceback and exits with status 2.
    """


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
    close = difflib.get_close_matches(str(name), known, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    return UserError(f"Unknown {kind} '{name}'.{suggestion} Known: {', '.join(known) or 'none'}.")
