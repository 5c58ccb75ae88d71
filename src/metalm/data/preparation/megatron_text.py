"""Texts of Megatron's token datasets, by the tokenizer that made the ids. A stretch is one of their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalm.data.preparation.megatron_tokens import TokenDataset
from metalm.data.preparation.text_document import (
    MAX_TEXT_BYTES,
    UNKNOWN_SUBSET,
    Document,
    TextRecord,
    make_document,
)
from metalm.data.tokenizer import TokenizerPanic, panics_as_errors, parse_tokenizer

MAX_IDS = MAX_TEXT_BYTES // 8
"""Of a document of token ids."""


@dataclass(frozen=True)
class TokensText:
    """Documents of a token dataset of Megatron."""

    dataset: TokenDataset
    tokenizer: bytes
    """The content of the tokenizer.json that made the ids."""
    is_stream = False

    @property
    def path(self) -> Path:
        return self.dataset.path

    @property
    def size(self) -> int:
        return self.dataset.size

    def num_stretches(self, stretch_bytes: int) -> int:
        return math.ceil(self.size / stretch_bytes)

    def stretches(self, stretch_bytes: int, number: int) -> Iterator[tuple[int, Iterator[TextRecord]]]:
        numbers = self.dataset.beginning_in(number * stretch_bytes, (number + 1) * stretch_bytes)
        yield number, self._records(numbers)

    def _records(self, numbers: range) -> Iterator[TextRecord]:
        decoder = _IdsDecoder(self.tokenizer)
        for number, ids in zip(numbers, self.dataset.documents(numbers, MAX_IDS), strict=True):
            document = "too_long" if ids is None else decoder.document(ids)
            share = (number + 1 - numbers.start) / len(numbers)
            yield TextRecord(number, {"document": number}, document, share)


class _IdsDecoder:
    """Ids back to text."""

    def __init__(self, definition: bytes) -> None:
        self._model = parse_tokenizer(definition)
        ids = list(self._model.get_vocab().values())
        self._is_known: np.ndarray = np.zeros(max(ids, default=-1) + 1, bool)
        self._is_known[ids] = True

    def document(self, ids: np.ndarray) -> Document | str:
        """The text of ids [n] without special tokens, such as their end; or why there is none."""
        if len(ids) and not (
            ids.min() >= 0 and ids.max() < len(self._is_known) and self._is_known[ids].all()
        ):
            return "token_out_of_range"
        try:
            with panics_as_errors():
                text = self._model.decode(ids.tolist(), skip_special_tokens=True)
        except TokenizerPanic:
            return "undecodable_tokens"
        return make_document(text, UNKNOWN_SUBSET)
