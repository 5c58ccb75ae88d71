"""Dropout whose pattern is a function of (seed of the batch row, head, query, key), and of nothing else.

So a backward pass repeats it without storing it, all backends drop the same pairs, and a rank that holds some
of the heads drops what one rank holding all of them would. The generator is Philox-4x32-10 (Salmon et al.
2011): the key is the row's seed, the counter is (key // 4, query, head, 0), and word `key % 4` decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
# 2**64 / golden ratio, as a signed integer: rows of nearby seeds stay apart.
_ROW_STRIDE = 0x9E3779B97F4A7C15 - 2**64


def row_seeds(seed: Tensor | int | None, batch_size: int, device: torch.device) -> Tensor:
    """One int64 seed per batch row, `[B]`.

    Args:
        seed: integers `[B]`, used as they are; or one integer, from which the rows' seeds are derived; or
            None, to draw one from torch's generator of the device, without waiting for it.

    Raises:
        ValueError: the seed is a tensor of neither one nor `batch_size` elements.
    """
    if seed is None:
        seed = torch.randint(2**62, (1,), device=device)
    elif isinstance(seed, int):
        seed = torch.tensor([seed], dtype=torch.int64, device=device)
    if seed.dim() == 1 and seed.numel() == batch_size and batch_size > 1:
        return seed.to(torch.int64)
    if seed.numel() != 1:
        raise ValueError(f"dropout_seed has shape {list(seed.shape)}, expected one seed or [{batch_size}]")
    return seed.to(torch.int64).reshape(1) + torch.arange(batch_size, device=device) * _ROW_STRIDE


def drop_threshold(dropout: float) -> int:
    """A pair is dropped where its 32-bit random word is below this."""
    return min(round(dropout * 2**32), _WORD)


def keep_tile(
    seeds: Tensor, dropout: float, head_offset: int, num_heads: int, queries: slice, keys: slice
) -> Tensor:
    """Bool `[B, H, queries, keys]`: which pairs are kept. `seeds`: int64 `[B]`; heads start at the offset."""
    device = seeds.device
    first_group, last_group = keys.start // 4, -(-keys.stop // 4)
    group = torch.arange(first_group, last_group, device=device)
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    head = torch.arange(head_offset, head_offset + num_heads, device=device)[:, None, None]
    words = _philox(seeds[:, None, None, None], group, query, head)
    drawn = torch.stack(words, -1).flatten(-2)
    offset = keys.start - 4 * first_group
    return drawn[..., offset : offset + keys.stop - keys.start] >= drop_threshold(dropout)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words of a counter (c0, c1, c2, 0) under 64-bit keys, as int64, broadcast together."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c3 = torch.zeros_like(c2)
    for _ in range(_NUM_ROUNDS):
        # The low 64 bits of a wrapping int64 product are those of the unsigned one.
        product0, product1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + _KEY_INCREMENTS[0]) & _WORD, (key1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3
