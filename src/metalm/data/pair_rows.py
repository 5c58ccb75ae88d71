"""Image-text pairs of one source, in one lane, to packed rows.

Pairs are not cut, so rows have padding; the packer looks some pairs ahead and takes those that fill a row
best. The state is a place in the order and the places of the pairs that wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metalm.config.schema import ImageConfig
from metalm.data.failures import BadSample, FailureGuard
from metalm.data.images import cut_patches
from metalm.data.reader import SampleLocation
from metalm.data.rows import Row, RowSpans
from metalm.data.sample_stream import Order, Place, RowCounters, SampleStream
from metalm.data.sources import Source
from metalm.data.streams import Stream
from metalm.errors import ConfigError

PAIRS_AHEAD = 16
"""Pairs among which a packer looks for the one that fills a row best."""


class Pair(NamedTuple):
    """A pair that waits for its row: everything but the image, which is decoded when it gets there."""

    place: Place
    location: SampleLocation
    ids: np.ndarray  # [n] the caption's tokens
    prefix_length: int
    """Leading caption tokens that are encoded together with the image."""
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
        self._waiting: list[Pair] = []
        for waiting in state["waiting"] if state else []:
            location, captions = self._stream.read_again(Place(*waiting))
            self._waiting.append(self._pair(Place(*waiting), location, captions))

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON holds it."""
        return {
            "place": list(self._stream.place),
            "waiting": [list(pair.place) for pair in self._waiting],
            "counters": self.counters.state(),
        }

    def next_row(self) -> Row:
        """The next row: the pair that waits longest, then each time the largest that still fits."""
        pairs: list[Pair] = []
        patches: list[np.ndarray] = []
        room = self._length
        while True:
            self._look_ahead()
            pair = self._take_best(room) if pairs else self._waiting.pop(0)
            if pair is None:
                break
            try:
                pixels = self._source.pixels(pair.location, image_size=self._image.image_size)
            except BadSample as failure:
                shard = self._source.reader.path_of(pair.location.shard)
                self._image_guard.failed(failure.cause, shard, pair.location.sample)
                continue
            self._image_guard.passed()
            pairs.append(pair)
            patches.append(cut_patches(pixels, self._image))
            room -= self._size(pair)
        self.counters.rows += 1
        self.counters.samples += len(pairs)
        self.counters.tokens += self._length - room
        self.counters.padding_tokens += room
        self.counters.truncated_captions += sum(pair.truncated for pair in pairs)
        row = pair_row(pairs, patches, self._source, self._image)
        (spans,) = row.spans.values()
        self.counters.span_tokens += int((spans.bounds[:, 1] - spans.bounds[:, 0]).sum())
        return row

    def _look_ahead(self) -> None:
        while len(self._waiting) < PAIRS_AHEAD:
            read = self._stream.read_next()
            assert read is not None
            self._waiting.append(self._pair(*read))

    def _take_best(self, room: int) -> Pair | None:
        fitting = [number for number, pair in enumerate(self._waiting) if self._size(pair) <= room]
        if not fitting:
            return None
        return self._waiting.pop(max(fitting, key=lambda number: len(self._waiting[number].ids)))

    def _size(self, pair: Pair) -> int:
        return self._image.num_patches + len(pair.ids) + 2

    def _pair(self, place: Place, location: SampleLocation, captions: list[str]) -> Pair:
        which, prefix = self._draws.uniforms(place.ordinal, 2)
        ids = self._source.tokenizer.encode([captions[int(which * len(captions))]])[0]
        kept = ids[: self._max_caption]
        prefix_length = int(prefix * min(len(kept), self._max_text_positions + 1))
        return Pair(place, location, kept, prefix_length, truncated=len(kept) < len(ids))


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
