"""Gradients of bf16 weights, added up over micro-batches and over ranks in fp32.

DeepSpeed's own key for it, `data_types.grad_accum_dtype`, does it at stages 2 and 3. At stage 1 that key has
another optimizer take over, which reduces over the data-parallel group of whichever engine was built last.
The optimizer of stage 1 can do it as well, where it is told after it was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from metalm.config import TrainingConfig


def gradient_keys(training: TrainingConfig, content: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is told of gradients, beside the JSON's content."""
    if not training.adds_up_in_fp32:
        return {}
    keys: dict[str, Any] = {"communication_data_type": "fp32"}
    if not _is_told_later(content):
        keys["data_types"] = {"grad_accum_dtype": "fp32"}
    return keys


def keep_fp32_gradients(optimizer: Any, training: TrainingConfig, content: Mapping[str, Any]) -> None:
    """Tell a ZeRO optimizer of stage 1, before its first step."""
    if training.adds_up_in_fp32 and _is_told_later(content):
        optimizer.gradient_accumulation_dtype = torch.float32
        optimizer.use_separate_grad_accum = optimizer.use_grad_accum_attribute = True


def _is_told_later(content: Mapping[str, Any]) -> bool:
    zero = content["zero_optimization"]
    return zero["stage"] == 1 and (zero.get("offload_optimizer") or {}).get("device", "none") == "none"
