"""Attention over interval masks by the Triton kernels, as one differentiable function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from metalm.kernels.dropout import DropoutPattern, drop_threshold
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel
from metalm.kernels.triton_blocks import block_ranges
from metalm.kernels.triton_configs import Kernel, LaunchConfig, launch_config
from metalm.kernels.triton_forward import forward_kernel
from metalm.kernels.triton_tile import BIAS_MARGIN

_MAX_HEAD_SIZE = 256
# Places in a row are counted in 32 bits: in 64 the kernels take more registers.
_MAX_ROW_NUMBERS = 2**31

Configs = Mapping[Kernel, LaunchConfig]


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    bias: Tensor | None,
    scale: float,
    dropout: DropoutPattern | None,
    configs: Configs | None = None,
) -> Tensor:
    """Arguments as those of `tiled_attention`; never waits for the device.

    Args:
        configs: of all three kernels, for those who tune them, in place of the device's table.

    Raises:
        ValueError: the dtype, head size or length is not supported, or there is neither CUDA nor the
            interpreter.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or q.shape[-1] > _MAX_HEAD_SIZE:
        raise ValueError(
            f"the triton backend takes float32, float16 and bfloat16 and head sizes up to {_MAX_HEAD_SIZE}, "
            f"got {q.dtype} and {q.shape[-1]}"
        )
    if any(x.shape[2] * x.stride(2) >= _MAX_ROW_NUMBERS for x in (q, k, v)):
        raise ValueError(
            f"the triton backend takes rows over up to {_MAX_ROW_NUMBERS:,} numbers: got {list(q.shape)}, "
            f"strides {list(q.stride())}; give a smaller training.micro_batch_size, or more parallel.tensor"
        )
    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"the triton backend needs CUDA or TRITON_INTERPRET=1, got tensors on {q.device}")
    dtype = q.dtype
    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers, and truncates where hardware rounds.
        q, k, v = q.float(), k.float(), v.float()
    out: Tensor = _TritonAttention.apply(q, k, v, bias, mask, scale, dropout, configs)
    return out.to(dtype)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: IntervalMask,
        scale: float,
        dropout: DropoutPattern | None,
        configs: Configs | None,
    ) -> Tensor:
        q, k, v = (_rows_contiguous(x) for x in (q, k, v))
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        batch_size, num_heads, num_queries, _ = q.shape
        # Laid out as q, so that a caller's own permutation of the output is free.
        out = torch.empty_like(q)
        log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        raw_bias = None if bias is None else _raw_bias(bias, scale)
        ctx.launch = launch = _Launch(q, scale, bias is not None, dropout, configs)
        with torch.cuda.device_of(q):
            options = launch.options("forward")
            seen = _intervals(mask, options["BLOCK_Q"], options["BLOCK_K"])
            forward_kernel[(triton.cdiv(num_queries, options["BLOCK_Q"]), batch_size * num_heads)](
                q, k, v, out, log_sum, *seen, raw_bias, *launch.pattern,
                *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], _row_stride(mask),
                num_heads, num_heads // k.shape[1], num_queries, k.shape[2],
                launch.scale_log2, *launch.drop, **options,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, bias, raw_bias, out, log_sum)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, raw_bias, out, log_sum = ctx.saved_tensors
        launch, scale = ctx.launch, ctx.scale
        grad = grads[0]
        if grad.stride() != out.stride():
            grad = torch.empty_like(out).copy_(grad)
        batch_size, num_heads, num_queries, _ = q.shape
        num_key_heads, num_keys = k.shape[1:3]
        groups = num_heads // num_key_heads
        delta = torch.empty_like(log_sum)
        grad_q = torch.empty_like(out)
        grad_k = torch.empty_like(k)
        grad_v = torch.empty_like(grad_k)
        needs_bias_gradient = ctx.needs_input_grad[3]
        grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32) if needs_bias_gradient else None
        with torch.cuda.device_of(q):
            options = launch.options("query_gradient")
            seen = _intervals(ctx.mask, options["BLOCK_Q"], options["BLOCK_K"])
            query_gradient_kernel[(triton.cdiv(num_queries, options["BLOCK_Q"]), batch_size * num_heads)](
                q, k, v, out, grad, log_sum, delta, grad_q, *seen, raw_bias, grad_bias,
                *launch.pattern, *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], _row_stride(ctx.mask),
                num_heads, groups, num_queries, num_keys, scale, launch.scale_log2, *launch.drop,
                NEEDS_BIAS_GRADIENT=needs_bias_gradient, **options,
            )  # fmt: skip
            options, transposed = launch.options("key_gradient"), ctx.mask.transpose()
            seen_by = _intervals(transposed, options["BLOCK_K"], options["BLOCK_Q"])
            key_gradient_kernel[(triton.cdiv(num_keys, options["BLOCK_K"]), batch_size * num_key_heads)](
                q, k, v, grad, log_sum, delta, grad_k, grad_v, *seen_by, raw_bias,
                *launch.pattern, *q.stride()[:3], *k.stride()[:3], *grad.stride()[:3],
                *grad_k.stride()[:3], _row_stride(transposed), num_key_heads, num_queries, num_keys,
                scale, launch.scale_log2, *launch.drop, GROUPS=groups, **options,
            )  # fmt: skip
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_q, grad_k, grad_v, grad_bias, *(None,) * 4


class _Launch:
    """What the three kernels of one call have in common."""

    def __init__(
        self,
        q: Tensor,
        scale: float,
        has_bias: bool,
        dropout: DropoutPattern | None,
        configs: Configs | None,
    ) -> None:
        self.scale_log2 = scale / math.log(2.0)
        self.drop: tuple[int | None, float | None, int | None] = (None, None, None)
        """Threshold, scale of what is kept, first head; None where nothing is dropped."""
        self.pattern: tuple[Tensor | None, ...] = (None, None, None)
        if dropout is not None:
            self.drop = (drop_threshold(dropout.rate), dropout.keep_scale, dropout.head_offset)
            self.pattern = (dropout.seeds, dropout.query_positions, dropout.key_positions)
        self._kind = (q.shape[-1], q.dtype, has_bias, dropout is not None, q.device)
        self._configs = configs

    def options(self, kernel: Kernel) -> dict[str, Any]:
        """What a kernel is compiled for."""
        if self._configs is None:
            return _options(kernel, *self._kind)
        return _meta(*self._kind[:4]) | self._configs[kernel].options()


@cache
def _options(
    kernel: Kernel,
    head_size: int,
    dtype: torch.dtype,
    has_bias: bool,
    has_dropout: bool,
    device: torch.device,
) -> dict[str, Any]:
    has_extras = has_bias or has_dropout
    config = launch_config(kernel, head_size, dtype, has_extras=has_extras, device=device)
    return _meta(head_size, dtype, has_bias, has_dropout) | config.options()


def _meta(head_size: int, dtype: torch.dtype, has_bias: bool, has_dropout: bool) -> dict[str, Any]:
    return {
        "HEAD_SIZE": head_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "HAS_BIAS": has_bias,
        "HAS_DROPOUT": has_dropout,
        # Contraction of multiply and add, which Triton is about to turn off by default.
        "enable_fp_fusion": True,
        # TF32 would lose thirteen bits of a float32 product.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _raw_bias(bias: Tensor, scale: float) -> Tensor:
    """As the kernels take it, which add it before they scale: float32, with a margin on either side."""
    num_heads, num_distances = bias.shape
    margin = BIAS_MARGIN.value
    raw = bias.new_zeros(num_heads, num_distances + 2 * margin, dtype=torch.float32)
    raw[:, margin : margin + num_distances] = bias.float() / scale
    return raw


def _intervals(mask: IntervalMask, rows: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    """Those of each row, and the blocks that each block of so many rows visits."""
    return mask.start.contiguous(), mask.end.contiguous(), block_ranges(mask, rows, others)


def _row_stride(mask: IntervalMask) -> int:
    """Of the intervals between batch rows, 0 where one row holds for all."""
    return mask.num_queries if mask.batch_size > 1 else 0


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
