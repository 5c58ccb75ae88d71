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
        self,
        tokens: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        device: torch.device,
    ) -> SemiCausalBatch:
        """What is read next of each row, as a micro-batch [B, T].

        Args:
            tokens: of each row as many; one may be repeated with its place.
            places: where in their row they stand, each behind those before.
            labels: what they are to predict, where losses are asked for.
            device: of the decoder.
        """
        at = torch.tensor(places, device=device)
        unused = torch.zeros_like(at)
        return SemiCausalBatch(
            tokens=torch.tensor(tokens, device=device),
            labels=torch.tensor(labels, device=device),
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
        self._places = batch.attention_end.long() - 1
        return IntervalMask(batch.attention_start, batch.attention_end, self._length)

    def extend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hold the keys and values of a layer, and give what it attends to.

        Args:
            layer: its number.
            query: [1, H, N, K] of whole rows laid end to end, N = B * S, or of what is read next, N = B * T.
            key, value: [1, Hkv, N, K].

        Returns:
            The same of whole rows; of what is read next [B, H, T, K], and keys and values [B, Hkv, S, K].
        """
        if self._places is None:
            keys, values = (_by_rows(part, self._length).contiguous() for part in (key, value))
            self._held[layer] = keys, values
            return query, key, value
        keys, values = self._held[layer]
        rows, count = self._places.shape
        every = torch.arange(rows, device=keys.device)[:, None]
        keys[every, :, self._places] = _by_rows(key, count).transpose(1, 2)
        values[every, :, self._places] = _by_rows(value, count).transpose(1, 2)
        return _by_rows(query, count), keys, values


def _by_rows(part: Tensor, length: int) -> Tensor:
    """[1, H, B * length, K] to [B, H, length, K]."""
    return part[0].unflatten(1, (-1, length)).transpose(0, 1)
