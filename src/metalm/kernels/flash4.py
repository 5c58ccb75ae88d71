"""The flash4 backend: FlashAttention 4, a package of its own (`metalm[flash]`), under any interval mask.

Segments (rows, documents, spans) are its own causal or unmasked attention, over a batch where they have one
length. Every other mask is a test per pair, compiled into its kernels, of the blocks that our block ranges
leave to test. It takes no bias and no dropout. Its kernels are compiled at their first use, some seconds
each, and their values are compared then with the dense reference. The package is a beta that changes weekly,
so one version is taken and no other.
"""

from __future__ import annotations

import importlib.metadata
import logging
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metalm.kernels.first_use import problem_of
from metalm.kernels.flash import is_triton_tuned
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.listed_blocks import ListedBlocks, list_blocks

VERSION = "4.0.0b36"
"""The one that our checks ran with; `pyproject.toml` pins it and what it is compiled by."""

# Larger ones have kernels whose blocks are of other sizes.
_MAX_HEAD_SIZE = 128
_KEY_BLOCK = 128
# On Blackwell a program takes two tiles of 128 queries.
_QUERY_BLOCKS = {9: 128, 10: 256}

Form = Literal["causal", "whole", "intervals"]
"""The first two: segments of one length. Other known segments are intervals, too."""

_logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What is checked once."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    form: Form
    is_causal: bool | None
    is_grouped: bool


class _Blocks(NamedTuple):
    """What a kernel reads of a mask: firsts and lengths of intervals, int32 `[B, S]`, and blocks to visit."""

    intervals: tuple[Tensor, Tensor]
    listed: ListedBlocks


def why_not_flash4(q: Tensor, mask: IntervalMask, *, has_extras: bool) -> str | None:
    """The reason why a call cannot run here on this backend, or None. Waits for no device.

    Args:
        has_extras: there is a bias, or dropout.
    """
    major = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else None
    if major not in (9, 10, 12):
        has = "" if major is None else f" of compute capability {major}"
        return f"needs CUDA and compute capability 9, 10 or 12, got tensors on {q.device}{has}"
    if (reason := _why_not_installed()) is not None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_SIZE:
        return f"takes head sizes that divide by 8, up to {_MAX_HEAD_SIZE}, got {q.shape[-1]}"
    if has_extras:
        return "takes no bias and no dropout"
    if major not in _QUERY_BLOCKS and mask.segments is None:
        return f"takes masks whose segments are known on compute capability {major}"
    if torch.are_deterministic_algorithms_enabled():
        return "does not add gradients up in one order"
    return None


def is_trusted(q: Tensor, k: Tensor, mask: IntervalMask) -> bool:
    """Whether calls like this gave the reference's values; the first of a kind waits for the device."""
    is_causal = None if mask.segments is None else mask.segments.is_causal
    return _is_right(_Kind(q.device, q.dtype, q.shape[-1], _form(mask), is_causal, q.shape[1] != k.shape[1]))


def is_faster(q: Tensor, mask: IntervalMask) -> bool:
    """Whether it is chosen before other backends: where rows fill its blocks, unlike in decoding.

    On an H200, forward and backward over rows of one length take 0.63 of the Triton kernels' time at head
    size 128, but under masks of packed documents 1.2 times it, and 1.8 times at 64 (`tools/measured/`).
    """
    if q.shape[2] < _KEY_BLOCK:
        return False
    return _form(mask) != "intervals" or not is_triton_tuned(q.shape[-1], q.dtype, q.device)


def flash4_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Attention `[B, H, Sq, D]` under any interval mask; see `why_not_flash4`."""
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    num_rows, length = q.shape[0], q.shape[2]
    segments = mask.segments_of_batch(num_rows)
    if segments is None:
        out = _Intervals.apply(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale)
        return out.transpose(1, 2)
    # With the log-sum-exp asked for, evaluation runs the training's kernel instead of compiling another.
    options = {"softmax_scale": scale, "causal": segments.is_causal, "return_lse": True}
    if segments.is_uniform(num_rows * length):
        out = flash_attn_func(*(segments.cut(x) for x in (q, k, v)), **options)[0]
    else:
        bounds, longest = segments.bounds, segments.longest
        out = flash_attn_varlen_func(
            *(x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v)),
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **options,
        )[0]
    out = out.reshape(num_rows, length, q.shape[1], q.shape[3]).transpose(1, 2)
    if segments.has_padding:
        out = torch.where((mask.end > mask.start)[:, None, :, None], out, 0.0)
    return out


class _Intervals(torch.autograd.Function):
    """The package's forward and backward of `[B, S, H, D]` under one mask, in the form that is fast for each.

    The package's own function gives both the same test of pairs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        from metalm.kernels.flash4_mask import query_sees

        query_block = _QUERY_BLOCKS[torch.cuda.get_device_capability(q.device)[0]]
        forward, ctx.blocks = mask.derived(
            f"flash4 blocks of {query_block} queries, {q.shape[0]} rows",
            lambda mask: blocks_of(mask, q.shape[0], query_block),
        )
        ctx.block_size, ctx.scale = (query_block, _KEY_BLOCK), scale
        out: Tensor
        out, log_sum, *_ = _flash_attn_fwd(
            q,
            k,
            v,
            softmax_scale=scale,
            return_lse=True,
            # Heads that share keys in one tile would need blocks of another size.
            pack_gqa=False,
            **_mask_options(forward, query_sees, ctx.block_size),
        )
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd

        from metalm.kernels.flash4_mask import key_is_seen

        q, k, v, out, log_sum = ctx.saved_tensors
        options = _mask_options(ctx.blocks, key_is_seen, ctx.block_size)
        grads = _flash_attn_bwd(q, k, v, out, grad, log_sum, ctx.scale, **options)
        return *grads, None, None


def _mask_options(blocks: _Blocks, mask_mod: Any, block_size: tuple[int, int]) -> dict[str, Any]:
    """A mask in the package's arguments."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return {
        "mask_mod": mask_mod,
        "aux_tensors": list(blocks.intervals),
        "block_sparse_tensors": BlockSparseTensorsTorch(*blocks.listed, block_size=block_size),
    }


def _form(mask: IntervalMask) -> Form:
    segments = mask.segments
    if segments is None or not segments.is_uniform(mask.batch_size * mask.num_queries):
        return "intervals"
    return "causal" if segments.is_causal else "whole"


def blocks_of(mask: IntervalMask, num_rows: int, query_block: int) -> tuple[_Blocks, _Blocks]:
    """What forward and backward read for each of `num_rows` rows, made on the mask's device without waiting.

    The forward takes the queries' intervals of keys, the backward the keys' intervals of queries. Rows that
    share a mask get copies of it, since kernels are compiled for how their arguments are laid out.
    """

    def blocks(mask: IntervalMask, block: int, other_block: int) -> _Blocks:
        listed = list_blocks(mask.block_ranges(block, other_block), -(-mask.num_keys // other_block))
        # Read for whole blocks.
        padding = (0, -mask.num_queries % block)
        first, length = (
            functional.pad(x, padding) for x in (mask.start, (mask.end - mask.start).clamp(min=0))
        )
        if mask.batch_size < num_rows:
            listed = listed.repeated(num_rows)
            first, length = first.repeat(num_rows, 1), length.repeat(num_rows, 1)
        return _Blocks((first.contiguous(), length.contiguous()), listed)

    forward = blocks(mask, query_block, _KEY_BLOCK)
    return forward, blocks(mask.transpose(), _KEY_BLOCK, query_block)


@cache
def _why_not_installed() -> str | None:
    try:
        found = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return f"needs flash-attn-4 {VERSION}, which is not installed: pip install 'metalm[flash]'"
    if found != VERSION:
        return f"needs flash-attn-4 {VERSION}, found {found}: pip install 'metalm[flash]'"
    return None


@cache
def _is_right(kind: _Kind) -> bool:
    """Values and gradients of a small call against the dense reference; compiles the kernels."""
    _logger.info(
        "compiles FlashAttention %s for head size %d, %s, %s", VERSION, kind.head_size, kind.dtype, kind.form
    )
    problem = problem_of(
        flash4_attention,
        _small_mask(kind.form, kind.is_causal).to(kind.device),
        dtype=kind.dtype,
        head_size=kind.head_size,
        is_grouped=kind.is_grouped,
    )
    if problem is None:
        return True
    _logger.warning("FlashAttention %s is not used: it %s", VERSION, problem)
    return False


def _small_mask(form: Form, is_causal: bool | None) -> IntervalMask:
    """Of a length that no block divides. Intervals: documents of one element, of full blocks and of less, and
    padding; with spans seen whole, unless all or none are."""
    lengths, padding = torch.tensor([1, 330, 37, 150]), 22
    length = int(lengths.sum()) + padding
    if form == "causal":
        return IntervalMask.causal(length)
    if form == "whole":
        return IntervalMask.whole(length, length)
    edges = functional.pad(lengths.cumsum(0), (1, 0))
    starts, ends = (x.repeat_interleave(lengths) for x in (edges[:-1], edges[1:]))
    if is_causal is False:
        return IntervalMask.packed_spans(*(functional.pad(x, (0, padding))[None] for x in (starts, ends)))
    document_start = functional.pad(starts, (0, padding), value=-1)[None]
    position = torch.arange(length)[None]
    # A span over the second document's first block and more, and one inside the last document.
    span_end = torch.where((position >= 1) & (position < 201), 201, 0)
    span_end = torch.where((position >= 380) & (position < 400), 400, span_end)
    return IntervalMask.semi_causal(document_start, span_end, bidirectional_spans=is_causal is None)
