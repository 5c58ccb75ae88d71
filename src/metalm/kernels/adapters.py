"""Interval attention for any model of transformers, under the name `metalm_interval`.

    register_interval_attention()
    AutoModel.from_pretrained(name, attn_implementation="metalm_interval")

Two functions are registered. With the attention alone, transformers takes an implementation whose masks it
does not know to need none, and drops the padding mask without a word. The only file of the kernels that
imports transformers; nothing else of them imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from metalm.kernels.attention import interval_attention
from metalm.kernels.interval_mask import IntervalMask

TRANSFORMERS_NAME = "metalm_interval"

_UNSUPPORTED = ("position_bias", "softcap", "s_aux")
"""What some models' layers ask of an attention function beyond a mask; ignored, it would be wrong."""


def register_interval_attention() -> str:
    """Make `attn_implementation="metalm_interval"` known to transformers; again, it changes nothing.

    Returns:
        The name.
    """
    AttentionInterface.register(TRANSFORMERS_NAME, transformers_attention)
    AttentionMaskInterface.register(TRANSFORMERS_NAME, transformers_mask)
    return TRANSFORMERS_NAME


def transformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> IntervalMask:
    """The mask of a model, made once per forward and handed to all of its layers.

    Args:
        batch_size: rows of the batch.
        q_length: queries per row.
        kv_length: keys per row, with those of the cache.
        q_offset: position of the first query, an integer or a tensor of one.
        kv_offset: position of the first key.
        mask_function: of transformers. Causal and bidirectional masks take memory linear in the lengths;
            any other (a sliding window, packed positions, bidirectional blocks) is drawn densely first.
        attention_mask: `[B, positions]`, non-zero at real positions, which are contiguous in each row:
            padding on either side, or on both. None: no padding.
        use_vmap: the function is not written for broadcasting.
        device: of the mask.

    Raises:
        ValueError: the mask is not one interval of keys per query.
    """
    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        dense = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert dense is not None
        return _intervals(dense[:, 0], "this model's attention mask").validate()
    first = torch.zeros(batch_size, 1, dtype=torch.int32, device=device)
    last = torch.full_like(first, kv_length)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        real = padding[:, None, kv_offset : kv_offset + kv_length].bool()
        keys = _intervals(real, "the padding mask")
        first, last = keys.start, keys.end
    last_key = torch.full((q_length,), kv_length, dtype=torch.int32, device=device)
    if causal:
        last_key = torch.arange(1, q_length + 1, dtype=torch.int32, device=device) + (q_offset - kv_offset)
    end = torch.minimum(last, last_key).to(torch.int32)
    return IntervalMask(torch.minimum(first, end), end, kv_length)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    interval_mask: IntervalMask | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, query `[B, H, Sq, D]`, as `[B, Sq, H, D]`, and no weights.

    Args:
        module: the layer.
        query: `[B, H, Sq, D]`; key and value `[B, Hkv, Sk, D]`.
        attention_mask: from `transformers_mask`; None where the model makes no mask.
        scaling: factor of the scores.
        dropout: probability, already 0 outside training.
        is_causal: instead of the layer's own, where there is no mask.
        interval_mask: given to the model's forward, it takes the place of `attention_mask`: packed spans.
        options: of other implementations.

    Raises:
        ValueError: the mask is none of ours, or the layer asks for what this attention has not.
    """
    if asked := [name for name in _UNSUPPORTED if options.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} asks for {asked[0]}, which {TRANSFORMERS_NAME} has not")
    mask = attention_mask if interval_mask is None else interval_mask
    if mask is None:
        mask = _without_mask(module, query.shape[2], key.shape[2], is_causal, query.device)
    if not isinstance(mask, IntervalMask):
        raise ValueError(
            f"the attention mask is a {type(mask).__name__}, expected an IntervalMask: give the model a "
            "[B, S] mask, and register with register_interval_attention()"
        )
    out = interval_attention(query, key, value, mask, scale=scaling, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def _without_mask(
    module: nn.Module, num_queries: int, num_keys: int, is_causal: bool | None, device: torch.device
) -> IntervalMask:
    """Every key, or in a causal layer those up to the query."""
    if not (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        return IntervalMask.whole(num_queries, num_keys, device=device)
    if num_queries not in (1, num_keys):
        raise ValueError(
            f"{type(module).__name__} is causal and was given no mask for {num_queries} queries of "
            f"{num_keys} keys"
        )
    return IntervalMask.causal(num_queries, num_keys, device=device)


def _intervals(visible: Tensor, what: str) -> IntervalMask:
    """A dense mask, bool `[B, Sq, Sk]`, as intervals; waits for the device."""
    num_keys = visible.shape[-1]
    position = torch.arange(num_keys, dtype=torch.int32, device=visible.device)
    start = torch.where(visible, position, num_keys).amin(-1).to(torch.int32)
    end = torch.where(visible, position + 1, 0).amax(-1).to(torch.int32)
    start = torch.minimum(start, end)
    if bool((visible.sum(-1) != end - start).any()):
        raise ValueError(f"{what} is not one interval of keys per query; use another attention")
    return IntervalMask(start, end, num_keys)
