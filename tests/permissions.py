"""A process that is bound by the modes of files, as users are: root is not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION = 0x20080522
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextmanager
def as_users_are() -> Iterator[None]:
    """Without the capabilities to read and write what modes forbid, in this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    words = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and again those above 31
    if libc.capget(header, words) != 0:
        pytest.skip("this system tells no capabilities")
    before = words[0]
    words[0] = before & ~_OVERRIDES
    assert libc.capset(header, words) == 0
    try:
        yield
    finally:
        words[0] = before
        assert libc.capset(header, words) == 0
