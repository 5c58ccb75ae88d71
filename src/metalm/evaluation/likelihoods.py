"""How likely the ends of documents are: what several begin with is read once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from metalm.document import Document, Part
from metalm.evaluation.continued_rows import ContinuedRows

Answer = TypeVar("Answer")
MOST_ENDINGS = 16


class Likelihood(NamedTuple):
    """Of the trained tokens of a document."""

    total: float
    """Sum of their log-likelihoods, natural."""
    num_tokens: int


class Ending(NamedTuple):
    """Tokens behind a beginning, which the decoder reads itself."""

    tokens: list[int]
    weights: list[float]
    """Of their log-likelihoods."""


@dataclass
class Begun:
    """Documents that begin alike, up to the first part that is trained on."""

    beginning: Document
    endings: list[Ending] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    """Which documents the endings are of."""


def by_beginning(documents: Sequence[Document], end_id: int) -> list[Begun]:
    """Documents, so that those which begin alike are together where that spares more than it costs.

    Endings of one beginning are read one after another. So there are `MOST_ENDINGS` of them at most, and a
    document that begins shorter than it ends is alone.

    Args:
        documents: from the first trained part on, their parts are text that the decoder reads.
        end_id: the token `</d>`.
    """
    found: list[Begun] = []
    newest: dict[Hashable, Begun] = {}
    for number, document in enumerate(documents):
        given = next((n for n, part in enumerate(document.parts) if part.weight > 0), len(document.parts))
        beginning, ending = document.prompt(given), _ending(document, given, end_id)
        is_shared = len(beginning) > len(ending.tokens)
        key: Hashable = (document.begins, *map(_key, beginning.parts)) if is_shared else number
        begun = newest.get(key)
        if begun is None or len(begun.endings) == MOST_ENDINGS:
            begun = newest[key] = Begun(beginning)
            found.append(begun)
        begun.endings.append(ending)
        begun.documents.append(number)
    return found


def of_documents(begun: Sequence[Begun], answers: Sequence[Sequence[Answer] | None]) -> list[Answer | None]:
    """What is said of each document, from what is said of the endings of each beginning, if anything."""
    found: dict[int, Answer] = {}
    for one, said in zip(begun, answers, strict=True):
        if said is not None:
            found |= dict(zip(one.documents, said, strict=True))
    return [found.get(number) for number in range(sum(len(one.documents) for one in begun))]


def _key(part: Part) -> Hashable:
    content = part.content.tobytes() if isinstance(part.content, np.ndarray) else part.content
    return part.modality, part.reader, part.tokens.tobytes(), content and bytes(content)


def _ending(document: Document, given: int, end_id: int) -> Ending:
    tokens: list[int] = []
    weights: list[float] = []
    for part in document.parts[given:]:
        assert part.reader is None and part.targets is None, "something is encoded behind what is trained on"
        tokens += part.tokens.tolist()
        weights += [part.weight] * len(part)
    if document.ends:
        tokens.append(end_id)
        weights.append(document.last_weight)
    return Ending(tokens, weights)


def likelihoods(
    rows: ContinuedRows, endings: Sequence[Sequence[Ending]], longest_of_turn: Sequence[int]
) -> list[list[Likelihood]]:
    """Of each row's endings.

    Args:
        rows: the beginnings.
        endings: of each row, first to last; may be none.
        longest_of_turn: tokens of the longest first, second, ... ending of the rows of all ranks.

    Collective: all ranks.
    """
    length = max(
        own + max((len(one.tokens) for one in of_row), default=1)
        for own, of_row in zip(rows.lengths, endings, strict=True)
    )
    first = rows.read(length + 1).double().log_softmax(dim=-1).tolist()
    # Where nothing follows, the row may be as long as any can be, and goes on from its own last place.
    begins = [
        own if any(one.tokens for one in of_row) else own - 1
        for own, of_row in zip(rows.lengths, endings, strict=True)
    ]
    found: list[list[Likelihood]] = [[] for _ in endings]
    for turn, longest in enumerate(longest_of_turn):
        # A row without a further ending goes on in any way, and says nothing.
        of_rows = [of_row[turn] if turn < len(of_row) else _NO_ENDING for of_row in endings]
        later = _later(rows, begins, of_rows, longest - 1) if longest > 1 else [[] for _ in of_rows]
        for row, one in enumerate(of_rows):
            if turn < len(endings[row]):
                found[row].append(_likelihood(one, first[row], later[row]))
    return found


def _later(
    rows: ContinuedRows, begins: Sequence[int], endings: Sequence[Ending], count: int
) -> list[list[float]]:
    """Log-likelihoods [rows, count] of each ending's tokens but the first; behind them is nothing of use."""
    read, places, labels = [], [], []
    for begin, one in zip(begins, endings, strict=True):
        steps = [min(step, max(len(one.tokens) - 2, 0)) for step in range(count)]
        tokens = [*one.tokens, 0, 0]
        read.append([tokens[step] for step in steps])
        places.append([begin + step for step in steps])
        labels.append([tokens[step + 1] for step in steps])
    found: list[list[float]] = (-rows.next_losses(read, places, labels)).double().tolist()
    return found


def _likelihood(ending: Ending, first: Sequence[float], later: Sequence[float]) -> Likelihood:
    said = [first[ending.tokens[0]], *later] if ending.tokens else []
    total = sum(weight * one for weight, one in zip(ending.weights, said, strict=False))
    return Likelihood(total, sum(weight > 0 for weight in ending.weights))


_NO_ENDING = Ending([], [])
