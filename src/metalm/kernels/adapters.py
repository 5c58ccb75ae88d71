"""Interval attention in the signatures that transformers expects, without importing transformers.

Register both functions under one name. With the attention alone, transformers takes an implementation whose
masks it does not know to need none, and drops the padding mask without a word.

    AttentionInterface.register("metalm_interval", transformers_attention)
    AttentionMaskInterface.register("metalm_interval", transformers_mask)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metalm.kernels.attention import interval_attention
from metalm.kernels.interval_mask import IntervalMask

TRANSFORMERS_NAME = "metalm_interval"


def transformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> IntervalMask:
    """The mask of a bidirectional encoder, made once per forward and handed to all of its layers.

    Args:
        batch_size: rows of the batch.
        q_length: queries per row.
        kv_length: keys per row.
        attention_mask: `[B, Sk]`, non-zero at real positions, which are contiguous in each row: padding on
            either side, or on both. None: no padding.
        device: of the mask, where there is no padding to take it from.
    """
    if attention_mask is None:
        last = torch.full((batch_size,), kv_length, dtype=torch.int32, device=device)
        first = torch.zeros_like(last)
    else:
        real = attention_mask.bool()
        position = torch.arange(kv_length, dtype=torch.int32, device=real.device)
        first = torch.where(real, position, kv_length).amin(-1).to(torch.int32)
        last = torch.where(real, position + 1, 0).amax(-1).to(torch.int32)
        first = torch.minimum(first, last)
    return IntervalMask(
        first[:, None].expand(-1, q_length), last[:, None].expand(-1, q_length), num_keys=kv_length
    )


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: IntervalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    interval_mask: IntervalMask | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, query `[B, H, Sq, D]`, as `[B, Sq, H, D]`, and no weights.

    Args:
        module: the layer; its `is_causal` must not be set.
        query: `[B, H, Sq, D]`; key and value `[B, Hkv, Sk, D]`.
        attention_mask: from `transformers_mask`; None where the model makes no mask.
        scaling: factor of the scores.
        dropout: probability, already 0 outside training.
        interval_mask: given to the model's forward, it takes the place of `attention_mask`: packed spans.

    Raises:
        ValueError: the layer is causal, or the mask is none of ours.
    """
    if getattr(module, "is_causal", False):
        raise ValueError(f"{type(module).__name__} is causal, {TRANSFORMERS_NAME} serves encoders only")
    mask = attention_mask if interval_mask is None else interval_mask
    if mask is None:
        mask = transformers_mask(query.shape[0], query.shape[2], key.shape[2], device=query.device)
    if not isinstance(mask, IntervalMask):
        raise ValueError(
            f"the attention mask is a {type(mask).__name__}, expected an IntervalMask: give the model a "
            f"[B, S] mask and register transformers_mask as {TRANSFORMERS_NAME}"
        )
    out = interval_attention(query, key, value, mask, scale=scaling, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None
