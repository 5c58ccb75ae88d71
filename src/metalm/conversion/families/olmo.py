"""OLMo: Llama with layer norms that have no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metalm.config import DecoderConfig
from metalm.conversion.families.family import (
    ForeignDecoder,
    first_of,
    refuse,
    rope_problems,
    rope_scaling,
    unusual_head_dim,
)
from metalm.conversion.families.llama import llama_source

_NORM_EPS = 1e-5
"""Not in the config, but in transformers' code."""


def read_olmo(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' OlmoConfig. The norms start with weights of 1 and biases of 0: the same numbers."""
    rope = config.rope_parameters
    refuse(
        folder,
        {
            f"hidden_act = {config.hidden_act}": config.hidden_act != "silu",
            f"clip_qkv = {config.clip_qkv}": config.clip_qkv is not None,
            f"attention_bias = {config.attention_bias} beside a feed-forward without": config.attention_bias,
            **rope_problems(rope),
        },
    )
    decoder = DecoderConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=unusual_head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        activation="swiglu",
        normalization="pre_ln",
        norm="layer_norm",
        norm_eps=_NORM_EPS,
        biases=False,
        positions="rope",
        rope_base=rope["rope_theta"],
        rope_scaling=rope_scaling(rope),
        scale_embedding=False,
        tied_output=config.tie_word_embeddings,
    )
    return ForeignDecoder(
        decoder,
        config.vocab_size,
        config.max_position_embeddings,
        config.bos_token_id,
        first_of(config.eos_token_id),
        llama_source,
        fixed={"norm.weight": 1.0, "norm.bias": 0.0},
    )
