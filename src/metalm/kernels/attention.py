"""`interval_attention`: one call that checks its arguments, picks a backend, and counts which one ran."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from metalm.kernels import flash, flash4
from metalm.kernels.dense import dense_attention
from metalm.kernels.dropout import attention_pattern
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.relative_bias import RelativeBias
from metalm.kernels.tiled import tiled_attention

Backend = Literal["flash4", "flash", "triton", "tiled", "dense"]

_logger = logging.getLogger(__name__)
_counts: Counter[str] = Counter()


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    dropout_positions: Tensor | None = None,
    dropout_head_offset: int = 0,
    bias: RelativeBias | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Softmax attention of each query over its interval of keys; differentiable in q, k, v, bias table.

    Args:
        q: floating `[B, H, Sq, D]`, any strides.
        k: `[B, Hkv, Sk, D]` of q's dtype; Hkv divides H, and query head h reads key head `h // (H / Hkv)`.
        v: `[B, Hkv, Sk, D]`.
        mask: Sq queries over Sk keys, for each batch row or (batch size 1) for all. Not validated here.
        scale: factor of the scores; `1 / sqrt(D)` by default.
        dropout: probability with which an attention weight is dropped.
        dropout_seed: integer seed, or int64 seeds `[B]` of the rows; drawn from torch's generator by default.
            Seeds per row make the pattern independent of how rows are dealt to micro-batches and ranks.
            Seeds `[B, Sq]`, one per query, do so for spans that are packed into rows.
        dropout_positions: `[B, S]` integers in place of the indices of queries and keys: their positions in
            their spans. Elements 4i to 4i + 3 must be consecutive, from a multiple of 4.
        dropout_head_offset: number of this rank's first head among all ranks' heads.
        bias: relative-position bias with one row of values for each of the H heads.
        backend: forces "flash4" (CUDA with the package installed, no bias, no dropout), "flash" (CUDA, masks
            of known segments, no bias, no dropout), "triton" (CUDA, or Triton's interpreter), "tiled" (any
            device) or "dense" (quadratic reference); by default the fastest that supports the call. The
            first use of flash4 and flash by default checks their values.

    Returns:
        `[B, H, Sq, D]` of q's dtype. Queries that see nothing give zeros.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit together, or a forced backend that
            cannot run here.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    _check(q, k, v, mask, scale, dropout, bias)
    pattern = None
    if dropout > 0.0:
        pattern = attention_pattern(
            dropout,
            dropout_seed,
            dropout_positions,
            dropout_head_offset,
            batch_size=q.shape[0],
            num_queries=q.shape[2],
            num_keys=k.shape[2],
            device=q.device,
        )
    by_distance = None if bias is None else bias.by_distance(mask.num_queries, mask.num_keys)
    has_extras = by_distance is not None or pattern is not None
    if backend is None:
        backend = _choose(q, k, mask, by_distance, has_extras=has_extras)
    elif backend == "flash4" and (reason := flash4.why_not_flash4(q, mask, has_extras=has_extras)):
        raise ValueError(f"the flash4 backend {reason}")
    elif backend == "flash" and (reason := flash.why_not_flash(q, k, mask, has_extras=has_extras)):
        raise ValueError(f"the flash backend {reason}")
    if backend not in _counts:
        _logger.info("interval attention runs on the %s backend (%s, %s)", backend, q.device.type, q.dtype)
    _counts[backend] += 1
    arguments = (q, k, v, mask, by_distance, scale, pattern)
    if backend == "flash4":
        return flash4.flash4_attention(q, k, v, mask, scale)
    if backend == "flash":
        return flash.flash_attention(q, k, v, mask, scale)
    if backend == "dense":
        return dense_attention(*arguments)
    if backend == "tiled":
        return tiled_attention(*arguments)
    if backend == "triton":
        from metalm.kernels.triton_attention import triton_attention

        return triton_attention(*arguments)
    raise ValueError(f"unknown attention backend {backend!r}, expected one of {', '.join(get_args(Backend))}")


def backend_counts() -> dict[str, int]:
    """How often each backend ran in this process, since the start or the last `reset_backend_counts`."""
    return dict(_counts)


def count_repeated(calls: Mapping[str, int]) -> None:
    """Count calls by backend that a CUDA graph repeats, of which nothing else is seen."""
    _counts.update(calls)


def reset_backend_counts() -> None:
    """Starts the counts again from nothing."""
    _counts.clear()


def _choose(
    q: Tensor, k: Tensor, mask: IntervalMask, by_distance: Tensor | None, *, has_extras: bool
) -> Backend:
    takes = flash4.why_not_flash4(q, mask, has_extras=has_extras) is None
    if takes and flash4.is_faster(q) and flash4.is_trusted(q, k, mask):
        return "flash4"
    takes = flash.why_not_flash(q, k, mask, has_extras=has_extras) is None
    if takes and flash.is_faster(q, mask) and flash.is_trusted(q, k, mask):
        return "flash"
    if torch.are_deterministic_algorithms_enabled() and by_distance is not None:
        return "tiled"  # the Triton kernel adds the bias's gradient up by atomics
    if q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[-1] > 256:
        return "tiled"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "tiled"
    return "triton"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    dropout: float,
    bias: RelativeBias | None,
) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}: expected q [B, H, Sq, D] and k and v [B, Hkv, Sk, D]")
    batch_size, num_heads, num_queries, head_size = q.shape
    if k.shape[0] != batch_size or k.shape[3] != head_size or num_heads % k.shape[1]:
        raise ValueError(
            f"{shapes}: expected one batch size, one head size, and key heads dividing query heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: expected one floating dtype")
    if (
        mask.num_queries != num_queries
        or mask.num_keys != k.shape[2]
        or mask.batch_size not in (1, batch_size)
    ):
        raise ValueError(
            f"mask of {mask.batch_size} rows, {mask.num_queries} queries and {mask.num_keys} keys "
            f"does not fit {shapes}"
        )
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, q on {q.device}; move it once with mask.to(device)")
    if not scale > 0.0:
        raise ValueError(f"scale is {scale}, expected a positive number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected at least 0 and below 1")
    if bias is not None and bias.table.shape[0] != num_heads:
        raise ValueError(f"bias table has {bias.table.shape[0]} rows, q has {num_heads} heads")
