"""Spans in an encoder's own tokens: the text of a span, tokenised anew, takes as many positions as vectors.

A pretrained encoder has a tokenizer of its own. The row is written with the tokens that decoder and shards
share; each span then gives its place to the positions of its vectors, so that the row grows or shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import tokenizers

from metalm.config.model_schema import EncoderConfig
from metalm.data.tokenizer import Tokenizer, TokenizerPanic, panics_as_errors, parse_tokenizer
from metalm.document import Document, Part
from metalm.errors import BadSample, DataError
from metalm.regular_files import path_exists, read_regular


class SpanRetokenizer:
    """Cuts the text of spans into the tokens that an encoder was pretrained with."""

    def __init__(self, own: tokenizers.Tokenizer, shared: Tokenizer, longest: int) -> None:
        self._own, self._shared, self._longest = own, shared, longest

    def ids(self, text: str) -> np.ndarray:
        """The encoder's tokens of a text [n] int64, with the special ones that it has around it.

        Empty where the encoder's tokenizer gives up on the text, which then stays the decoder's.
        """
        try:
            with panics_as_errors():
                return np.array(self._own.encode(text).ids, np.int64)
        except TokenizerPanic:
            return np.empty(0, np.int64)

    def split(self, text: str) -> list[str]:
        """A text in consecutive pieces that the encoder reads, each as long as may be.

        Raises:
            BadSample: `too_long`, a single character that has too many tokens.
        """
        pieces = []
        while text:
            pieces.append(self.cut(text, self._longest, keeps_end=False))
            text = text[len(pieces[-1]) :]
        return pieces

    def cut(self, text: str, longest: int, *, keeps_end: bool) -> str:
        """The beginning of a text, or its end, that has at most so many tokens.

        Raises:
            BadSample: `too_long`, a single character has more.
        """
        if len(self.ids(text)) <= longest:
            return text
        offsets = self._own.encode(text, add_special_tokens=False).offsets
        # A piece alone can have more tokens than it has within the text.
        for count in range(min(longest, len(offsets)), 0, -1):
            kept = text[offsets[-count][0] :] if keeps_end else text[: offsets[count - 1][1]]
            if kept and len(self.ids(kept)) <= longest:
                return kept
        raise BadSample("too_long")

    def refit(self, documents: Sequence[Document], length: int) -> tuple[list[Document], int]:
        """Put the encoder's tokens in the places of the spans, and cut the row where it is full.

        A span's positions then hold its own first token, which the position before it predicts. A span whose
        tokens are too many for the encoder, or whose end would not be in the row, stays text.

        Args:
            documents: of one row; what has a reader is of this encoder.
            length: the most positions that the new row may have.

        Returns:
            The documents of the new row, and how many leading tokens of the old row they hold.
        """
        refitted: list[Document] = []
        at = grown = 0
        is_full = False
        for document in documents:
            parts: list[Part] = []
            at += document.begins
            for part in document.parts:
                if part.reader is not None and len(part):
                    ids = self.ids(self._shared.decode(part.tokens))
                    fits = not is_full and 0 < len(ids) <= self._longest
                    if fits and at + grown + len(ids) > length:
                        is_full, fits = True, False
                    if fits:
                        grown += len(ids) - len(part)
                        same = np.full(len(ids), part.tokens[0])
                        parts.append(replace(part, tokens=same, content=ids))
                    else:
                        parts.append(replace(part, reader=None))
                else:
                    parts.append(part)
                at += len(part)
            at += document.ends
            refitted.append(replace(document, parts=tuple(parts)))
        return _cut(refitted, length), min(at, length - grown)


def load_retokenizer(encoder: EncoderConfig, shared: Tokenizer) -> SpanRetokenizer | None:
    """What spans of an encoder of transformers need; None for one of ours, which shares the tokenizer.

    Raises:
        DataError: the folder has no tokenizer.json, or it has more ids than the encoder.
    """
    if encoder.pretrained is None:
        return None
    path = encoder.pretrained.path / "tokenizer.json"
    if not path_exists(path):
        raise DataError(
            f"{path} does not exist, but spans of text need it: save the encoder's fast tokenizer there"
        )
    try:
        own = parse_tokenizer(read_regular(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from None
    own.no_padding()
    own.no_truncation()
    size = max(own.get_vocab().values(), default=-1) + 1
    if size > encoder.pretrained.definition["vocab_size"]:
        raise DataError(
            f"{path} has {size} ids, the encoder beside it {encoder.pretrained.definition['vocab_size']}"
        )
    return SpanRetokenizer(own, shared, encoder.max_text_positions)


def _cut(documents: Sequence[Document], length: int) -> list[Document]:
    kept: list[Document] = []
    for document in documents:
        if not length:
            break
        kept.append(document if len(document) <= length else document.cut(length))
        length -= len(kept[-1])
    return kept
