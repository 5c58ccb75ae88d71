"""Attention of context-parallel ranks by DeepSpeed-Ulysses' exchange (Jacobs et al., 2023, arXiv 2309.14509).

Between layers a rank holds a run of the positions, with all heads of its tensor-parallel part. Around
attention the ranks exchange: each gets all positions of a share of these heads, so the mask is that of whole
rows.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.parallel.regions import all_to_all


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """A run of positions with all heads, to all positions with the rank's share of the heads.

    Where there are fewer key heads than ranks, several ranks get the same one.

    Args:
        query: [S / C, 1, H, K]; C ranks divide H.
        key: [S / C, 1, Hkv, K]; C divides Hkv, or Hkv divides C.
        value: like `key`.
        group: of the C context ranks.

    Returns:
        Queries [S, 1, H / C, K], keys and values [S, 1, max(Hkv / C, 1), K].

    Collective: all ranks of `group`, forward and backward.
    """
    ranks, key_heads = dist.get_world_size(group), key.shape[2]
    if (copies := math.lcm(key_heads, ranks) // key_heads) > 1:
        key, value = (part.repeat_interleave(copies, dim=2) for part in (key, value))
    # One exchange for the three: [C, S / C, heads of a rank, K].
    parts = [part.squeeze(1).unflatten(1, (ranks, -1)).transpose(0, 1) for part in (query, key, value)]
    received = all_to_all(torch.cat(parts, dim=2), group).flatten(0, 1)[:, None]
    queries, keys, values = received.split([part.shape[2] for part in parts], dim=2)
    return queries, keys, values


def to_positions(attended: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All positions of the rank's heads, [S, 1, H / C, K], to its run of positions with all heads.

    Returns:
        [S / C, 1, H, K].

    Collective: all ranks of `group`, forward and backward.
    """
    runs = attended.squeeze(1).unflatten(0, (dist.get_world_size(group), -1))
    return all_to_all(runs, group).transpose(0, 1).flatten(1, 2)[:, None]
