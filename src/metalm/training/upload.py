"""Micro-batches on their way to the device: one copy each, beside the computation.

Only what this rank needs of a micro-batch goes there, from one pinned piece of memory to one of two on the
device: while a micro-batch is computed, the next one is copied, also the first one of the next step. A
piece is written to again when what was computed from it is done, which the device sees to by events; the host
waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.batch import SemiCausalBatch, in_one_piece, piece_of, views_in

_SLOTS = 2


@dataclass
class _Slot:
    """A piece of memory on the device."""

    content: Tensor  # uint8
    is_free: torch.cuda.Event
    """Recorded when the last computation that reads it is queued."""
    is_filled: torch.cuda.Event


class Uploads:
    """Copies this rank's part of micro-batches; on CPU, hands them out as they are."""

    def __init__(self, device: torch.device, rows_rank: int) -> None:
        """Stand by.

        Args:
            device: of the rank.
            rows_rank: among those with the same rows: whose share of the encoders' work is copied.
        """
        self._device, self._rows_rank = device, rows_rank
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots: list[_Slot] = []
        self._next_slot = 0
        self._begun: list[tuple[SemiCausalBatch, SemiCausalBatch, _Slot]] = []

    def begin(self, batch: SemiCausalBatch) -> None:
        """Start copying a micro-batch in host memory, which the next `use` but those begun before takes.

        At most two may be begun and not yet used up.
        """
        if self._stream is None:
            return
        part = batch.of_rank(self._rows_rank)
        piece = piece_of(part)
        if piece is None or not piece.is_pinned():
            part = in_one_piece(part, pinned=True)
            piece = piece_of(part)
        assert piece is not None
        slot = self._slot(piece.numel(), self._stream)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.is_free)
            slot.content[: piece.numel()].copy_(piece, non_blocking=True)
            slot.is_filled.record(self._stream)
        self._begun.append((batch, views_in(part, slot.content), slot))

    @contextmanager
    def use(self, batch: SemiCausalBatch) -> Iterator[SemiCausalBatch]:
        """The micro-batch on the device, for what is queued within; begun here if it was not before."""
        if self._stream is None:
            yield batch
            return
        if not self._begun or self._begun[0][0] is not batch:
            self._begun.clear()
            self.begin(batch)
        _, uploaded, slot = self._begun.pop(0)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(slot.is_filled)
        yield uploaded
        slot.is_free.record(current)

    def _slot(self, num_bytes: int, stream: torch.cuda.Stream) -> _Slot:
        """The next one, large enough, to be filled on a stream."""
        if len(self._slots) < _SLOTS:
            empty = torch.empty(0, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(empty, torch.cuda.Event(), torch.cuda.Event()))
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % _SLOTS
        if slot.content.numel() < num_bytes:
            # What is given up may still be read on the current stream, where it was made, and so is the new.
            size = num_bytes + num_bytes // 4
            slot.content = torch.empty(size, dtype=torch.uint8, device=self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return slot
