"""Keys and values of rows that the decoder goes on from: a new token costs one position, not a whole row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metalm.batch import SemiCausalBatch
from metalm.kernels import IntervalMask


class DecoderCache:
    """Of one row for each document that is continued, as long as it may become.

    The first forward with it is that of the rows as they are; `next_batch` makes the input of what follows.
    """

    def __init__(self, length: int) -> None:
        """
        Args:
            length: S of the rows.
        """
        self._length = length
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._places: Tensor | None = None

    def keep(self, rows: Sequence[int]) -> None:
        """Go on from these rows of those that are held, in this order; a row may be taken several times."""
        for layer, (keys, values) in self._held.items():
            if list(rows) == list(range(len(keys))):
                return
            chosen = torch.tensor(rows, device=keys.device)
            self._held[layer] = keys[chosen], values[chosen]

    def next_batch(
        self, tokens: Sequence[int], places: Sequence[int], device: torch.device
    ) -> SemiCausalBatch:
        """The next token of each row, and where in the row it stands, as a micro-batch [B, 1]."""
        at = torch.tensor(places, device=device)[:, None]
        unused = torch.zeros_like(at)
        return SemiCausalBatch(
            tokens=torch.tensor(tokens, device=device)[:, None],
            labels=unused,
            loss_weights=unused.float(),
            positions=at,
            attention_start=unused.int(),
            attention_end=at.int() + 1,
            source_ids=unused[:, 0],
            dropout_seeds=unused[:, 0],
            encoders={},
        )

    def mask(self, batch: SemiCausalBatch) -> IntervalMask | None:
        """What the next tokens see of their rows; None: nothing is held yet."""
        if not self._held:
            return None
        self._places = batch.attention_end[:, 0].long() - 1
        return IntervalMask(batch.attention_start, batch.attention_end, self._length)

    def extend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hold the keys and values of a layer, and give what it attends to.

        Args:
            layer: its number.
            query: [1, H, N, K] of whole rows laid end to end, N = B * S, or of one next token of each, N = B.
            key, value: [1, Hkv, N, K].

        Returns:
            The same of whole rows; of next tokens [B, H, 1, K], and keys and values [B, Hkv, S, K].
        """
        if self._places is None:
            rows = (part[0].unflatten(1, (-1, self._length)).transpose(0, 1) for part in (key, value))
            keys, values = (part.contiguous() for part in rows)
            self._held[layer] = keys, values
            return query, key, value
        keys, values = self._held[layer]
        every = torch.arange(len(self._places), device=keys.device)
        keys[every, :, self._places] = key[0].transpose(0, 1)
        values[every, :, self._places] = value[0].transpose(0, 1)
        return query[0].transpose(0, 1)[:, :, None], keys, values
