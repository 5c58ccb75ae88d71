"""Files that are read only if they are files, for opening a named pipe or a device could wait for ever; and
files that are replaced as a whole."""

from __future__ import annotations

import errno
import io
import os
import stat
from contextlib import suppress
from pathlib import Path


def open_regular(path: Path) -> io.BufferedReader:
    """A file, open for reading.

    Raises:
        OSError: it cannot be opened, is no regular file, or its name holds what no name can.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, f"no file has such a name ({error})", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return io.BufferedReader(io.FileIO(descriptor))


def read_regular(path: Path, max_bytes: int | None = None) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `open_regular`, or it is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {max_bytes:,} are read", str(path))
        return file.read()


def replace_file(path: Path, content: str | bytes, *, forced: bool = False) -> None:
    """Write a file, and its folder where there is none; readers find the old content or the new one.

    Args:
        content: a text is written in UTF-8.
        forced: to disk, so that a crash of the machine leaves one of them, too.

    Raises:
        OSError: it could not be written; no part of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if forced:
            force(partial)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    if forced:
        force(path.parent)


def force(path: Path) -> None:
    """Have what was written to a file or folder reach the disk.

    Raises:
        OSError: it could not be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_exists(path: Path) -> bool:
    """Whether there is something; False of a name that nothing can have."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True
