"""Gemma: Llama with GeGLU, scaled embeddings, and norms that multiply by one more than their weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metalm.config import DecoderConfig
from metalm.conversion.families.family import (
    Change,
    ForeignDecoder,
    first_of,
    refuse,
    rope_problems,
    rope_scaling,
    unusual_head_dim,
)
from metalm.conversion.families.llama import llama_source


def read_gemma(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' GemmaConfig; the norms' ones become part of the weights.

    `hidden_act: gelu` of the first release means the tanh form, as transformers has it since 5.18.
    """
    rope = config.rope_parameters
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    refuse(
        folder,
        {
            f"hidden_act = {activation}": activation not in ("gelu", "gelu_pytorch_tanh"),
            f"attention_bias = {config.attention_bias} beside a feed-forward without": config.attention_bias,
            "use_bidirectional_attention": bool(config.use_bidirectional_attention),
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
        activation="geglu_tanh",
        normalization="pre_ln",
        norm="rms_norm",
        norm_eps=config.rms_norm_eps,
        biases=False,
        positions="rope",
        rope_base=rope["rope_theta"],
        rope_scaling=rope_scaling(rope),
        scale_embedding="rounded",
        tied_output=config.tie_word_embeddings,
    )
    return ForeignDecoder(
        decoder,
        config.vocab_size,
        config.max_position_embeddings,
        config.bos_token_id,
        first_of(config.eos_token_id),
        _source,
    )


def _source(target: str) -> tuple[str, Change]:
    name, as_it_is = llama_source(target)
    return name, _with_one if target.endswith("norm.weight") else as_it_is


def _with_one(weight: Tensor) -> Tensor:
    return weight + 1.0
