"""Spans in an encoder's own tokens: the text of a span, tokenised anew, takes as many positions as vectors.

A pretrained encoder has a tokenizer of its own. The row is written with the tokens that decoder and shards
share; each span then gives its place to the positions of its vectors, so that the row grows or shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tokenizers

from metalm.config.schema import EncoderConfig
from metalm.data.tokenizer import Tokenizer
from metalm.errors import DataError


@dataclass(frozen=True)
class Refitted:
    """A row's tokens with spans in the encoder's tokens."""

    tokens: np.ndarray  # [n] int32; in a span its own first token, which the position before it predicts
    document_ends: list[int]
    bounds: np.ndarray  # [K, 2] int64, in the new row
    ids: np.ndarray  # [sum of the spans' lengths] int64, the encoder's
    taken: int
    """Leading tokens of the old row that are in the new one."""


class SpanRetokenizer:
    """Cuts the text of spans into the tokens that an encoder was pretrained with."""

    def __init__(self, own: tokenizers.Tokenizer, shared: Tokenizer, longest: int) -> None:
        self._own, self._shared, self._longest = own, shared, longest

    def refit(
        self, tokens: np.ndarray, document_ends: list[int], bounds: np.ndarray, length: int
    ) -> Refitted:
        """Put the encoder's tokens in the places of the spans, and cut the row where it is full.

        A span whose tokens are too many for the encoder, or whose end would not be in the row, stays text.

        Args:
            tokens: [n] int32, in the shared tokenizer.
            document_ends: exclusive ends of the documents, which tile the row.
            bounds: [k, 2], start and end of each span, in order.
            length: the most positions that the new row may have.
        """
        kept: list[tuple[int, int]] = []
        found: list[np.ndarray] = []
        grown = 0
        for start, end in bounds.tolist():
            text = self._shared.decode(tokens[start:end])
            ids = np.array(self._own.encode(text).ids, np.int64)
            if not 0 < len(ids) <= self._longest:
                continue
            if start + grown + len(ids) > length:
                break
            kept.append((start, end))
            found.append(ids)
            grown += len(ids) - (end - start)
        taken = min(len(tokens), length - grown)
        return _write(tokens, document_ends, kept, found, taken)


def load_retokenizer(encoder: EncoderConfig, shared: Tokenizer) -> SpanRetokenizer | None:
    """What spans of an encoder of transformers need; None for one of ours, which shares the tokenizer.

    Raises:
        DataError: the folder has no tokenizer.json, or it has more ids than the encoder.
    """
    if encoder.pretrained is None:
        return None
    path = encoder.pretrained.path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist, but spans of text need it: save the encoder's fast tokenizer there"
        )
    try:
        own = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from None
    own.no_padding()
    own.no_truncation()
    if own.get_vocab_size() > encoder.pretrained.definition["vocab_size"]:
        raise DataError(
            f"{path} has {own.get_vocab_size()} ids, the encoder beside it "
            f"{encoder.pretrained.definition['vocab_size']}"
        )
    return SpanRetokenizer(own, shared, encoder.max_text_positions)


def _write(
    tokens: np.ndarray,
    document_ends: list[int],
    kept: list[tuple[int, int]],
    found: list[np.ndarray],
    taken: int,
) -> Refitted:
    parts, bounds = [], []
    at = grown = 0
    shifts = np.zeros(taken + 1, np.int64)  # of every old position
    for (start, end), ids in zip(kept, found, strict=True):
        parts += [tokens[at:start], np.full(len(ids), tokens[start])]
        bounds.append((start + grown, start + grown + len(ids)))
        grown += len(ids) - (end - start)
        shifts[end:] = grown
        at = end
    parts.append(tokens[at:taken])
    ends = [end for end in document_ends if end < taken] + [taken]
    return Refitted(
        tokens=np.concatenate(parts).astype(np.int32),
        document_ends=[int(end + shifts[end]) for end in ends],
        bounds=np.array(bounds, np.int64).reshape(-1, 2),
        ids=np.concatenate(found) if found else np.empty(0, np.int64),
        taken=taken,
    )
