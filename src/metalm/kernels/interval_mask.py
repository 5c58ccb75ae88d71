"""The one attention mask of this system: query q sees the keys of one interval [start(q), end(q)).

Two int32 vectors stand for a whole S x S matrix. Over the rows that see anything both are non-decreasing,
so the keys' view (which queries see key k) is an interval again, and a backward pass is the mirror image
of the forward. Building a mask never waits for the device; `validate` does, and is for tests and collators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from metalm.kernels.segments import Segments, find_segments

T = TypeVar("T")

_INT32_MAX = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class BlockRanges:
    """Which key blocks a block of queries needs; four int32 tensors `[B, query blocks]`, in key blocks.

    Blocks of `[first, last)` are visited and all others are skipped. Those of `[full_first, full_last)` are
    visible from every query of the block to every key, so they need no test per element.
    """

    first: Tensor
    full_first: Tensor
    full_last: Tensor
    last: Tensor


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Visible keys per query: keys `start[b, q] <= k < end[b, q]` of `num_keys`.

    Args:
        start: int32 `[B, Sq]`. B may be 1, and then holds for every row of a batch.
        end: int32 `[B, Sq]`; a row with `end == start` sees nothing and its output is zero.
        num_keys: number of keys Sk.
        segments: the same mask as runs that see only themselves, where it is of that form and the host knows
            it: see `find_segments`.

    The tensors must not be written to afterwards: derived views are cached.

    Raises:
        ValueError: wrong shape or dtype. The values are checked by `validate` only.
    """

    start: Tensor
    end: Tensor
    num_keys: int
    segments: Segments | None = None
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, bound in (("start", self.start), ("end", self.end)):
            if bound.dtype != torch.int32 or bound.dim() != 2:
                raise ValueError(
                    f"interval mask: {name} is {bound.dtype} {list(bound.shape)}, expected int32 [B, Sq]"
                )
        if self.start.shape != self.end.shape or self.start.device != self.end.device:
            raise ValueError(
                f"interval mask: start is {list(self.start.shape)} on {self.start.device}, "
                f"end is {list(self.end.shape)} on {self.end.device}; they must agree"
            )

    @property
    def batch_size(self) -> int:
        return self.start.shape[0]

    @property
    def num_queries(self) -> int:
        return self.start.shape[1]

    @property
    def device(self) -> torch.device:
        return self.start.device

    @classmethod
    def causal(
        cls,
        num_queries: int,
        num_keys: int | None = None,
        *,
        batch_size: int = 1,
        device: torch.device | str | None = None,
    ) -> IntervalMask:
        """Query q sees the keys up to itself; with more keys than queries, the last query sees all of them.

        Raises:
            ValueError: there are fewer keys than queries.
        """
        num_keys = num_queries if num_keys is None else num_keys
        if num_keys < num_queries:
            raise ValueError(
                f"causal mask: {num_keys} keys for {num_queries} queries, expected at least as many"
            )
        first = num_keys - num_queries + 1
        end = torch.arange(first, num_keys + 1, dtype=torch.int32, device=device).expand(batch_size, -1)
        segments = None
        if num_keys == num_queries:
            segments = Segments.of_rows(batch_size, num_queries, is_causal=True, device=device)
        return cls(torch.zeros_like(end), end, num_keys, segments)

    @classmethod
    def whole(
        cls, num_queries: int, num_keys: int, *, device: torch.device | str | None = None
    ) -> IntervalMask:
        """Every query sees every key, in all rows of a batch."""
        end = torch.full((1, num_queries), num_keys, dtype=torch.int32, device=device)
        segments = None
        if num_keys == num_queries:
            segments = Segments.of_rows(1, num_queries, is_causal=False, device=device)
        return cls(torch.zeros_like(end), end, num_keys, segments)

    @classmethod
    def joined(cls, start: Tensor, end: Tensor, segments: Segments | None) -> IntervalMask:
        """The rows `[B, S]` of a mask over its own queries, end to end as one row `[1, B * S]`.

        Args:
            start: int32 `[B, S]`.
            end: int32 `[B, S]`.
            segments: of all rows, if known.
        """
        num_rows, length = start.shape
        offset = torch.arange(num_rows, dtype=torch.int32, device=start.device)[:, None] * length
        offset = torch.where(end > start, offset, 0)
        return cls((start + offset).view(1, -1), (end + offset).view(1, -1), num_rows * length, segments)

    @classmethod
    def padded(cls, lengths: Tensor, num_positions: int) -> IntervalMask:
        """The first `lengths[b]` (integers `[B]`) positions of row b see each other; the rest is padding."""
        position = torch.arange(num_positions, dtype=torch.int32, device=lengths.device)
        length = lengths.to(torch.int32)[:, None]
        end = torch.where(position < length, length, 0)
        return cls(torch.zeros_like(end), end, num_positions)

    @classmethod
    def packed_documents(cls, document_start: Tensor) -> IntervalMask:
        """Causal attention inside each document of a packed row.

        Args:
            document_start: integers `[B, S]`, the first position of each position's document, -1 in padding.
        """
        return cls.semi_causal(document_start, None, bidirectional_spans=False)

    @classmethod
    def packed_spans(cls, span_start: Tensor, span_end: Tensor) -> IntervalMask:
        """Bidirectional attention inside each span of a packed row: an encoder's text spans or images.

        Args:
            span_start: integers `[B, S]`, the first position of each position's span.
            span_end: integers `[B, S]`, one past the last; anything not above `span_start` means padding.
        """
        start, end = span_start.to(torch.int32), span_end.to(torch.int32)
        visible = end > start
        return cls(torch.where(visible, start, 0), torch.where(visible, end, 0), start.shape[-1])

    @classmethod
    def semi_causal(
        cls, document_start: Tensor, span_end: Tensor | None, *, bidirectional_spans: bool
    ) -> IntervalMask:
        """The decoder's mask over packed documents with encoder spans docked in them.

        Args:
            document_start: integers `[B, S]`, the first position of each position's document, -1 in padding.
            span_end: integers `[B, S]`, one past the last position of the span that holds the position; 0
                outside spans. Spans must not cross documents. None where there are no spans.
            bidirectional_spans: positions of a span see the whole span; else the decoder is causal
                everywhere, as in the paper.
        """
        start = document_start.to(torch.int32)
        position = torch.arange(start.shape[-1], dtype=torch.int32, device=start.device)
        end = (position + 1).expand_as(start)
        if bidirectional_spans and span_end is not None:
            end = torch.maximum(end, span_end.to(torch.int32))
        real = start >= 0
        return cls(torch.where(real, start, 0), torch.where(real, end, 0), start.shape[-1])

    def to(self, device: torch.device | str) -> IntervalMask:
        """This mask on another device; leaving the CPU, it takes along which segments it is made of."""
        segments = self.segments
        if segments is None and self.device.type == "cpu" and self.num_queries == self.num_keys:
            segments = find_segments(self.start.numpy(), self.end.numpy())
        if segments is not None:
            segments = segments.to(device)
        return IntervalMask(self.start.to(device), self.end.to(device), self.num_keys, segments)

    @classmethod
    def of_views(cls, views: Tensor, segments: Segments | None) -> IntervalMask:
        """A mask of one row over its own queries, from what `views` gave, on any device.

        Args:
            views: int32 `[4, S]`.
            segments: of the row, if known.
        """
        start, end, first, last = views.split(1)
        mask = cls(start, end, views.shape[1], segments)
        mask._derived["transpose"] = cls(first, last, views.shape[1])
        return mask

    def views(self) -> Tensor:
        """Of one row over its own queries: `start`, `end`, and those of the keys' view, int32 `[4, S]`.

        For whoever makes a mask on the CPU: on a GPU the keys' view takes some 15 small kernels.
        """
        seen = self.transpose()
        return torch.cat([self.start, self.end, seen.start, seen.end])

    def validate(self) -> IntervalMask:
        """Checks the values, waiting for the device, and returns the mask.

        Raises:
            ValueError: names the first row and query whose interval leaves the keys, ends before it starts,
                starts or ends before that of an earlier query, or, empty, lies between queries of one key.
        """
        visible = self.end > self.start
        earlier_start = torch.where(visible, self.start, 0).cummax(-1).values
        earlier_end = torch.where(visible, self.end, 0).cummax(-1).values
        later_start = _reverse_cummin(torch.where(visible, self.start, _INT32_MAX))
        problems = (
            ("leaves the keys", (self.start < 0) | (self.end > self.num_keys)),
            ("ends before it starts", self.end < self.start),
            ("starts before an earlier query's", visible & (self.start < earlier_start)),
            ("ends before an earlier query's", visible & (self.end < earlier_end)),
            ("is empty between queries of one key", ~visible & (later_start < earlier_end)),
        )
        for what, wrong in problems:
            if bool(wrong.any()):
                row, query = (int(i) for i in wrong.nonzero()[0])
                interval = f"[{int(self.start[row, query])}, {int(self.end[row, query])})"
                raise ValueError(
                    f"interval mask: row {row}, query {query}: {interval} of {self.num_keys} keys {what}"
                )
        return self

    def segments_of_batch(self, num_rows: int) -> Segments | None:
        """The segments of `num_rows` rows that have this mask, or share its one row, end to end; cached."""
        if self.segments is None or self.batch_size == num_rows:
            return self.segments
        segments = self.segments
        return self.derived(
            f"segments of {num_rows} rows", lambda mask: segments.repeated(num_rows, mask.num_queries)
        )

    def transpose(self) -> IntervalMask:
        """The keys' view, `[B, Sk]` over Sq queries: the interval of queries that see each key; cached."""
        return self.derived("transpose", IntervalMask._transposed)

    def derived(self, name: str, build: Callable[[IntervalMask], T]) -> T:
        """`build(mask)`, kept with the mask: all layers of a step share one mask and what follows from it."""
        if name not in self._derived:
            self._derived[name] = build(self)
        derived: T = self._derived[name]
        return derived

    def _transposed(self) -> IntervalMask:
        visible = self.end > self.start
        # Empty rows take the neighbours' bounds, so that both sequences are sorted and each search ends at
        # a row that sees something.
        end = torch.where(visible, self.end, 0).cummax(-1).values
        start = _reverse_cummin(torch.where(visible, self.start, _INT32_MAX))
        key = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        key = key.expand(self.batch_size, -1).contiguous()
        first = torch.searchsorted(end.contiguous(), key, right=True, out_int32=True)
        last = torch.searchsorted(start.contiguous(), key, right=True, out_int32=True)
        seen = first < last
        return IntervalMask(torch.where(seen, first, 0), torch.where(seen, last, 0), self.num_queries)

    def block_ranges(self, block_q: int, block_k: int) -> BlockRanges:
        """Key blocks of `block_k` to visit for each block of `block_q` queries, from the bounds' extremes."""
        visible = self.end > self.start
        start, end = torch.where(visible, self.start, _INT32_MAX), torch.where(visible, self.end, 0)

        def blocks(bound: Tensor, beyond: int) -> Tensor:
            """`[B, blocks, block_q]`; `beyond` fills the last block and must not decide anything."""
            padding = -self.num_queries % block_q
            padded = torch.nn.functional.pad(bound, (0, padding), value=beyond)
            return padded.view(self.batch_size, -1, block_q)

        last = _ceil_div(blocks(end, 0).amax(-1), block_k)
        first = torch.minimum(blocks(start, _INT32_MAX).amin(-1) // block_k, last)
        full_first = torch.minimum(_ceil_div(blocks(start, 0).amax(-1), block_k), last)
        full_last = torch.minimum(blocks(end, _INT32_MAX).amin(-1) // block_k, last)
        return BlockRanges(first, full_first, torch.maximum(full_first, full_last), last)

    def visible_pairs(self) -> Tensor:
        """Number of (query, key) pairs that see each other, int64 `[B]`, on the mask's device."""
        return (self.end - self.start).clamp(min=0).sum(-1, dtype=torch.int64)

    def to_dense(self) -> Tensor:
        """Bool `[B, Sq, Sk]`, True where the key is visible. For references and pictures: quadratic."""
        key = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        return (key >= self.start[..., None]) & (key < self.end[..., None])


def _reverse_cummin(x: Tensor) -> Tensor:
    return x.flip(-1).cummin(-1).values.flip(-1)


def _ceil_div(x: Tensor, divisor: int) -> Tensor:
    return -(-x // divisor)
