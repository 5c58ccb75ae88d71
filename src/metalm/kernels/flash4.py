"""The flash4 backend: FlashAttention 4, a package of its own (`metalm[flash]`), under any interval mask.

Rows and documents of one length are its own causal or unmasked attention. Every other mask is a test per
pair, compiled into its kernels, of the blocks that our block ranges leave to test. It takes no bias and no
dropout. Its kernels are compiled at their first use, some seconds each, and their values are compared then
with the dense reference. The package is a beta that changes weekly, so one version is taken and no other.
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
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.listed_blocks import ListedBlocks, list_blocks

VERSION = "4.0.0b36"
"""The one that our checks ran with; `pyproject.toml` pins it and what it is compiled by."""

# Larger ones have kernels whose blocks are of other sizes.
_MAX_HEAD_SIZE = 128
_KEY_BLOCK = 128
# On Blackwell a program takes two tiles of 128 queries.
_QUERY_BLOCKS = {9: 128, 10: 256}
# Bounds are read for whole blocks of queries.
_LARGEST_QUERY_BLOCK = max(_QUERY_BLOCKS.values())

Form = Literal["causal", "whole", "intervals"]

_logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What is checked once."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    form: Form
    is_grouped: bool


class _Blocks(NamedTuple):
    """What the kernels read of a mask; the backward walks the queries of each block of keys."""

    bounds: tuple[Tensor, Tensor]
    forward: ListedBlocks
    backward: ListedBlocks


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
    if major not in _QUERY_BLOCKS and _form(mask) == "intervals":
        return f"takes rows of one length, causal or whole, on compute capability {major}"
    if torch.are_deterministic_algorithms_enabled():
        return "does not add gradients up in one order"
    return None


def is_trusted(q: Tensor, k: Tensor, mask: IntervalMask) -> bool:
    """Whether calls like this gave the reference's values; the first of a kind waits for the device."""
    return _is_right(_Kind(q.device, q.dtype, q.shape[-1], _form(mask), q.shape[1] != k.shape[1]))


def is_faster(q: Tensor) -> bool:
    """Whether it is chosen before other backends: where rows fill its blocks, unlike in decoding."""
    return q.shape[2] >= _KEY_BLOCK


def flash4_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Attention `[B, H, Sq, D]` under any interval mask; see `why_not_flash4`."""
    from flash_attn.cute.interface import flash_attn_func

    # With the log-sum-exp asked for, evaluation runs the training's kernel instead of compiling another.
    options: dict[str, Any] = {"softmax_scale": scale, "return_lse": True}
    form = _form(mask)
    if form == "intervals":
        inputs = [x.transpose(1, 2) for x in (q, k, v)]
        options |= _mask_options(mask, q.shape[0], q.device)
    else:
        assert mask.segments is not None
        inputs = [mask.segments.cut(x) for x in (q, k, v)]
        options["causal"] = form == "causal"
    out: Tensor = flash_attn_func(*inputs, **options)[0]
    return out.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _form(mask: IntervalMask) -> Form:
    segments = mask.segments
    if segments is None or not segments.is_uniform(mask.batch_size * mask.num_queries):
        return "intervals"
    return "causal" if segments.is_causal else "whole"


def _mask_options(mask: IntervalMask, num_rows: int, device: torch.device) -> dict[str, Any]:
    """The mask in the package's arguments."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from metalm.kernels.flash4_mask import is_visible

    query_block = _QUERY_BLOCKS[torch.cuda.get_device_capability(device)[0]]
    blocks = mask.derived(
        f"flash4 blocks of {query_block} queries, {num_rows} rows",
        lambda mask: blocks_of(mask, num_rows, query_block),
    )
    size = (query_block, _KEY_BLOCK)
    return {
        "mask_mod": is_visible,
        "aux_tensors": list(blocks.bounds),
        "block_sparse_tensors": BlockSparseTensorsTorch(*blocks.forward, block_size=size),
        "block_sparse_tensors_bwd": BlockSparseTensorsTorch(*blocks.backward, block_size=size),
        # Heads that share keys in one tile would need blocks of another size.
        "pack_gqa": False,
    }


def blocks_of(mask: IntervalMask, num_rows: int, query_block: int) -> _Blocks:
    """Bounds and listed blocks for each of `num_rows` rows, on the mask's device, without waiting.

    Rows that share a mask get copies of it, since kernels are compiled for how their arguments are laid out.
    """
    transposed = mask.transpose()
    num_key_blocks = -(-mask.num_keys // _KEY_BLOCK)
    num_query_blocks = -(-mask.num_queries // query_block)
    forward = list_blocks(mask.block_ranges(query_block, _KEY_BLOCK), num_key_blocks)
    backward = list_blocks(transposed.block_ranges(_KEY_BLOCK, query_block), num_query_blocks)
    padding = (0, -mask.num_queries % _LARGEST_QUERY_BLOCK)
    start, end = (functional.pad(bound, padding) for bound in (mask.start, mask.end))
    if mask.batch_size < num_rows:
        forward, backward = forward.repeated(num_rows), backward.repeated(num_rows)
        start, end = start.repeat(num_rows, 1), end.repeat(num_rows, 1)
    return _Blocks((start.contiguous(), end.contiguous()), forward, backward)


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
        _small_mask(kind.form).to(kind.device),
        dtype=kind.dtype,
        head_size=kind.head_size,
        is_grouped=kind.is_grouped,
    )
    if problem is None:
        return True
    _logger.warning("FlashAttention %s is not used: it %s", VERSION, problem)
    return False


def _small_mask(form: Form) -> IntervalMask:
    """Of a length that no block divides. Intervals: documents of one element, of full blocks and of less,
    spans seen whole, and padding."""
    lengths, padding = torch.tensor([1, 330, 37, 150]), 22
    length = int(lengths.sum()) + padding
    if form == "causal":
        return IntervalMask.causal(length)
    if form == "whole":
        return IntervalMask.whole(length, length)
    edges = functional.pad(lengths.cumsum(0), (1, 0))
    start = functional.pad(edges[:-1].repeat_interleave(lengths), (0, padding), value=-1)[None]
    position = torch.arange(length)[None]
    # A span over the second document's first block and more, and one inside the last document.
    span_end = torch.where((position >= 1) & (position < 201), 201, 0)
    span_end = torch.where((position >= 380) & (position < 400), 400, span_end)
    return IntervalMask.semi_causal(start, span_end, bidirectional_spans=True)
