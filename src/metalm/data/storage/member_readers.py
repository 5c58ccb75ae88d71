"""Members of shards, each checked against its tar header as it is read.

The header must be sound, of the size in the index and of a name that ends as that of such a member does: a
shard that was replaced under its index, and an index whose records point elsewhere, are detected at the first
sample that is read. On a file system one `pread` fetches a member with the header in
front of it; a remote shard is read forwards, a window of samples at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection

from metalm.data.storage.index import ShardIndex, check_shard_size
from metalm.data.storage.locations import SUFFIXES, SampleLocation
from metalm.data.storage.remote import RemoteShard, attempt, shard_url
from metalm.data.storage.tar import BLOCK, is_header_of
from metalm.errors import DataError
from metalm.shown_url import shown_url

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256


class FileReader:
    """Reads members of the shards of one index by byte range. Keeps a bounded number of files open."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._files: dict[int, int] = {}

    def read_ahead(self, locations: list[SampleLocation]) -> None:
        """Tells the file system which byte ranges will be read soon, one range per run of samples."""
        runs: dict[int, list[int]] = {}
        for location in locations:
            runs.setdefault(location.shard, []).append(location.offset)
        for shard, offsets in runs.items():
            first, last = min(offsets), max(offsets)
            os.posix_fadvise(self._file(shard), first, last - first + 1, os.POSIX_FADV_WILLNEED)

    def read(self, shard: int, offset: int, size: int, suffixes: Collection[str]) -> memoryview:
        """The bytes of one member, whose name ends in one of the suffixes.

        Raises:
            DataError: the shard cannot be read, or does not hold such a member there.
        """
        file = self._files.get(shard)
        if file is None:
            file = self._file(shard)
        try:
            data = os.pread(file, size + BLOCK, offset - BLOCK)
        except OSError as error:
            raise DataError(f"cannot read shard {self.path_of(shard)}: {error.strerror}") from error
        if len(data) != size + BLOCK or not is_header_of(data[:BLOCK], size, suffixes):
            raise _no_member(self.path_of(shard), offset, size)
        return memoryview(data)[BLOCK:]

    def read_sample(self, location: SampleLocation) -> memoryview:
        """A whole sample, as it lies in its shard: all of its members with their headers.

        Raises:
            DataError: as `read`.
        """
        file = self._files.get(location.shard)
        if file is None:
            file = self._file(location.shard)
        try:
            data = os.pread(file, location.end - location.first, location.first)
        except OSError as error:
            path = self.path_of(location.shard)
            raise DataError(f"cannot read shard {path}: {error.strerror}") from error
        return _checked_sample(memoryview(data), location, self.path_of)

    def path_of(self, shard: int) -> str:
        """The path of a shard, for messages."""
        return str(self._index.folder / self._index.shards[shard].name)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            entry = self._index.shards[shard]
            path = self._index.folder / entry.name
            check_shard_size(path, entry.size)
            while len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"cannot open shard {path}: {error.strerror}") from error
        return self._files[shard]


class RemoteReader:
    """Reads the shards of one index forwards, for one lane: it holds one stream and one window of samples."""

    def __init__(self, index: ShardIndex, url: str) -> None:
        self._index, self._url = index, url
        self._stream: RemoteShard | None = None
        self._stream_shard = -1
        self._window = memoryview(b"")
        self._window_start, self._window_shard = 0, -1

    def read_ahead(self, locations: list[SampleLocation]) -> None:
        """Reads the samples of one shard that will be asked for, and all that lies between them.

        The stream goes on from where it is if it can; else it is opened and read up to there, undecoded.

        Raises:
            DataError: the shard cannot be read so far, after some attempts.
        """
        if not locations:
            return
        shard = locations[0].shard
        first = min(location.first for location in locations)
        end = max(location.end for location in locations)
        window = attempt(self.path_of(shard), lambda: self._read_range(shard, first, end))
        self._window, self._window_start, self._window_shard = memoryview(window), first, shard

    def read(self, shard: int, offset: int, size: int, suffixes: Collection[str]) -> memoryview:
        """The bytes of one member of the samples last read ahead, whose name ends in one of the suffixes.

        Raises:
            DataError: the shard does not hold such a member there.
        """
        assert shard == self._window_shard
        first = offset - BLOCK - self._window_start
        data = bytes(self._window[first : first + BLOCK + size])  # a copy, so that the window can go
        if len(data) != size + BLOCK or not is_header_of(data[:BLOCK], size, suffixes):
            raise _no_member(self.path_of(shard), offset, size)
        return memoryview(data)[BLOCK:]

    def read_sample(self, location: SampleLocation) -> memoryview:
        """A whole sample of those last read ahead: all of its members with their headers.

        Raises:
            DataError: as `read`.
        """
        assert location.shard == self._window_shard
        first = location.first - self._window_start
        data = bytes(self._window[first : first + location.end - location.first])  # a copy, as in `read`
        return _checked_sample(memoryview(data), location, self.path_of)

    def path_of(self, shard: int) -> str:
        """Where a shard is, as it may be shown."""
        return shard_url(shown_url(self._url), self._index.shards[shard].name)

    def close(self) -> None:
        """Ends the stream."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read_range(self, shard: int, first: int, end: int) -> bytes:
        stream = self._stream
        if stream is None or self._stream_shard != shard or stream.position > first:
            self.close()
            stream = self._stream = RemoteShard(shard_url(self._url, self._index.shards[shard].name))
            self._stream_shard = shard
            if first:
                logger.info("%s: reading on from byte %d", self.path_of(shard), first)
        try:
            stream.skip_to(first)
            data = stream.read(end - first)
            if len(data) < end - first:
                size = self._index.shards[shard].size
                raise EOFError(f"it ends after {stream.position:,} of {size:,} bytes")
            return data
        except (OSError, EOFError):
            self.close()
            raise


def _checked_sample(data: memoryview, location: SampleLocation, path_of: Callable[[int], str]) -> memoryview:
    at = location.offset - BLOCK - location.first
    is_there = is_header_of(bytes(data[at : at + BLOCK]), location.size, SUFFIXES[location.format])
    if len(data) != location.end - location.first or not is_there:
        raise _no_member(path_of(location.shard), location.offset, location.size)
    return data


def _no_member(path: str, offset: int, size: int) -> DataError:
    return DataError(
        f"shard {path} holds no member of {size} bytes at byte {offset}, as its index states: it was "
        "replaced, or the index is damaged; index the folder again"
    )
