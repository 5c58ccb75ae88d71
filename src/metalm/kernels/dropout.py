"""Dropout whose pattern is a function of seeds and positions, and of nothing else.

So a backward pass repeats it without storing it, all backends drop the same, and it does not depend on how
rows and spans are dealt to micro-batches, ranks and shares. The generator is Philox-4x32-10 (Salmon et al.
2011): the key is a seed, and one call gives four words.

Attention: the seed is the query's, the counter (key position // 4, query position, head, 0), and word
`key position % 4` decides; a rank that holds some of the heads drops what one rank holding all of them would.
Hidden vectors: the seed is the element's, the counter (column // 4, element position, site, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metalm.kernels.elementwise import Backend, choose_backend
from metalm.kernels.native_philox import native_keep

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


def site_seeds(seeds: Tensor, site: int) -> Tensor:
    """Seeds for one of a model's attention dropouts, of seeds that all of them share; int64 like `seeds`."""
    offset = ((site + 1) * _ROW_STRIDE + 2**63) % 2**64 - 2**63  # as int64 wraps
    return seeds + offset


def drop_threshold(dropout: float) -> int:
    """What is dropped has a 32-bit random word below this."""
    return min(round(dropout * 2**32), _WORD)


@dataclass(frozen=True, eq=False)
class DropoutPattern:
    """Which attention weights are dropped; tensors are contiguous."""

    rate: float
    seeds: Tensor  # [B, Sq] int64
    query_positions: Tensor  # [B, Sq] int32
    key_positions: Tensor  # [B, Sk] int32; keys 4i to 4i + 3 are consecutive, from a multiple of 4
    head_offset: int
    """Number of this rank's first head."""

    @property
    def keep_scale(self) -> float:
        """Factor of what is kept."""
        return 1.0 / (1.0 - self.rate)

    def keep_tile(self, rows: slice, num_heads: int, queries: slice, keys: slice) -> Tensor:
        """Bool `[rows, H, queries, keys]`: which pairs are kept."""
        first, last = keys.start // 4 * 4, keys.stop
        group = self.key_positions[rows, first:last:4] // 4
        head = torch.arange(self.head_offset, self.head_offset + num_heads, device=self.seeds.device)
        seeds, positions = self.seeds[rows, None, queries], self.query_positions[rows, None, queries]
        kept = _keep(
            seeds[..., None], group[:, None, None], positions[..., None], head[:, None, None], 0, self.rate
        )
        offset = keys.start - first
        return kept[..., offset : offset + keys.stop - keys.start]


def attention_pattern(
    rate: float,
    seed: Tensor | int | None,
    positions: Tensor | None,
    head_offset: int,
    *,
    batch_size: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
) -> DropoutPattern:
    """The pattern of one attention call; arguments as those of `interval_attention`.

    Raises:
        ValueError: the seed is a tensor of neither one, nor `[B]`, nor `[B, Sq]`, or the positions are not
            `[B, S]` of queries that are the keys.
    """
    if isinstance(seed, Tensor) and seed.dim() == 2:
        if seed.shape != (batch_size, num_queries):
            raise ValueError(
                f"dropout_seed has shape {list(seed.shape)}, expected [{batch_size}, {num_queries}]"
            )
        seeds = seed.to(torch.int64)
    else:
        seeds = row_seeds(seed, batch_size, device)[:, None].expand(batch_size, num_queries)
    if positions is None:
        query, key = (
            torch.arange(length, dtype=torch.int32, device=device).expand(batch_size, length)
            for length in (num_queries, num_keys)
        )
    elif positions.shape != (batch_size, num_queries) or num_keys != num_queries:
        raise ValueError(
            f"dropout_positions has shape {list(positions.shape)}, expected [{batch_size}, {num_queries}] "
            "of queries that are the keys, too"
        )
    else:
        query = key = positions.to(torch.int32)
    return DropoutPattern(rate, seeds.contiguous(), query.contiguous(), key.contiguous(), head_offset)


@dataclass(frozen=True, eq=False)
class HiddenPattern:
    """Which elements of hidden vectors `[..., D]` are dropped."""

    rate: float
    seeds: Tensor  # int64, broadcast to [...]
    positions: Tensor  # integers, broadcast to [...]: which vector of its seed it is
    site: int
    """Which of a model's dropouts this is, so that no two drop alike."""

    @property
    def scalars(self) -> tuple[int, float, int]:
        """Threshold, scale of what is kept, and site: what kernels take."""
        return drop_threshold(self.rate), 1.0 / (1.0 - self.rate), self.site

    def of_vectors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Each vector's seed (int64) and position (int32), contiguous `[...]`."""
        seeds, positions = (
            part.expand(hidden.shape[:-1]).contiguous() for part in (self.seeds, self.positions)
        )
        return seeds, positions.to(torch.int32)

    def keep(self, width: int) -> Tensor:
        """Bool `[..., width]`, of vectors of so many elements."""
        group = torch.arange(-(-width // 4), device=self.seeds.device)
        site = group.new_full((), self.site)
        return _keep(self.seeds[..., None], group, self.positions[..., None], site, 1, self.rate)[..., :width]

    def drop(self, hidden: Tensor, backend: Backend | None = None) -> Tensor:
        """Vectors with elements dropped, and the rest scaled up; differentiable.

        Args:
            hidden: `[..., D]` floating.
            backend: forces "triton" (CUDA, or Triton's interpreter), which stores nothing for the backward,
                or "torch" (any device), which stores a bool per element; see `choose_backend`.
        """
        if self.rate == 0.0:
            return hidden
        if (backend or choose_backend(hidden)) == "triton":
            from metalm.kernels.triton_hidden_dropout import triton_hidden_dropout

            threshold, scale, site = self.scalars
            return triton_hidden_dropout(hidden, *self.of_vectors(hidden), threshold, scale, site)
        return hidden * self.keep(hidden.shape[-1]) * self.scalars[1]


def hidden_dropout(
    hidden: Tensor,
    rate: float,
    seeds: Tensor,
    positions: Tensor,
    site: int,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Drop elements of vectors; see `HiddenPattern`."""
    return HiddenPattern(rate, seeds, positions, site).drop(hidden, backend)


def _keep(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int, rate: float) -> Tensor:
    """Bool: which elements, four of each counter, are kept; the first word varies along the last dimension.

    All are integers that are broadcast together; seed, c1 and c2 have a last dimension of 1, or none.
    """
    if seed.device.type == "cpu":
        kept = _native_keep(seed, c0, c1, c2, c3, drop_threshold(rate))
        if kept is not None:
            return kept
    words = _philox(seed.long(), c0.long(), c1.long(), c2.long(), torch.full_like(c0, c3, dtype=torch.int64))
    return torch.stack(words, -1).flatten(-2) >= drop_threshold(rate)


def _native_keep(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int, threshold: int) -> Tensor | None:
    shape = torch.broadcast_shapes(seed.shape, c0.shape, c1.shape, c2.shape)
    lines = [part.expand(*shape[:-1], 1).reshape(-1) for part in (seed.long(), c1, c2)]
    groups = c0.reshape(1, -1) if c0.numel() == shape[-1] else c0.expand(shape).reshape(-1, shape[-1])
    kept = native_keep(lines[0], groups, lines[1], lines[2], c3, threshold)
    return None if kept is None else kept.view(*shape[:-1], -1)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words of a counter under 64-bit keys, as int64, broadcast together."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_NUM_ROUNDS):
        # The low 64 bits of a wrapping int64 product are those of the unsigned one.
        product0, product1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + _KEY_INCREMENTS[0]) & _WORD, (key1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3
