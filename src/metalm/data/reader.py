"""Members of shards by byte range, each checked against its tar header as it is read.

One `pread` fetches a member with the header in front of it. The size stated there must be the size in
the index: a shard that was replaced under its index is found out at the first sample read from it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from metalm.data.index import ShardIndex, check_shard_size
from metalm.data.tar import BLOCK, parse_size
from metalm.errors import DataError

MAX_OPEN_SHARDS = 256


class SampleLocation(NamedTuple):
    """Where a sample's members lie. Offsets are in the shard; a size of 0 means that there is none."""

    sample: int
    shard: int
    format: int
    offset: int
    size: int
    caption_offset: int
    caption_size: int
    json_offset: int
    json_size: int


class ShardReader:
    """Reads members of the shards of one index. Keeps a bounded number of files open."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._shard_ends = np.cumsum([shard.num_samples for shard in index.shards])
        self._files: dict[int, int] = {}

    def locate(self, samples: np.ndarray) -> list[SampleLocation]:
        """The locations of samples [n], in their order."""
        records = self._index.records[samples]
        shards = np.searchsorted(self._shard_ends, samples, side="right")
        starts = records["offset"].astype(np.int64)
        columns = (
            samples,
            shards,
            records["format"],
            starts + records["main_offset"],
            records["main_size"],
            starts + records["caption_offset"],
            records["caption_size"],
            starts + records["json_offset"],
            records["json_size"],
        )
        return list(map(SampleLocation._make, zip(*(c.tolist() for c in columns), strict=True)))

    def read_ahead(self, locations: list[SampleLocation]) -> None:
        """Tells the file system which byte ranges will be read soon, one range per run of samples."""
        runs: dict[int, list[int]] = {}
        for location in locations:
            runs.setdefault(location.shard, []).append(location.offset)
        for shard, offsets in runs.items():
            first, last = min(offsets), max(offsets)
            os.posix_fadvise(self._file(shard), first, last - first + 1, os.POSIX_FADV_WILLNEED)

    def read(self, shard: int, offset: int, size: int) -> memoryview:
        """The bytes of one member.

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
        if len(data) != size + BLOCK or parse_size(data) != size:
            raise DataError(
                f"shard {self.path_of(shard)} holds no member of {size} bytes at byte {offset}, as its index "
                "states: it was replaced; index the folder again"
            )
        return memoryview(data)[BLOCK:]

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
