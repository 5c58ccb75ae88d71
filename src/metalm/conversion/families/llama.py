"""Llama, Mistral and Qwen2: RMS norms, SwiGLU, rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metalm.config import DecoderConfig
from metalm.conversion.families.family import (
    Change,
    ForeignDecoder,
    as_it_is,
    first_of,
    refuse,
    rope_problems,
    rope_scaling,
    unusual_head_dim,
)


def read_llama(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' LlamaConfig, MistralConfig or Qwen2Config."""
    attention_bias = getattr(config, "attention_bias", False)
    mlp_bias = getattr(config, "mlp_bias", False)
    window = getattr(config, "sliding_window", None)  # None in Qwen2, too, where it is not used
    refuse(
        folder,
        {
            f"hidden_act = {config.hidden_act}": config.hidden_act != "silu",
            f"attention_bias = {attention_bias} with mlp_bias = {mlp_bias}": attention_bias != mlp_bias,
            **rope_problems(config.rope_parameters),
        },
    )
    decoder = llama_like(
        config,
        activation="swiglu",
        norm="rms_norm",
        norm_eps=config.rms_norm_eps,
        biases=mlp_bias,
        qkv_biases=config.model_type == "qwen2",
        scale_embedding=False,
    )
    return ForeignDecoder(
        decoder,
        config.vocab_size,
        min(config.max_position_embeddings, window or config.max_position_embeddings),
        config.bos_token_id,
        first_of(config.eos_token_id),
        llama_source,
    )


def llama_like(config: Any, **own: Any) -> DecoderConfig:
    """The decoder of a family that has Llama's keys in its config; `own` is what else it has."""
    rope = config.rope_parameters
    return DecoderConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=unusual_head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        normalization="pre_ln",
        positions="rope",
        rope_base=rope["rope_theta"],
        rope_scaling=rope_scaling(rope),
        tied_output=config.tie_word_embeddings,
        **own,
    )


def llama_source(target: str) -> tuple[str, Change]:
    """Names of Llama, which later families took over."""
    renamed = (
        target.replace(".attention_norm.", ".input_layernorm.")
        .replace(".mlp_norm.", ".post_attention_layernorm.")
        .replace("model.final_norm.", "model.norm.")
    )
    return renamed, as_it_is
