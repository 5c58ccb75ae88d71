"""Shards behind a URL, read whole from the front: `https://...` and `pipe:COMMAND`, opened by webdataset.

What is fetched or run is written in the operator's config (or typed) alone, as a template. Of an index,
which may come from anywhere, only the names of shards enter it, and those are refused unless they are plain
words: nothing that a shell or a URL gives a meaning.
"""

from __future__ import annotations

import logging
import re
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

import psutil

from metalm.config.schema import SHARD_URL_PATTERN
from metalm.errors import ConfigError, DataError

PLACEHOLDER = "{shard}"
ATTEMPTS = 5
"""Times that a stream is opened for the same bytes."""
DELAY_S = 1.0
"""Before the second attempt; doubled before each further one."""
STALL_S = 120.0
"""A stream that sends nothing for so long has failed."""
_PIECE_BYTES = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def check_url(template: str) -> None:
    """Raises ConfigError unless this may be the `url` of a source."""
    if not re.match(SHARD_URL_PATTERN, template):
        raise ConfigError(
            f"{template!r} is no URL of shards: expected https://.../{PLACEHOLDER}, http://.../{PLACEHOLDER} "
            f"or pipe:COMMAND {PLACEHOLDER}"
        )


def shard_url(template: str, name: str) -> str:
    """The URL of a shard.

    Raises:
        DataError: the name holds more than letters, digits, `.`, `_` and `-`.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise DataError(
            f"shard {name!r} cannot be read from a URL: a name may hold letters, digits, '.', '_' and '-'"
        )
    return template.replace(PLACEHOLDER, name)


def expand_names(patterns: Sequence[str]) -> list[str]:
    """Names of shards from brace patterns such as `pile-{00000..00099}.tar`, in order.

    Raises:
        ConfigError: the braces of one do not match.
    """
    from webdataset.shardlists import expand_urls

    try:
        return [name for pattern in patterns for name in expand_urls(pattern)]
    except ValueError as error:
        raise ConfigError(f"{' '.join(patterns)} is no pattern of names: {error}") from None


class RemoteShard:
    """One shard, open for reading forwards; to be used in a `with` statement or closed."""

    def __init__(self, url: str) -> None:
        """Opens the URL.

        Raises:
            ConfigError: webdataset refuses it (its WDS_SECURE is set).
            OSError: its program cannot be started.
        """
        from webdataset.gopen import gopen  # loads torch, which workers on a file system need not hold

        try:
            self._pipe = gopen(url, "rb", bufsize=0)
        except ValueError as error:
            raise ConfigError(f"webdataset refuses to open the url of a source: {error}") from error
        self._poll = select.poll()
        self._poll.register(self._pipe.stream, select.POLLIN)
        self.position = 0

    def __enter__(self) -> RemoteShard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end.

        Raises:
            OSError: the program ended with an error, or the stream stalls.
        """
        pieces = []
        while size:
            if not self._poll.poll(STALL_S * 1000):
                raise TimeoutError(f"nothing came for {STALL_S:g} s")
            piece = self._pipe.stream.read(min(size, _PIECE_BYTES))
            if not piece:
                if code := self._pipe.proc.wait(STALL_S):
                    raise OSError(f"its program ended with exit code {code}")
                break
            pieces.append(piece)
            size -= len(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def skip_to(self, position: int) -> None:
        """Passes over what comes before `position`; stops where the stream ends."""
        while self.position < position:
            if not self.read(min(_PIECE_BYTES, position - self.position)):
                return

    def close(self) -> None:
        """Ends the program, wherever it is, with those that it has started."""
        if self._pipe.proc.poll() is None:
            shell = psutil.Process(self._pipe.proc.pid)
            for program in (*shell.children(recursive=True), shell):
                with suppress(psutil.NoSuchProcess):
                    program.terminate()
        with suppress(OSError):  # that it was terminated is no error
            self._pipe.close()


def attempt(place: str, read: Callable[[], Result]) -> Result:
    """What `read` returns, at one of `ATTEMPTS` attempts.

    Args:
        place: what is read, as it may be shown.

    Raises:
        DataError: all of them failed.
    """
    delay_s = DELAY_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return read()
        except (OSError, EOFError) as error:
            failure = error
        logger.warning("attempt %d of %d to read %s failed: %s", number, ATTEMPTS, place, failure)
        if number < ATTEMPTS:
            time.sleep(delay_s)
            delay_s *= 2
    raise DataError(f"cannot read {place}: {failure} ({ATTEMPTS} attempts)") from failure
