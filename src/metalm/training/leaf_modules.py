"""Encoder layers that ZeRO 3 gathers whole, not matrix by matrix: half of the host's time, and fewer gathers.

DeepSpeed reduces the gradients of such a leaf module when the gradient of the layer's input is there. Where
the input has none, it reduces zeros in their place, without a word: such a layer is no leaf.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from metalm.errors import ConfigError
from metalm.model.encoder import EncoderBank


def mark_leaf_modules(bank: EncoderBank) -> int:
    """Mark the layers of all encoders, before their engine is built; how many were.

    The lowest layer that is trained above frozen ones, whose input has no gradient, is not among them.
    """
    count = 0
    for encoder in bank.encoders.values():
        has_gradient = encoder.config.trained_layers == "all"
        for layer in encoder.layers:
            is_trained = any(parameter.requires_grad for parameter in layer.parameters())
            if has_gradient or not is_trained:
                set_z3_leaf_module(layer, True)
                count += 1
            if has_gradient and is_trained:
                layer.register_forward_pre_hook(_refuse_input_without_gradient)
            has_gradient = has_gradient or is_trained
    return count


def _refuse_input_without_gradient(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Of layers that are given their input by keyword, too, where DeepSpeed does not see it."""
    if torch.is_grad_enabled() and not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise ConfigError(
            f"layers of the class {type(layer).__name__} cannot be gathered whole by ZeRO 3, which would not "
            "train them: give deepspeed.encoders=deepspeed_configs/encoders_zero1.json"
        )
