"""Gemma: Llama with GeGLU, scaled embeddings, and norms that multiply by one more than their weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metalm.conversion.families.family import (
    Change,
    ForeignDecoder,
    first_of,
    refuse,
    rope_problems,
)
from metalm.conversion.families.llama import llama_like, llama_source


def read_gemma(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' GemmaConfig; the norms' ones become part of the weights.

    `hidden_act: gelu` of the first release means the tanh form, as transformers has it since 5.18.
    """
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    refuse(
        folder,
        {
            f"hidden_act = {activation}": activation not in ("gelu", "gelu_pytorch_tanh"),
            f"attention_bias = {config.attention_bias} beside a feed-forward without": config.attention_bias,
            "use_bidirectional_attention": bool(config.use_bidirectional_attention),
            **rope_problems(config.rope_parameters),
        },
    )
    decoder = llama_like(
        config,
        activation="geglu_tanh",
        norm="rms_norm",
        norm_eps=config.rms_norm_eps,
        biases=False,
        scale_embedding="rounded",
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
