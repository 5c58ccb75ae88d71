"""The usable samples of one source in one lane, one after another, and what was counted on the way.

A place in the order (block, position in it) is all that is needed to go on from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from metalm.data.failures import FailureGuard
from metalm.data.row import Row
from metalm.data.sources import Source
from metalm.data.storage.locations import SampleLocation
from metalm.errors import BadSample, DataError

Decoded = TypeVar("Decoded")


class Order(Protocol):
    """The order of a source's samples: see `order`."""

    def block(self, lane: int, number: int) -> np.ndarray | None:
        """The samples of a block of a lane; None after the last block."""
        ...

    def first_block(self, lane: int) -> int:
        """Where a lane begins."""
        ...

    def following(self, block: int) -> int:
        """The block that a lane reads after this one."""
        ...


class Place(NamedTuple):
    """A sample's place in the order of a lane."""

    block: int
    position: int

    @property
    def ordinal(self) -> int:
        """One number for the place, for random streams."""
        return self.block << 32 | self.position


@dataclass
class RowCounters:
    """What a lane has made of one source since the run began. Part of its state."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    span_tokens: int = 0
    truncated_captions: int = 0
    overflowed_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def count_row(self, row: Row, sequence_length: int) -> None:
        """Add a row that was made."""
        self.rows += 1
        self.tokens += len(row.tokens)
        self.padding_tokens += sequence_length - len(row.tokens)
        for spans in row.spans.values():
            self.span_tokens += int((spans.bounds[:, 1] - spans.bounds[:, 0]).sum())

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "skipped": dict(self.skipped)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RowCounters:
        """The counters that `state` returned."""
        return cls(**{**state, "skipped": Counter(state["skipped"])})


class SampleStream(Generic[Decoded]):
    """The usable samples of a source in the order of one lane, decoded one by one."""

    def __init__(
        self,
        source: Source,
        order: Order,
        lane: int,
        decode: Callable[[SampleLocation], Decoded],
        guard: FailureGuard,
        place: Place,
    ) -> None:
        self._source, self._order, self._lane = source, order, lane
        self._decode, self._guard = decode, guard
        self._next = place
        self._block = -1
        self._locations: list[SampleLocation] | None = []

    @property
    def place(self) -> Place:
        """Of the next sample to be read."""
        return self._next

    def read_next(self) -> tuple[Place, SampleLocation, Decoded] | None:
        """The next usable sample and its place; None after the last sample of a finite order.

        Raises:
            DataError: too many bad samples in a row, or a shard that cannot be read.
        """
        while True:
            block, position = place = self._next
            if block != self._block:
                self._enter(block)
            if self._locations is None:
                return None
            if position == len(self._locations):
                self._next = Place(self._order.following(block), 0)
                continue
            self._next = Place(block, position + 1)
            location = self._locations[position]
            try:
                decoded = self._decode(location)
            except BadSample as failure:
                shard = self._source.reader.path_of(location.shard)
                self._guard.failed(failure.cause, shard, location.sample)
                continue
            self._guard.passed()
            return place, location, decoded

    def read_again(self, place: Place) -> tuple[SampleLocation, Decoded]:
        """A sample that was read before the run was interrupted.

        Raises:
            DataError: it cannot be read any more.
        """
        if place.block != self._block:
            self._enter(place.block)
        assert self._locations is not None
        location = self._locations[place.position]
        try:
            return location, self._decode(location)
        except BadSample as failure:
            raise DataError(
                f"sample {location.sample} in shard {self._source.reader.path_of(location.shard)} was read "
                f"before the run was interrupted, and is bad now ({failure.cause})"
            ) from failure

    def _enter(self, block: int) -> None:
        self._block = block
        samples = self._order.block(self._lane, block)
        self._locations = None if samples is None else self._source.index.locate(samples)
        if self._locations is not None:
            self._source.reader.read_ahead(self._locations)
