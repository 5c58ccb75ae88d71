"""Where compiled code is kept between starts.

In the user's cache or, where that cannot be written, as is usual on compute nodes, in a private folder among
temporary files.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from metalm.errors import ConfigError


def cache_folder(name: str) -> Path:
    """A folder of the user's that can be written; it is made.

    Args:
        name: relative to `XDG_CACHE_HOME` (`~/.cache`).

    Raises:
        ConfigError: there is none, nor can one be made among temporary files.
    """
    try:
        return _writable((_user_cache() / name).absolute())
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        refused = error
    try:
        return _writable(_private_folder() / name)
    except OSError as error:
        raise ConfigError(
            f"compiled code can be kept neither in the user's cache ({refused}) nor among temporary files "
            f"({error}): set XDG_CACHE_HOME to a folder that you may write"
        ) from None


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path.home() / ".cache"


def _private_folder() -> Path:
    """Of this user alone: code that another one could have put there would be run.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"metalm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not this user's alone")
    return folder


def _writable(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder
