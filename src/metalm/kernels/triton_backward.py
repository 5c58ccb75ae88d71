"""The Triton backward kernels: queries' gradients over the mask, keys' and values' over its transpose.

Both recompute the weights from the saved log-sum-exp. Each gradient has one program that owns it, so there
are no atomics, except for the bias, whose pairs of one distance lie all over the matrix; a tile sums its own
first.
"""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from metalm.kernels.triton_blocks import load_block_range
from metalm.kernels.triton_tile import (
    add_bias,
    add_bias_gradient,
    bias_of_head,
    keep_pairs,
    load_numbers,
    load_rows,
    store_rows,
)


@triton.jit
def _query_block(
    grad_q,
    q,
    grad,
    log_sum,
    delta,
    first_key,
    k_ptr,
    v_ptr,
    stride_k,
    bias_ptr,
    grad_bias_ptr,
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
    NEEDS_BIAS_GRADIENT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    keys = first_key + tl.arange(0, BLOCK_K)
    k = load_rows(k_ptr, stride_k, keys, num_keys, HEAD_SIZE, BLOCK_D, BOUNDED=PARTIAL)
    v = load_rows(v_ptr, stride_k, keys, num_keys, HEAD_SIZE, BLOCK_D, BOUNDED=PARTIAL)
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BIAS:
        query_places, key_places = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
        raw = add_bias(raw, bias_ptr, first_query, first_key, num_queries, query_places, key_places)
    weights = tl.exp2(raw * scale_log2 - log_sum[:, None])
    if PARTIAL:
        visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        weights = tl.where(visible, weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = keep_pairs(
            seeds, head, query_positions, key_positions_ptr, first_key, num_keys, threshold, BLOCK_K
        )
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    grad_scores = weights * (grad_weights - delta[:, None])
    grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    if NEEDS_BIAS_GRADIENT:
        add_bias_gradient(
            grad_bias_ptr, grad_scores, first_query, first_key, num_queries, num_keys, BLOCK_Q, BLOCK_K
        )
    return grad_q


@triton.jit(do_not_specialize=["num_queries", "num_keys", "head_offset", "threshold"])
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    log_sum_ptr,
    delta_ptr,
    grad_q_ptr,
    start_ptr,
    end_ptr,
    ranges_ptr,
    bias_ptr,
    grad_bias_ptr,
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
    scale,
    scale_log2,
    threshold,
    keep_scale,
    head_offset,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEEDS_BIAS_GRADIENT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_q, laid out as out; delta float32 `[B, H, Sq]` for the other kernel; adds up grad_bias.

    Grid: (blocks of queries, B * H).
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
    long_head = head.to(tl.int64)
    q_ptr += row * stride_qb + long_head * stride_qh
    k_ptr += row * stride_kb + key_head.to(tl.int64) * stride_kh
    v_ptr += row * stride_kb + key_head.to(tl.int64) * stride_kh
    out_ptr += row * stride_ob + long_head * stride_oh
    grad_ptr += row * stride_ob + long_head * stride_oh
    if HAS_BIAS:
        bias_ptr = bias_of_head(bias_ptr, head, num_queries, num_keys)
    if NEEDS_BIAS_GRADIENT:
        grad_bias_ptr += head * (num_queries + num_keys - 1)
    seeds = tl.load(seeds_ptr + row * num_queries + queries, mask=inside, other=0) if HAS_DROPOUT else 0
    query_positions = (
        tl.load(query_positions_ptr + row * num_queries + queries, mask=inside, other=0) if HAS_DROPOUT else 0
    )
    if HAS_DROPOUT:
        key_positions_ptr += row * num_keys
    drop_head = head + head_offset if HAS_DROPOUT else head

    q = load_rows(q_ptr, stride_qs, queries, num_queries, HEAD_SIZE, BLOCK_D, BOUNDED=True)
    grad = load_rows(grad_ptr, stride_os, queries, num_queries, HEAD_SIZE, BLOCK_D, BOUNDED=True)
    out = load_rows(out_ptr, stride_os, queries, num_queries, HEAD_SIZE, BLOCK_D, BOUNDED=True)
    # Sum over keys of weight times its gradient, which the softmax's backward subtracts.
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    statistics = tl.program_id(1).to(tl.int64) * num_queries + queries
    tl.store(delta_ptr + statistics, delta, mask=inside)
    log_sum = tl.load(log_sum_ptr + statistics, mask=inside, other=float("inf"))

    grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    # As in the forward kernel.
    LEAN: tl.constexpr = HAS_BIAS | HAS_DROPOUT
    for first_key in tl.range(full_begin, full_end, BLOCK_K, disable_licm=LEAN):
        grad_q = _query_block(
            grad_q, q, grad, log_sum, delta, first_key, k_ptr, v_ptr, stride_ks, bias_ptr,
            grad_bias_ptr, seeds, query_positions, key_positions_ptr, drop_head, first_query,
            None, None, num_queries, num_keys, scale_log2, threshold, keep_scale,
            HEAD_SIZE, BLOCK_D, BLOCK_Q, BLOCK_K, HAS_BIAS, NEEDS_BIAS_GRADIENT, HAS_DROPOUT,
            PRECISION, PARTIAL=False,
        )  # fmt: skip
    full_size = full_end - full_begin
    start = tl.load(start_ptr + row * stride_mask + queries, mask=inside, other=0)
    end = tl.load(end_ptr + row * stride_mask + queries, mask=inside, other=0)
    for block_first in tl.range(begin, key_end - full_size, BLOCK_K, disable_licm=LEAN):
        first_key = block_first + tl.where(block_first >= full_begin, full_size, 0)
        grad_q = _query_block(
            grad_q, q, grad, log_sum, delta, first_key, k_ptr, v_ptr, stride_ks, bias_ptr,
            grad_bias_ptr, seeds, query_positions, key_positions_ptr, drop_head, first_query,
            start, end, num_queries, num_keys, scale_log2, threshold, keep_scale,
            HEAD_SIZE, BLOCK_D, BLOCK_Q, BLOCK_K, HAS_BIAS, NEEDS_BIAS_GRADIENT, HAS_DROPOUT,
            PRECISION, PARTIAL=True,
        )  # fmt: skip
    grad_q_ptr += row * stride_ob + long_head * stride_oh
    store_rows(grad_q_ptr, stride_os, queries, num_queries, grad_q * scale, HEAD_SIZE, BLOCK_D)


@triton.jit
def _key_block(
    grad_k,
    grad_v,
    k,
    v,
    first_query,
    q_ptr,
    stride_q,
    grad_ptr,
    stride_g,
    log_sum_ptr,
    delta_ptr,
    bias_ptr,
    seeds_ptr,
    query_positions_ptr,
    key_positions_ptr,
    head,
    first_key,
    query_start,
    query_end,
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
    queries = first_query + tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr, stride_q, queries, num_queries, HEAD_SIZE, BLOCK_D, BOUNDED=PARTIAL)
    grad = load_rows(grad_ptr, stride_g, queries, num_queries, HEAD_SIZE, BLOCK_D, BOUNDED=PARTIAL)
    inside = queries < num_queries
    log_sum = load_numbers(log_sum_ptr, queries, inside, float("inf"), BOUNDED=PARTIAL)
    # Everything is [keys, queries] here, so that both gradients accumulate without a transposed copy.
    raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if HAS_BIAS:
        query_places, key_places = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_K)[:, None]
        raw = add_bias(raw, bias_ptr, first_query, first_key, num_queries, query_places, key_places)
    weights = tl.exp2(raw * scale_log2 - log_sum[None, :])
    if PARTIAL:
        visible = (queries[None, :] >= query_start[:, None]) & (queries[None, :] < query_end[:, None])
        weights = tl.where(visible, weights, 0.0)
    dropped = weights
    if HAS_DROPOUT:
        seeds = load_numbers(seeds_ptr, queries, inside, 0, BOUNDED=PARTIAL)
        query_positions = load_numbers(query_positions_ptr, queries, inside, 0, BOUNDED=PARTIAL)
        keep = keep_pairs(
            seeds, head, query_positions, key_positions_ptr, first_key, num_keys, threshold, BLOCK_K
        )
        keep = tl.trans(keep)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
    grad_v = tl.dot(dropped.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if HAS_DROPOUT:
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    # Not before it is needed: each thread holds eight of them.
    delta = load_numbers(delta_ptr, queries, inside, 0.0, BOUNDED=PARTIAL)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["num_queries", "num_keys", "head_offset", "threshold"])
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    log_sum_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    query_start_ptr,
    query_end_ptr,
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
    stride_gb,
    stride_gh,
    stride_gs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_mask,
    num_key_heads,
    num_queries,
    num_keys,
    scale,
    scale_log2,
    threshold,
    keep_scale,
    head_offset,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_k and grad_v `[B, Hkv, Sk, D]`, summed over the query heads of the group; needs delta.

    The intervals are those of the transposed mask, `[B, Sk]` over queries. Grid: (blocks of keys, B * Hkv).
    First blocks come first: under a causal mask they take longest.
    """
    first_key = tl.program_id(0) * BLOCK_K
    keys = first_key + tl.arange(0, BLOCK_K)
    row = (tl.program_id(1) // num_key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % num_key_heads).to(tl.int64)
    inside = keys < num_keys
    begin, full_begin, full_end, end = load_block_range(
        ranges_ptr, stride_mask, row, tl.program_id(0), tl.num_programs(0)
    )
    full_size = full_end - full_begin

    k_ptr += row * stride_kb + key_head * stride_kh
    v_ptr += row * stride_kb + key_head * stride_kh
    k = load_rows(k_ptr, stride_ks, keys, num_keys, HEAD_SIZE, BLOCK_D, BOUNDED=True)
    v = load_rows(v_ptr, stride_ks, keys, num_keys, HEAD_SIZE, BLOCK_D, BOUNDED=True)
    if HAS_DROPOUT:
        seeds_ptr += row * num_queries
        query_positions_ptr += row * num_queries
        key_positions_ptr += row * num_keys

    grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # As in the forward kernel.
    LEAN: tl.constexpr = HAS_BIAS | HAS_DROPOUT | (BLOCK_D > 64) | (GROUPS > 1)
    # A constant number of members: a loop over one is no loop, which frees many registers.
    for member in tl.range(0, GROUPS, disable_licm=GROUPS > 1):
        head = key_head * GROUPS + member
        head_q_ptr = q_ptr + row * stride_qb + head * stride_qh
        head_grad_ptr = grad_ptr + row * stride_gb + head * stride_gh
        statistics = (row * num_key_heads * GROUPS + head) * num_queries
        head_log_sum_ptr, head_delta_ptr = log_sum_ptr + statistics, delta_ptr + statistics
        head_bias_ptr = bias_of_head(bias_ptr, head, num_queries, num_keys) if HAS_BIAS else bias_ptr
        drop_head = head.to(tl.int32) + head_offset if HAS_DROPOUT else head.to(tl.int32)
        for first_query in tl.range(full_begin, full_end, BLOCK_Q, disable_licm=LEAN):
            grad_k, grad_v = _key_block(
                grad_k, grad_v, k, v, first_query, head_q_ptr, stride_qs, head_grad_ptr, stride_gs,
                head_log_sum_ptr, head_delta_ptr, head_bias_ptr, seeds_ptr, query_positions_ptr,
                key_positions_ptr, drop_head, first_key, None, None, num_queries,
                num_keys, scale_log2, threshold, keep_scale,
                HEAD_SIZE, BLOCK_D, BLOCK_Q, BLOCK_K, HAS_BIAS, HAS_DROPOUT, PRECISION, PARTIAL=False,
            )  # fmt: skip
        query_start = tl.load(query_start_ptr + row * stride_mask + keys, mask=inside, other=0)
        query_end = tl.load(query_end_ptr + row * stride_mask + keys, mask=inside, other=0)
        for block_first in tl.range(begin, end - full_size, BLOCK_Q, disable_licm=LEAN):
            first_query = block_first + tl.where(block_first >= full_begin, full_size, 0)
            grad_k, grad_v = _key_block(
                grad_k, grad_v, k, v, first_query, head_q_ptr, stride_qs, head_grad_ptr, stride_gs,
                head_log_sum_ptr, head_delta_ptr, head_bias_ptr, seeds_ptr, query_positions_ptr,
                key_positions_ptr, drop_head, first_key, query_start, query_end, num_queries,
                num_keys, scale_log2, threshold, keep_scale,
                HEAD_SIZE, BLOCK_D, BLOCK_Q, BLOCK_K, HAS_BIAS, HAS_DROPOUT, PRECISION, PARTIAL=True,
            )  # fmt: skip
    offset = row * stride_ob + key_head * stride_oh
    store_rows(grad_k_ptr + offset, stride_os, keys, num_keys, grad_k * scale, HEAD_SIZE, BLOCK_D)
    store_rows(grad_v_ptr + offset, stride_os, keys, num_keys, grad_v, HEAD_SIZE, BLOCK_D)
