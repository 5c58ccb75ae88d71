"""Where the elements of a tensor-parallel shard lie in the whole parameter, and so in shards of another cut.

Everything is counted in flat, row-major elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Consecutive elements that a range has in common with one shard of another layout."""

    tensor_rank: int
    """Whose shard."""
    start: int
    """First element in that shard."""
    offset: int
    """First element in the range."""
    size: int


@dataclass(frozen=True)
class ShardLayout:
    """How a parameter is cut over tensor-parallel ranks.

    Dimension `dimension` consists of `stride` interleaved parts (2 for a fused gate and input), each of
    which is cut into `tensor_size` equal segments, one per rank. Without a dimension it is not cut.
    """

    shape: tuple[int, ...]
    dimension: int | None = None
    stride: int = 1
    tensor_size: int = 1

    def __post_init__(self) -> None:
        if self.dimension is None:
            if self.tensor_size != 1:
                raise ValueError(f"{self.tensor_size} shards, but no dimension to cut")
        elif not 0 <= self.dimension < len(self.shape) or self.stride < 1 or self.tensor_size < 1:
            raise ValueError(f"dimension {self.dimension} of {list(self.shape)}")
        elif self.shape[self.dimension] % (self.stride * self.tensor_size):
            parts = f"{self.stride} x {self.tensor_size} parts"
            raise ValueError(f"dimension {self.dimension} of {list(self.shape)} in {parts}")

    @property
    def size(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def shard_size(self) -> int:
        """Elements of one shard."""
        return self.size // self.tensor_size

    def runs_from(self, source: ShardLayout, tensor_rank: int, start: int, size: int) -> Iterator[Run]:
        """Where a range of one of this layout's shards is found in the shards of another layout.

        Args:
            source: another cut of a parameter of the same shape.
            tensor_rank: whose shard the range is of.
            start: first element of the range in that shard.
            size: elements of the range.

        Returns:
            Runs that cover the range, in its order; neighbours in one shard come as one run.
        """
        if self._is_cut_like(source):
            yield Run(tensor_rank, start, 0, size)
            return
        pending: Run | None = None
        offset = 0
        while offset < size:
            whole, left = self._to_whole(tensor_rank, start + offset)
            rank, found, source_left = source._to_shard(whole)
            length = min(left, source_left, size - offset)
            if pending and pending.tensor_rank == rank and pending.start + pending.size == found:
                pending = Run(rank, pending.start, pending.offset, pending.size + length)
            else:
                if pending:
                    yield pending
                pending = Run(rank, found, offset, length)
            offset += length
        if pending:
            yield pending

    def _is_cut_like(self, other: ShardLayout) -> bool:
        if self.tensor_size == other.tensor_size == 1:
            return True
        cuts = [(layout.dimension, layout.stride, layout.tensor_size) for layout in (self, other)]
        return cuts[0] == cuts[1]

    @property
    def _part(self) -> int:
        """Consecutive elements of the whole that hold one segment of every rank."""
        if self.dimension is None:
            return self.size
        return math.prod(self.shape[self.dimension :]) // self.stride

    def _to_whole(self, tensor_rank: int, position: int) -> tuple[int, int]:
        """Position in the whole of a shard's element, and how many follow it there without a gap."""
        segment = self._part // self.tensor_size
        number, inside = divmod(position, segment)
        return number * self._part + tensor_rank * segment + inside, segment - inside

    def _to_shard(self, whole: int) -> tuple[int, int, int]:
        """Shard and position in it of an element of the whole, and how many follow it there."""
        segment = self._part // self.tensor_size
        number, rest = divmod(whole, self._part)
        tensor_rank, inside = divmod(rest, segment)
        return tensor_rank, number * segment + inside, segment - inside
