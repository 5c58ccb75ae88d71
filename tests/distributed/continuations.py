"""Prompts that the tiny model continues, and what it is asked for."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from distributed.tiny import LENGTH, global_batch, to_row
from metalm.data.row import Row
from metalm.evaluation.continued_rows import ContinuedRows
from metalm.evaluation.generation import evaluating, generate_by_beams, generate_greedily
from metalm.evaluation.likelihoods import Ending, likelihoods
from reference.rows import DOCUMENT, PAD, Document, PlainRow

NEW_TOKENS = 9
ENDINGS = (
    [
        Ending([7, 9, 30], [1.0, 1.0, 1.0]),
        Ending([8], [1.0]),
        Ending([9, 9, 9, 9, 60], [0.0, 1.0, 0.5, 1.0, 2.0]),
    ],
    [Ending([DOCUMENT], [1.0])],
    [],
    [Ending([41, 40], [1.0, 1.0]), Ending([], [])],
    [],
    [Ending([70, 7, 7, 7], [1.0] * 4), Ending([7, 70, 7], [1.0] * 3)],
)
"""Of each document."""
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


def how_likely(model: Any, topology: Any, config: Any, tokenizer: Any, asked: list[Row]) -> list[list[Any]]:
    """Of `ENDINGS`, whose documents are shared out over the data-parallel ranks in turn."""
    lengths = [[len(one.tokens) for one in of_row] for of_row in ENDINGS]
    longest = [max(turn) for turn in zip_longest(*lengths, fillvalue=0)]
    own = ENDINGS[topology.data_rank :: topology.data_size]
    with evaluating(model):
        return likelihoods(ContinuedRows(model, topology, config, tokenizer, asked), own, longest)
