"""GPT-NeoX, as Pythia is: layer norms, rotary positions of a part of each head, parallel residuals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metalm.config import DecoderConfig
from metalm.conversion.families.family import (
    GELU_TANH,
    LAYER,
    Change,
    ForeignDecoder,
    as_it_is,
    first_of,
    refuse,
    rope_problems,
    rope_scaling,
)


def read_gpt_neox(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' GPTNeoXConfig, and of the tensors' names."""
    rope = config.rope_parameters
    refuse(
        folder,
        {
            f"hidden_act = {config.hidden_act}": config.hidden_act not in ("gelu", *GELU_TANH),
            "attention_bias = False beside a feed-forward with biases": not config.attention_bias,
            **rope_problems(rope, may_be_partial=True),
        },
    )
    decoder = DecoderConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        activation="gelu" if config.hidden_act == "gelu" else "gelu_tanh",
        normalization="pre_ln",
        parallel_residual=config.use_parallel_residual,
        norm_eps=config.layer_norm_eps,
        positions="rope",
        rope_base=rope["rope_theta"],
        rope_share=rope.get("partial_rotary_factor", 1.0),
        rope_scaling=rope_scaling(rope),
        scale_embedding=False,
        tied_output=config.tie_word_embeddings,
    )
    prefix = "gpt_neox." if "gpt_neox.embed_in.weight" in names else ""
    output = "embed_out.weight" if "embed_out.weight" in names else "lm_head.weight"  # before transformers 5
    return ForeignDecoder(
        decoder,
        config.vocab_size,
        config.max_position_embeddings,
        config.bos_token_id,
        first_of(config.eos_token_id),
        lambda target: _source(prefix, output, decoder.num_heads, target),
        output=output,
    )


def _source(prefix: str, output: str, num_heads: int, target: str) -> tuple[str, Change]:
    """Query, key and value are one matrix, whose rows are all of the first head, then of the next ones."""
    outside = {
        "model.embed_tokens.weight": f"{prefix}embed_in.weight",
        "model.final_norm.weight": f"{prefix}final_layer_norm.weight",
        "model.final_norm.bias": f"{prefix}final_layer_norm.bias",
        "lm_head.weight": output,
    }
    if target in outside:
        return outside[target], as_it_is
    match = LAYER.fullmatch(target)
    assert match is not None
    layer, module, leaf = match.groups()
    source = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "self_attn.q_proj": "attention.query_key_value",
        "self_attn.k_proj": "attention.query_key_value",
        "self_attn.v_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }[module]
    if source != "attention.query_key_value":
        return f"{prefix}layers.{layer}.{source}.{leaf}", as_it_is
    part = "qkv".index(module[10])

    def change(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (num_heads, 3, -1))[:, part].flatten(0, 1)

    return f"{prefix}layers.{layer}.{source}.{leaf}", change
