"""The decoder's config in Megatron's terms, and what Megatron leaves unsaid about its parameters."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from metalm.config import DecoderConfig

NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}


def megatron_config(config: DecoderConfig, tensor_size: int, *, sequence_parallel: bool) -> TransformerConfig:
    """The config of Megatron's GPTModel for one tensor-parallel rank."""
    built = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.key_value_heads,
        kv_channels=config.head_size,
        ffn_hidden_size=config.feed_forward_size,
        activation_func=functional.silu if config.activation == "swiglu" else functional.gelu,
        gated_linear_unit=config.is_gated,
        add_bias_linear=config.biases,
        add_qkv_bias=config.qkv_biases,
        normalization=NORMS[config.norm],
        layernorm_epsilon=config.norm_eps,
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=sequence_parallel,
        # Weights come from initialize_parameters, drawn on the CPU alike for every topology.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    # The class that `decoder_block_spec` names. Set afterwards: Megatron allows it for some activations only.
    built.use_te_activation_func = True
    return built


def mark_sharded_parameters(module: nn.Module, config: DecoderConfig) -> None:
    """Say which dimension of which parameter is split, where Megatron says it only while initialising.

    The first layer of a gated feed-forward holds gate and value, each of which is split by itself.
    """
    for name, part in module.named_modules():
        if not isinstance(part, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            continue
        if part.weight is not None:
            stride = 2 if config.is_gated and name.endswith("linear_fc1") else 1
            dimension = 1 if isinstance(part, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(part.weight, True, dimension, stride)
