"""The flash backend: PyTorch's own fused attention, where the mask is made of segments.

Segments of one length are rows of a batch, others go to the variable-length form. Neither takes a bias, a
dropout that repeats on any topology, or bidirectional spans in a causal row. Values are compared with the
dense reference before the first use.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metalm.kernels.first_use import problem_of
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.segments import Segments

_MAX_HEAD_SIZE = 256

_logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What is checked once."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    is_causal: bool
    is_grouped: bool
    is_uniform: bool


def why_not_flash(q: Tensor, k: Tensor, mask: IntervalMask, *, has_extras: bool) -> str | None:
    """The reason why a call cannot run here on this backend, or None. Waits for no device.

    Args:
        has_extras: there is a bias, or dropout.
    """
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs CUDA and compute capability 8.0, got tensors on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_SIZE:
        return f"takes head sizes that divide by 8, up to {_MAX_HEAD_SIZE}, got {q.shape[-1]}"
    if has_extras:
        return "takes no bias and no dropout"
    if mask.segments is None or q.shape[2] != k.shape[2]:
        return "takes masks whose segments are known: causal documents, or spans seen whole"
    if torch.are_deterministic_algorithms_enabled():
        return "does not add gradients up in one order"
    return None


def is_trusted(q: Tensor, k: Tensor, mask: IntervalMask) -> bool:
    """Whether calls like this gave the reference's values; the first of a kind waits for the device."""
    assert mask.segments is not None
    segments, is_grouped = mask.segments, q.shape[1] != k.shape[1]
    is_uniform = segments.is_uniform(mask.batch_size * mask.num_queries)
    return _is_right(_Kind(q.device, q.dtype, q.shape[-1], segments.is_causal, is_grouped, is_uniform))


def is_faster(q: Tensor, mask: IntervalMask) -> bool:
    """Whether it is chosen before the Triton kernels: for runs of one length, or where those are untuned.

    On an H200, PyTorch's fused attention over rows of one length takes 0.70 to 0.86 of the Triton kernels'
    time forward and backward, but its variable-length attention 1.08 to 1.42 of it (`tools/measured/`).
    """
    assert mask.segments is not None
    if mask.segments.is_uniform(mask.batch_size * mask.num_queries):
        return True
    return not is_triton_tuned(q.shape[-1], q.dtype, q.device)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Attention `[B, H, Sq, D]` under a mask whose segments are known; see `why_not_flash`."""
    segments = mask.segments_of_batch(q.shape[0])
    assert segments is not None
    if segments.is_uniform(q.shape[0] * q.shape[2]):
        return _of_one_length(q, k, v, segments, scale)
    out = _of_any_length(q, k, v, segments, scale)
    if segments.has_padding:
        out = torch.where((mask.end > mask.start)[:, None, :, None], out, 0.0)
    return out


def _of_one_length(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """By PyTorch's fused attention, each run a row of its batch."""
    queries, keys, values = (segments.cut(x).transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=segments.is_causal, scale=scale, **_grouped(q, k)
    )
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], *q.shape[1::2]).transpose(1, 2)


def _of_any_length(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A copy, unless there is one row, or rows lie end to end.
    queries, keys, values = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
    out = varlen_attn(
        queries,
        keys,
        values,
        segments.bounds,
        segments.bounds,
        segments.longest,
        segments.longest,
        scale=scale,
        window_size=(-1, 0) if segments.is_causal else (-1, -1),
        **_grouped(q, k),
    )
    assert isinstance(out, Tensor)
    return out.view(q.shape[0], q.shape[2], *out.shape[1:]).transpose(1, 2)


def _grouped(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The argument for grouped heads, which variable-length attention lacks in PyTorch 2.11."""
    return {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}


@cache
def is_triton_tuned(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the Triton kernels have measured block sizes here."""
    if importlib.util.find_spec("triton") is None:
        return False
    from metalm.kernels.triton_configs import has_measured

    return has_measured(head_size, dtype, device)


@cache
def _is_right(kind: _Kind) -> bool:
    """Values and gradients of a small call against the dense reference."""
    # Runs of one element, of a block and more, and padding.
    lengths, padding = torch.tensor([1, 130, 37, 200]), 16
    if kind.is_uniform:
        lengths, padding = torch.tensor([130, 130, 130]), 0
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    start = torch.cat([edges[:-1].repeat_interleave(lengths), torch.full((padding,), -1)])[None].int()
    if kind.is_causal:
        mask = IntervalMask.packed_documents(start)
    else:
        end = torch.cat([edges[1:].repeat_interleave(lengths), torch.zeros(padding)])[None].int()
        mask = IntervalMask.packed_spans(start.clamp(min=0), end)
    problem = problem_of(
        flash_attention,
        mask.to(kind.device),
        dtype=kind.dtype,
        head_size=kind.head_size,
        is_grouped=kind.is_grouped,
    )
    if problem is None:
        return True
    _logger.warning("PyTorch %s's flash attention is not used: it %s", torch.__version__, problem)
    return False
