"""Prompts that the tiny model continues, and what it is asked for."""

from __future__ import annotations

from typing import Any

from distributed.tiny import LENGTH, global_batch, to_row
from metalm.data.row import Row
from metalm.evaluation.generation import generate_by_beams, generate_greedily
from reference.rows import DOCUMENT, PAD, Document, PlainRow

NEW_TOKENS = 9
BEAMS = {"num_beams": 3, "length_penalty": 0.8}


class SpecialTokens:
    """What generation needs of a tokenizer."""

    pad_id = PAD
    document_id = DOCUMENT


def documents() -> list[Document]:
    """Begun documents of both modalities: one that fills its row, one with less room than is asked for."""
    found = [row.documents[0] for row in global_batch(0)]
    begun = [
        Document(one.tokens[:length], one.spans)
        for one, length in zip(found[2:6], (8, 11, 9, 6), strict=True)
    ]
    filler = [5 + number % 70 for number in range(LENGTH)]
    return [*begun, Document(filler), Document(filler[: LENGTH - 4])]


def prompts() -> list[Row]:
    """The documents as rows."""
    return [to_row(PlainRow([one], 0)) for one in documents()]


def greedily(*asked: Any) -> list[list[int]]:
    """See `generate_greedily`."""
    return generate_greedily(*asked, NEW_TOKENS)


def by_beams(*asked: Any) -> list[list[int]]:
    """See `generate_by_beams`."""
    return generate_by_beams(*asked, NEW_TOKENS, **BEAMS)
