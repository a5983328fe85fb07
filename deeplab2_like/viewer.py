"""Shows a file with the program that the system has for it."""

import os
import sys
import webbrowser
from pathlib import Path


def show_file(file: str | os.PathLike[str]) -> bool:
    """Opens a picture or a video with the system's viewer or browser, and does not wait until it is closed.

    Args:
        file: The file.

    Returns:
        Whether a program was started; False without a display, as on a server.
    """
    # Without a display `webbrowser` would start a browser in the terminal.
    is_desktop = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not is_desktop:
        return False
    try:
        return webbrowser.open(Path(file).absolute().as_uri())
    except webbrowser.Error:
        return False
