"""GPT-2: learned positions, matrices that lie transposed, one for query, key and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metalm.config import DecoderConfig
from metalm.conversion.families.family import LAYER, Change, ForeignDecoder, as_it_is, first_of, refuse


def read_gpt2(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    """Of transformers' GPT2Config, and of the tensors' names."""
    refuse(
        folder,
        {
            f"activation_function = {config.activation_function}": config.activation_function
            not in ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights = false": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "add_cross_attention": config.add_cross_attention,
        },
    )
    decoder = DecoderConfig(
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_heads=config.n_head,
        ffn_hidden_size=config.n_inner or 4 * config.n_embd,
        activation="gelu_tanh",
        normalization="pre_ln",
        norm_eps=config.layer_norm_epsilon,
        positions="learned",
        max_positions=config.n_positions,
        scale_embedding=False,
        tied_output=config.tie_word_embeddings,
    )
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    return ForeignDecoder(
        decoder,
        config.vocab_size,
        config.n_positions,
        config.bos_token_id,
        first_of(config.eos_token_id),
        lambda target: _source(prefix, target),
    )


def _source(prefix: str, target: str) -> tuple[str, Change]:
    """GPT-2 multiplies from the left, so its matrices lie transposed; query, key, value are one."""
    outside = {
        "model.embed_tokens.weight": f"{prefix}wte.weight",
        "model.embed_positions.weight": f"{prefix}wpe.weight",
        "model.final_norm.weight": f"{prefix}ln_f.weight",
        "model.final_norm.bias": f"{prefix}ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }
    if target in outside:
        return outside[target], as_it_is
    match = LAYER.fullmatch(target)
    assert match is not None
    layer, module, leaf = match.groups()
    source = {
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "self_attn.q_proj": "attn.c_attn",
        "self_attn.k_proj": "attn.c_attn",
        "self_attn.v_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }[module]
    part = "qkv".index(module[10]) if source == "attn.c_attn" else None

    def change(tensor: Tensor) -> Tensor:
        own = tensor if part is None else tensor.chunk(3, dim=-1)[part]
        return own.T.contiguous() if own.dim() == 2 else own.contiguous()

    return f"{prefix}h.{layer}.{source}.{leaf}", change
