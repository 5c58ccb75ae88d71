"""Writes samples into tar shards of a target size; a shard has its final name only once it is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from metalm.data.storage.tar import BLOCK, member_header, padding

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard."""

    name: str
    size: int
    num_samples: int


class ShardWriter:
    """Writes `NAME-00.tar`, `NAME-01.tar`, ... into a folder, one after the other.

    A shard is written under a name of this process, flushed to disk and renamed. The bytes depend on the
    samples alone (no time, no user), so writing a shard again replaces it by an equal one. A sample that
    would make a shard larger than `target_bytes` starts the next one.

    On an exception the unfinished shard is removed; finished ones stay, and are listed in `shards`.
    """

    def __init__(self, folder: Path, name: str, target_bytes: int) -> None:
        self.shards: list[WrittenShard] = []
        self._folder = folder
        self._name = name
        self._target_bytes = target_bytes
        self._file: BinaryIO | None = None
        self._size = 0
        self._num_samples = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            with suppress(OSError):  # of a full disk, again
                self._file.close()
            self._partial_path.unlink(missing_ok=True)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a sample: `members` maps a suffix (`txt`, `u16`, `jpg`, ...) to content."""
        parts = []
        for suffix, content in members.items():
            parts += [member_header(f"{key}.{suffix}", len(content)), content, padding(len(content))]
        sample = b"".join(parts)
        if self._file is not None and self._size + len(sample) > self._target_bytes:
            self._finish()
        if self._file is None:
            self._file = self._partial_path.open("wb")
            self._size = self._num_samples = 0
        self._file.write(sample)
        self._size += len(sample)
        self._num_samples += 1

    @property
    def _partial_path(self) -> Path:
        return self._folder / f".{self._name}.{os.getpid()}{PARTIAL_SUFFIX}"

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        name = f"{self._name}-{len(self.shards):02d}.tar"
        self._partial_path.replace(self._folder / name)
        self.shards.append(WrittenShard(name, size, self._num_samples))
        self._file = None
