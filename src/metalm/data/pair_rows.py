"""Image-text pairs of one source, in one lane, to packed rows.

Pairs are not cut, so rows have padding; the packer looks some pairs ahead and takes those that fill a row
best. The state is a place in the order and the places of the pairs that wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metalm.config.schema import ImageConfig
from metalm.data.failures import BadSample, FailureGuard
from metalm.data.images import cut_patches, decode_image
from metalm.data.index import SampleLocation
from metalm.data.rows import Row, RowSpans
from metalm.data.sample_stream import Order, Place, RowCounters, SampleStream
from metalm.data.sources import Source
from metalm.data.streams import Stream
from metalm.errors import ConfigError

PAIRS_AHEAD = 16
"""Pairs among which a packer looks for the one that fills a row best."""


class Pair(NamedTuple):
    """A pair of a row: everything but its image."""

    location: SampleLocation
    ids: np.ndarray  # [n] the caption's tokens
    prefix_length: int
    """Leading caption tokens that are encoded together with the image."""


class _Waiting(NamedTuple):
    """A pair that waits for its row. Its image is decoded when it gets there."""

    place: Place
    pair: Pair
    image: memoryview
    truncated: bool


class PairPacker:
    """Packs pairs `<s> [image + prefix] rest </d>` whole into rows."""

    def __init__(
        self,
        source: Source,
        order: Order,
        lane: int,
        *,
        image: ImageConfig,
        max_text_positions: int,
        sequence_length: int,
        draws: Stream,
        max_consecutive_failures: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.counters = RowCounters.from_state(state["counters"]) if state else RowCounters()
        self._source, self._image, self._length, self._draws = source, image, sequence_length, draws
        self._max_text_positions = max_text_positions
        self._max_caption = longest_caption(image, sequence_length)
        guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        place = Place(*state["place"]) if state else Place(0, 0)
        self._stream = SampleStream(source, order, lane, source.captions, guard, place)
        self._image_guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        self._waiting: list[_Waiting] = []
        for place in [Place(*waiting) for waiting in state["waiting"]] if state else []:
            self._waiting.append(self._wait(place, *self._stream.read_again(place)))

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON holds it."""
        return {
            "place": list(self._stream.place),
            "waiting": [list(waiting.place) for waiting in self._waiting],
            "counters": self.counters.state(),
        }

    def next_row(self) -> Row:
        """The next row: the pair that waits longest, then each time the largest that still fits."""
        taken: list[_Waiting] = []
        patches: list[np.ndarray] = []
        room = self._length
        while True:
            self._look_ahead()
            waiting = self._take_best(room) if taken else self._waiting.pop(0)
            if waiting is None:
                break
            try:
                pixels = decode_image(waiting.image, image_size=self._image.image_size)
            except BadSample as failure:
                location = waiting.pair.location
                shard = self._source.reader.path_of(location.shard)
                self._image_guard.failed(failure.cause, shard, location.sample)
                continue
            self._image_guard.passed()
            taken.append(waiting)
            patches.append(cut_patches(pixels, self._image))
            room -= self._size(waiting.pair)
        self.counters.rows += 1
        self.counters.samples += len(taken)
        self.counters.tokens += self._length - room
        self.counters.padding_tokens += room
        self.counters.truncated_captions += sum(waiting.truncated for waiting in taken)
        row = pair_row([waiting.pair for waiting in taken], patches, self._source, self._image)
        (spans,) = row.spans.values()
        self.counters.span_tokens += int((spans.bounds[:, 1] - spans.bounds[:, 0]).sum())
        return row

    def _look_ahead(self) -> None:
        while len(self._waiting) < PAIRS_AHEAD:
            read = self._stream.read_next()
            assert read is not None
            self._waiting.append(self._wait(*read))

    def _take_best(self, room: int) -> _Waiting | None:
        fitting = [n for n, waiting in enumerate(self._waiting) if self._size(waiting.pair) <= room]
        if not fitting:
            return None
        return self._waiting.pop(max(fitting, key=lambda n: len(self._waiting[n].pair.ids)))

    def _size(self, pair: Pair) -> int:
        return self._image.num_patches + len(pair.ids) + 2

    def _wait(self, place: Place, location: SampleLocation, captions: list[str]) -> _Waiting:
        which, prefix = self._draws.uniforms(place.ordinal, 2)
        ids = self._source.tokenizer.encode([captions[int(which * len(captions))]])[0]
        kept = ids[: self._max_caption]
        prefix_length = int(prefix * min(len(kept), self._max_text_positions + 1))
        pair = Pair(location, kept, prefix_length)
        return _Waiting(place, pair, self._source.image(location), truncated=len(kept) < len(ids))


def longest_caption(image: ImageConfig, sequence_length: int) -> int:
    """Caption tokens that fit in a row beside one image, `<s>` and `</d>`.

    Raises:
        ConfigError: there is no room for a caption.
    """
    longest = sequence_length - image.num_patches - 2
    if longest < 1:
        raise ConfigError(
            f"data.sequence_length is {sequence_length}: an image of {image.num_patches} patches, <s> and "
            "</d> leave no room for a caption"
        )
    return longest


def pair_row(pairs: list[Pair], patches: list[np.ndarray], source: Source, image: ImageConfig) -> Row:
    """The row [sum of the pairs' sizes] of pairs with their patches [num_patches, ...], one after another."""
    tokenizer = source.tokenizer
    assert source.config.encoder is not None
    placeholders = np.full(image.num_patches, tokenizer.paragraph_id)
    parts: list[Any] = []
    for pair in pairs:
        parts += [[tokenizer.start_id], placeholders, pair.ids, [tokenizer.document_id]]
    ends = np.cumsum([image.num_patches + len(pair.ids) + 2 for pair in pairs])
    first = np.concatenate(([0], ends[:-1])) + 1
    lengths = np.array([image.num_patches + pair.prefix_length for pair in pairs])
    spans = RowSpans(
        bounds=np.stack([first, first + lengths], axis=1),
        num_patches=np.full(len(pairs), image.num_patches),
        patches=np.concatenate(patches),
    )
    tokens = np.concatenate(parts).astype(np.int32)
    return Row(tokens, ends.tolist(), spans={source.config.encoder: spans}, source_id=source.source_id)
