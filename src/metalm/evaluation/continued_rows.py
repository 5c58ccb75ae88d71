"""Rows that are read once, with their spans, and then continued in one way or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.data.collate import collate
from metalm.data.row import Row
from metalm.data.tokenizer import Tokenizer
from metalm.model.decoder_cache import DecoderCache
from metalm.objectives import Model, encode
from metalm.parallel.topology import Topology

T = TypeVar("T")


class ContinuedRows:
    """Open rows of one document each. All methods that ask the model are collective: all ranks."""

    def __init__(
        self, model: Model, topology: Topology, config: RunConfig, tokenizer: Tokenizer, rows: Sequence[Row]
    ) -> None:
        """
        Args:
            rows: each data-parallel rank has its own.
        """
        self.lengths = [len(row.tokens) for row in rows]
        self._model, self._topology, self._config = model, topology, config
        self._rows, self._pad_id = rows, tokenizer.pad_id
        self._multiple = config.parallel.length_multiple
        self._cache: DecoderCache | None = None

    def whole_length(self, length: int) -> int:
        """At least so many positions that every rank with these rows has as many of them."""
        return -(-length // self._multiple) * self._multiple

    def read(self, length: int) -> Tensor:
        """Logits [rows, vocabulary] of what follows each.

        Args:
            length: that rows may come to.
        """
        length, topology = self.whole_length(length), self._topology
        batch = collate(
            self._rows,
            model_config=self._config.model,
            sequence_length=length,
            tp_size=topology.tensor_size,
            pad_id=self._pad_id,
            cp_size=topology.context_size,
        ).to(topology.device)
        self._cache = DecoderCache(length)
        ends = [row * length + own - 1 for row, own in enumerate(self.lengths)]
        logits = self._logits(batch, encode(self._model, batch, topology), ends)
        self.keep(range(len(self.lengths)))
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on from these of the rows as they are held, in this order; one may be taken several times."""
        assert self._cache is not None
        self._cache.keep(self._padded(rows))

    def next_logits(self, tokens: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, vocabulary] behind the last of these tokens; see `DecoderCache.next_batch`."""
        batch = self._next_batch(tokens, places, tokens)
        return self._logits(batch, {}, [len(one) * (row + 1) - 1 for row, one in enumerate(tokens)])

    def next_losses(
        self,
        tokens: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
    ) -> Tensor:
        """Losses [rows, T] of what these tokens are to predict."""
        batch = self._next_batch(tokens, places, labels)
        losses: Tensor = self._model.decoder(batch, {}, cache=self._cache)
        if self._topology.context_size > 1:
            dist.all_reduce(losses, group=self._topology.context_group)
        return losses[: len(tokens)]

    def _next_batch(
        self,
        tokens: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
    ) -> SemiCausalBatch:
        assert self._cache is not None
        read, at, wanted = (self._padded(one) for one in (tokens, places, labels))
        return self._cache.next_batch(read, at, wanted, self._topology.device)

    def _logits(self, batch: SemiCausalBatch, encoded: dict[str, Tensor], places: Sequence[int]) -> Tensor:
        at = torch.tensor(places, device=self._topology.device)
        logits: Tensor = self._model.decoder(batch, encoded, logits_at=at, cache=self._cache)
        return logits

    def _padded(self, of_rows: Sequence[T]) -> list[T]:
        """With that of the first row again, so that every rank with these rows has as many."""
        missing = self.whole_length(len(of_rows)) - len(of_rows)
        return [*of_rows, *[of_rows[0]] * missing]
