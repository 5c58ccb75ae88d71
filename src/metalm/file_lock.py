"""Locks on files (`flock`), which the system drops when their holder closes the file or dies."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
"""The last of a folder on NFS."""


def try_lock(file: int | IO[bytes] | IO[str]) -> bool | None:
    """Take the lock of an open file or folder, without waiting.

    Returns:
        Whether it could be taken; None where the file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _UNSUPPORTED else False
    return True


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Keep other processes that come here out of the body, where the file system knows locks.

    Args:
        path: of a file, which is made, and stays.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield
