"""What a command writes where its user said: that it cannot be written there is theirs to mend."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metalm.errors import ConfigError


def is_no_room(error: BaseException) -> bool:
    """Whether what failed is writing to a full disk, or above a quota or a limit of files' sizes."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Write an output in the body.

    Args:
        path: of the file or folder that is written.
        advice: what the user is to do where it cannot be, such as "name another file with --out"; on a full
            disk it is to make room.

    Raises:
        ConfigError: an OSError came out of the body.
    """
    try:
        yield
    except OSError as error:
        if is_no_room(error):
            advice = "make room there, and start the same command again"
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; {advice}") from error


def require_file_place(path: Path, advice: str) -> None:
    """Whether a file can be written here, before the work that fills it; nothing is left behind.

    Raises:
        ConfigError: it cannot: it is a folder, or its own folder is missing or not for this user to write.
    """
    with writing(path, advice):
        if path.is_dir():
            raise OSError(errno.EISDIR, "it is a folder")
        if not path.parent.exists():
            raise OSError(errno.ENOENT, f"there is no folder {path.parent}")
        _try(path.parent)


def require_folder_place(folder: Path, advice: str) -> None:
    """Whether files can be written into this folder, which may be missing; nothing is left behind.

    Raises:
        ConfigError: they cannot.
    """
    with writing(folder, advice):
        _try(next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)))


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass
