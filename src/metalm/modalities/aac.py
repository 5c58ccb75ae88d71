"""Clips in AAC or ALAC, such as .m4a, which libsndfile does not read: preparations decode them, once."""

from __future__ import annotations

import atexit
import importlib.util
import os
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO

import numpy as np

from metalm.errors import BadSample, ConfigError

SUFFIXES = frozenset(("aac", "m4a", "m4b", "mp4"))
REQUEST = struct.Struct("<QQ")
"""Bytes of a clip, which follow, and the most values that it may have."""
ANSWER = struct.Struct("<IIQ")
"""Rate (0: a cause follows), channels, bytes of what follows."""
_MOST_SECONDS = 120.0
"""For one clip: whatever takes longer is damaged."""


def is_aac(data: bytes | memoryview) -> bool:
    """Whether it begins as a file of MPEG-4 (`ftyp`) or a stream of AAC does."""
    head = bytes(data[:8])
    return head[4:] == b"ftyp" or is_stream(head)


def decode_aac(data: bytes, max_values: int) -> tuple[np.ndarray, int]:
    """Samples [n, channels] float32 of the first sound in a file, and their rate in hertz.

    They are decoded in a process of its own: FFmpeg is not safe from damaged files, and a crash there is one
    bad sample here.

    Args:
        max_values: of all channels.

    Raises:
        BadSample: `undecodable_audio`, or `audio_bomb` for more values.
        ConfigError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ConfigError("m4a and aac need the package av: pip install 'metalm[m4a]'")
    return _DECODER.decode(data, max_values)


class _Decoder:
    """A child that decodes one clip after another; another one is started where one has crashed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        # A forked process would read its parent's answers, and end its parent's child.
        os.register_at_fork(after_in_child=self._forget)

    def decode(self, data: bytes, max_values: int) -> tuple[np.ndarray, int]:
        """As `decode_aac`."""
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "metalm.modalities.aac_decoding"]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        limit = threading.Timer(_MOST_SECONDS, self._child.kill)
        limit.start()
        try:
            return exchange(self._child, data, max_values)
        except (OSError, EOFError):  # it has crashed, or was ended
            self.close()
            raise BadSample("undecodable_audio") from None
        finally:
            limit.cancel()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            with suppress(OSError):  # what it was still to be sent
                self._child.communicate()
            self._child = None

    def _forget(self) -> None:
        self._child = None


_DECODER = _Decoder()


def exchange(child: subprocess.Popen[bytes], data: bytes, max_values: int) -> tuple[np.ndarray, int]:
    """Have the child decode a clip.

    Raises:
        BadSample: it cannot be decoded.
        EOFError, OSError: the child has ended.
    """
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(REQUEST.pack(len(data), max_values))
    child.stdin.write(data)
    child.stdin.flush()
    rate, channels, count = ANSWER.unpack(read_exactly(child.stdout, ANSWER.size))
    content = read_exactly(child.stdout, count)
    if not rate:
        raise BadSample(content.decode())
    return np.frombuffer(content, np.float32).reshape(-1, channels), rate


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: the stream ends before.
    """
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def is_stream(head: bytes) -> bool:
    """Whether it begins as a stream of AAC does."""
    return head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0
