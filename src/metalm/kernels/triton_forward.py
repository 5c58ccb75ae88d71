"""The Triton forward kernel: one program per block of queries, online softmax in float32."""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from metalm.kernels.triton_blocks import load_block_range
from metalm.kernels.triton_tile import (
    LOWEST,
    add_bias,
    bias_of_head,
    keep_pairs,
    load_rows,
    store_rows,
)


@triton.jit
def _attend_block(
    acc,
    row_max,
    row_sum,
    q,
    first_key,
    k_ptr,
    v_ptr,
    stride_k,
    bias_ptr,
    seeds,
    query_positions,
    key_positions_ptr,
    head,
    first_query,
    start,
    end,
    num_queries,
    num_keys,
    scale_log2,
    threshold,
    keep_scale,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    keys = first_key + tl.arange(0, BLOCK_K)
    k = load_rows(k_ptr, stride_k, keys, num_keys, HEAD_SIZE, BLOCK_D, BOUNDED=PARTIAL)
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BIAS:
        query_places, key_places = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
        raw = add_bias(raw, bias_ptr, first_query, first_key, num_queries, query_places, key_places)
    if PARTIAL:
        visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        raw = tl.where(visible, raw, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(raw, 1) * scale_log2)
    weights = tl.exp2(raw * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if HAS_DROPOUT:
        keep = keep_pairs(
            seeds, head, query_positions, key_positions_ptr, first_key, num_keys, threshold, BLOCK_K
        )
        weights = tl.where(keep, weights * keep_scale, 0.0)
    v = load_rows(v_ptr, stride_k, keys, num_keys, HEAD_SIZE, BLOCK_D, BOUNDED=PARTIAL)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["num_queries", "num_keys", "head_offset", "threshold"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    log_sum_ptr,
    start_ptr,
    end_ptr,
    ranges_ptr,
    bias_ptr,
    seeds_ptr,
    query_positions_ptr,
    key_positions_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_ob,
    stride_oh,
    stride_os,
    stride_mask,
    num_heads,
    groups,
    num_queries,
    num_keys,
    scale_log2,
    threshold,
    keep_scale,
    head_offset,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out `[B, H, Sq, D]` and log_sum float32 `[B, H, Sq]` (base 2; plus infinity where nothing is seen).

    Grid: (blocks of queries, B * H). Last blocks come first: under a causal mask they take longest.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first_query = block * BLOCK_Q
    queries = first_query + tl.arange(0, BLOCK_Q)
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    key_head = head // groups
    begin, full_begin, full_end, key_end = load_block_range(
        ranges_ptr, stride_mask, row, block, tl.num_programs(0)
    )
    inside = queries < num_queries
    q_ptr += row * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += row * stride_kb + key_head.to(tl.int64) * stride_kh
    v_ptr += row * stride_kb + key_head.to(tl.int64) * stride_kh
    if HAS_BIAS:
        bias_ptr = bias_of_head(bias_ptr, head, num_queries, num_keys)
    seeds = tl.load(seeds_ptr + row * num_queries + queries, mask=inside, other=0) if HAS_DROPOUT else 0
    query_positions = (
        tl.load(query_positions_ptr + row * num_queries + queries, mask=inside, other=0) if HAS_DROPOUT else 0
    )
    if HAS_DROPOUT:
        key_positions_ptr += row * num_keys
    drop_head = head + head_offset if HAS_DROPOUT else head

    q = load_rows(q_ptr, stride_qs, queries, num_queries, HEAD_SIZE, BLOCK_D, BOUNDED=True)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    # Values that do not change in a loop are computed again in it where keeping them would spill registers.
    LEAN: tl.constexpr = HAS_BIAS | HAS_DROPOUT | (BLOCK_D > 64)
    for first_key in tl.range(full_begin, full_end, BLOCK_K, disable_licm=LEAN):
        acc, row_max, row_sum = _attend_block(
            acc, row_max, row_sum, q, first_key, k_ptr, v_ptr, stride_ks, bias_ptr, seeds,
            query_positions, key_positions_ptr, drop_head, first_query, None, None, num_queries, num_keys,
            scale_log2, threshold, keep_scale,
            HEAD_SIZE, BLOCK_D, BLOCK_Q, BLOCK_K, HAS_BIAS, HAS_DROPOUT, PRECISION, PARTIAL=False,
        )  # fmt: skip
    # The partial blocks on both sides of the full ones, in one loop. They alone need the intervals.
    start = tl.load(start_ptr + row * stride_mask + queries, mask=inside, other=0)
    end = tl.load(end_ptr + row * stride_mask + queries, mask=inside, other=0)
    full_size = full_end - full_begin
    for block_first in tl.range(begin, key_end - full_size, BLOCK_K, disable_licm=LEAN):
        first_key = block_first + tl.where(block_first >= full_begin, full_size, 0)
        acc, row_max, row_sum = _attend_block(
            acc, row_max, row_sum, q, first_key, k_ptr, v_ptr, stride_ks, bias_ptr, seeds,
            query_positions, key_positions_ptr, drop_head, first_query, start, end, num_queries, num_keys,
            scale_log2, threshold, keep_scale,
            HEAD_SIZE, BLOCK_D, BLOCK_Q, BLOCK_K, HAS_BIAS, HAS_DROPOUT, PRECISION, PARTIAL=True,
        )  # fmt: skip

    seen = row_sum > 0
    acc = acc * (1.0 / tl.where(seen, row_sum, 1.0))[:, None]
    log_sum = tl.where(seen, row_max + tl.log2(tl.where(seen, row_sum, 1.0)), float("inf"))
    out_ptr += row * stride_ob + head.to(tl.int64) * stride_oh
    store_rows(out_ptr, stride_os, queries, num_queries, acc, HEAD_SIZE, BLOCK_D)
    tl.store(log_sum_ptr + tl.program_id(1).to(tl.int64) * num_queries + queries, log_sum, mask=inside)
