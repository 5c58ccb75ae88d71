"""What the Triton kernels share: loads, bias and dropout.

Scores live in base 2 and "raw": p = exp2(raw * scale_log2 - log_sum2). A bias comes divided by the scale, so
that it is added to the raw scores too.
"""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

# Below any score, above minus infinity: the maximum of a row that has seen nothing yet.
LOWEST = tl.constexpr(-1.0e30)
# Zeros on either side of a head's bias by distance; no block is longer.
BIAS_MARGIN = tl.constexpr(128)


@triton.jit
def load_rows(
    ptr,
    stride,
    rows,
    num_rows,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """`[rows, BLOCK_D]`, zero beyond the rows (if BOUNDED) and beyond the head size."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    if BOUNDED:
        inside = (rows < num_rows)[:, None]
        if HEAD_SIZE != BLOCK_D:
            inside = inside & (columns < HEAD_SIZE)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    if HEAD_SIZE != BLOCK_D:
        return tl.load(ptrs, mask=(columns < HEAD_SIZE)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def load_numbers(ptr, places, inside, other, BOUNDED: tl.constexpr):
    """One number for each place, `other` outside (if BOUNDED)."""
    if BOUNDED:
        return tl.load(ptr + places, mask=inside, other=other)
    return tl.load(ptr + places)


@triton.jit
def store_rows(ptr, stride, rows, num_rows, values, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores `[rows, BLOCK_D]` inside the rows and the head size."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_of_head(bias_ptr, head, num_queries, num_keys):
    """Where a head's bias of the distance `1 - num_queries` stands, behind its margin."""
    return bias_ptr + head * (num_queries + num_keys - 1 + 2 * BIAS_MARGIN) + BIAS_MARGIN


@triton.jit
def add_bias(raw, bias_ptr, first_query, first_key, num_queries, query_places, key_places):
    """Adds the bias of each pair's distance to raw scores; places, in the tile, broadcast to their shape.

    Pairs beyond the lengths read the margins: no load has a mask then, and addresses differ by constants,
    which saves up to 60 registers.
    """
    tl.static_assert((query_places.numel <= BIAS_MARGIN) & (key_places.numel <= BIAS_MARGIN))
    first = first_key - first_query + num_queries - 1
    return raw + tl.load(bias_ptr + first + (key_places - query_places))


@triton.jit
def add_bias_gradient(
    grad_bias_ptr,
    grad_scores,
    first_query,
    first_key,
    num_queries,
    num_keys,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds a tile of score gradients, zero where nothing is seen, to the sums of their distances.

    Turned by its number, each row of the tile has one distance per column, or, beyond the turn, the distance
    BLOCK_K less: two sums over rows, and two atomics per column, instead of one per score.
    """
    place = tl.arange(0, BLOCK_Q)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    turned = tl.gather(grad_scores, place % BLOCK_K, 1)
    for turn in tl.static_range((BLOCK_Q + BLOCK_K - 2) // BLOCK_K + 1):
        total = tl.sum(tl.where(place // BLOCK_K == turn, turned, 0.0), 0)
        distance = first_key - first_query + num_queries - 1 - turn * BLOCK_K + tl.arange(0, BLOCK_K)
        within = (distance >= 0) & (distance < num_queries + num_keys - 1)
        tl.atomic_add(grad_bias_ptr + distance, total, mask=within, sem="relaxed")


@triton.jit
def keep_pairs(
    seeds, head, query_positions, key_positions_ptr, first_key, num_keys, threshold, BLOCK_K: tl.constexpr
):
    """Which pairs `[queries, BLOCK_K]` dropout keeps; the pattern of `DropoutPattern.keep_tile`."""
    # The seeds themselves, for no key has a negative place. The compiler does not know that: else it would
    # derive the generator's ten round keys from them before the loop, and keep these in some 80 registers.
    seeds = seeds ^ (first_key >> 31)
    first_keys = first_key + 4 * tl.arange(0, BLOCK_K // 4)
    group = (tl.load(key_positions_ptr + first_keys, mask=first_keys < num_keys, other=0) // 4)[None, :]
    zero = tl.zeros_like(query_positions)[:, None] + tl.zeros_like(group)
    word0, word1, word2, word3 = tl.philox(
        seeds[:, None], zero + group, zero + query_positions[:, None], zero + head, zero
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    return tl.reshape(words, (query_positions.shape[0], BLOCK_K)) >= threshold.to(tl.uint32)
