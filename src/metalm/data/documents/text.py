"""Text of which random runs are encoded: a stretch of a document as parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metalm.config.schema import TEXT
from metalm.document import Document, Part


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
