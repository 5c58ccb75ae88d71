"""Which runs of text tokens are encoded bidirectionally (PAPER section 4).

The body of each document in a row is tiled with candidate windows of the largest span length; each
window is taken with one probability per row, and holds a span of random length at a random place. The
probability makes the expected number of span tokens the wanted fraction of the row's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metalm.config.model_schema import TEXT
from metalm.config.schema import SpanConfig
from metalm.data.order.streams import Stream
from metalm.document import Document, Part

_DRAWS_PER_WINDOW = 3


class SpanSampler:
    """Draws the spans of text rows."""

    def __init__(self, config: SpanConfig, stream: Stream) -> None:
        self._fraction, self._min, self._max = config.fraction, config.min_length, config.max_length
        self._stream = stream

    def sample(self, bodies: list[tuple[int, int]], num_tokens: int, row: int) -> list[tuple[int, int]]:
        """The spans of a row, in order.

        A window is as long as the largest span, or as the body where that is shorter (but longer than the
        smallest). Lengths are uniform in (min_length, window]; all are the same where both limits are. Where
        the bodies hold too few windows for the fraction, all of them are taken.

        Args:
            bodies: start and end of every document's tokens without `<s>` and `</d>`.
            num_tokens: the row's tokens, that the fraction is of.
            row: ordinal of the row in the random stream.

        Returns:
            Start and end (exclusive) of each span.
        """
        shortest = min(self._min + 1, self._max)
        tilings, num_windows, capacity = [], 0, 0.0
        for start, end in bodies:
            length = end - start
            if length >= shortest:
                window = min(self._max, length)
                count = length // window
                tilings.append((start, length - count * window, window, count))
                num_windows += count
                capacity += count * (shortest + window) / 2
        if not num_windows or not self._fraction:
            return []
        probability = self._fraction * num_tokens / capacity
        draws = self._stream.uniforms(row, len(tilings) + _DRAWS_PER_WINDOW * num_windows).tolist()
        spans = []
        at = 0
        for start, slack, window, count in tilings:
            origin = start + int(draws[at] * (slack + 1))
            at += 1
            for number in range(count):
                if draws[at] < probability:
                    length = shortest + int(draws[at + 1] * (window - self._min))
                    first = origin + number * window + int(draws[at + 2] * (window - length + 1))
                    spans.append((first, first + length))
                at += _DRAWS_PER_WINDOW
        return spans


def text_document(
    body: np.ndarray,
    spans: Sequence[tuple[int, int]] = (),
    reader: str | None = None,
    *,
    begins: bool = True,
    ends: bool = True,
) -> Document:
    """A stretch of a document of text, all of which is trained on.

    Args:
        body: [n] int32, tokens without `<s>` and `</d>`.
        spans: start and end (exclusive) in `body` of what `reader` reads, in order and apart.
    """
    parts: list[Part] = []
    at = 0
    for start, end in spans:
        # Where one span follows at once on another, a part of no tokens keeps them apart.
        parts += [Part(TEXT, body[at:start]), Part(TEXT, body[start:end], reader)]
        at = end
    parts.append(Part(TEXT, body[at:]))
    return Document(tuple(parts), begins=begins, ends=ends)
