"""OLMo: Llama with layer norms that have no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metalm.conversion.families.family import (
    ForeignDecoder,
    first_of,
    refuse,
    rope_problems,
)
from metalm.conversion.families.llama import llama_like, llama_source

_NORM_EPS = 1e-5
"""Not in the config, but in transformers' code."""


def read_olmo(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' OlmoConfig. The norms start with weights of 1 and biases of 0: the same numbers."""
    refuse(
        folder,
        {
            f"hidden_act = {config.hidden_act}": config.hidden_act != "silu",
            f"clip_qkv = {config.clip_qkv}": config.clip_qkv is not None,
            f"attention_bias = {config.attention_bias} beside a feed-forward without": config.attention_bias,
            **rope_problems(config.rope_parameters),
        },
    )
    decoder = llama_like(
        config,
        activation="swiglu",
        norm="layer_norm",
        norm_eps=_NORM_EPS,
        biases=False,
        scale_embedding=False,
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
