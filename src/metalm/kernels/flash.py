"""The flash backend: PyTorch's own variable-length flash attention, where the mask is made of segments.

It takes no bias, no dropout that repeats on any topology, and no bidirectional spans in a causal row. Its
values are compared with the dense reference before it is first used.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalm.kernels.dense import dense_attention
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.segments import Segments

_MAX_HEAD_SIZE = 256
# Of the norm of the difference, by that of the reference: bfloat16 operands give 2e-3 to 5e-3.
_TOLERANCE = 2e-2

_logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What is checked once."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    is_causal: bool
    is_grouped: bool


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
    is_grouped = q.shape[1] != k.shape[1]
    return _is_right(_Kind(q.device, q.dtype, q.shape[-1], mask.segments.is_causal, is_grouped))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Attention `[B, H, Sq, D]` under a mask whose segments are known; see `why_not_flash`."""
    from torch.nn.attention.varlen import varlen_attn

    num_rows, length = q.shape[0], q.shape[2]
    segments = mask.segments
    assert segments is not None
    if mask.batch_size < num_rows:
        segments = mask.derived(
            f"segments of {num_rows} rows", lambda mask: _repeated(mask.segments, num_rows, length)
        )
    # A copy, unless there is one row, or rows lie end to end.
    queries, keys, values = (
        x.transpose(1, 2).reshape(num_rows * length, x.shape[1], x.shape[3]) for x in (q, k, v)
    )
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
    out = out.view(num_rows, length, *out.shape[1:]).transpose(1, 2)
    if segments.has_padding:
        seen = (mask.end > mask.start)[:, None, :, None]
        out = torch.where(seen, out, 0.0)
    return out


def _grouped(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The argument for grouped heads, which PyTorch 2.11 does not have."""
    return {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}


def _repeated(segments: Segments | None, num_rows: int, length: int) -> Segments:
    assert segments is not None
    return segments.repeated(num_rows, length)


@cache
def _is_right(kind: _Kind) -> bool:
    """Values and gradients of a small call against the dense reference."""
    # Runs of one element, of a block and more, and padding.
    lengths, padding = torch.tensor([1, 130, 37, 200]), 16
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    start = torch.cat([edges[:-1].repeat_interleave(lengths), torch.full((padding,), -1)])[None].int()
    if kind.is_causal:
        mask = IntervalMask.packed_documents(start)
    else:
        end = torch.cat([edges[1:].repeat_interleave(lengths), torch.zeros(padding)])[None].int()
        mask = IntervalMask.packed_spans(start.clamp(min=0), end)
    mask = mask.to(kind.device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, start.shape[1], kind.head_size) for heads in (4, 2 if kind.is_grouped else 4)]
    drawn = [torch.randn(shapes[which], generator=generator) for which in (0, 1, 1, 0)]
    q, k, v, grad = (x.to(kind.device, kind.dtype) for x in drawn)
    scale = kind.head_size**-0.5

    def results(dtype: torch.dtype, is_flash: bool) -> list[Tensor]:
        queries, keys, values = (x.to(dtype).requires_grad_() for x in (q, k, v))
        if is_flash:
            out = flash_attention(queries, keys, values, mask, scale)
        else:
            out = dense_attention(queries, keys, values, mask, None, scale, None)
        return [out, *torch.autograd.grad(out, (queries, keys, values), grad.to(dtype))]

    problem = None
    try:
        with torch.enable_grad(), torch.autocast(kind.device.type, enabled=False):
            found, expected = results(kind.dtype, True), results(torch.float32, False)
        errors = [
            float((one.float() - other).norm() / other.norm())
            for one, other in zip(found, expected, strict=True)
        ]
        if not max(errors) <= _TOLERANCE:  # NaN is never at most anything
            problem = f"differs from the reference by {max(errors):.1e} of its norm"
    except (ImportError, RuntimeError, TypeError) as error:
        problem = f"failed: {next(iter(str(error).splitlines()), type(error).__name__)}"
    if problem is None:
        return True
    _logger.warning("PyTorch %s's flash attention is not used: it %s", torch.__version__, problem)
    return False
