"""Language models of other families as the decoder: their configs in our terms, and where weights lie.

A family is understood when every number of its forward pass can be given by a DecoderConfig; whatever
else its config asks for is refused by name, and never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from metalm.config import DecoderConfig, RopeScalingConfig
from metalm.config.foreign_folder import read_foreign_config
from metalm.errors import ConfigError

_NAMED = {
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "mistral": ("sliding_window", "head_dim"),
    "qwen2": ("sliding_window", "use_sliding_window"),
}
"""What transformers' config of each type has beyond what all have."""
LLAMA_TYPES = tuple(_NAMED)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_UNUSED = re.compile(r".*(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
"""Buffers that old versions of transformers saved with the weights."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ForeignDecoder:
    """A language model of another family."""

    decoder: DecoderConfig
    vocab_size: int
    longest: int
    """Positions that it was made for."""
    start_id: int | None
    """Its token before a text."""
    end_id: int | None
    """Its token after a text."""
    find: Callable[[str], tuple[str, Change]]
    """By the name of a tensor of an exported MetaLM: the tensor of the folder, and what is made of it."""

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of the folder is no weight of the model."""
        return bool(_UNUSED.fullmatch(name)) or (name == "lm_head.weight" and self.decoder.tied_output)


def read_foreign_decoder(folder: Path, names: set[str]) -> ForeignDecoder:
    """Understand the config of a folder.

    Args:
        folder: as transformers saves models.
        names: of the tensors in it.

    Raises:
        ConfigError: there is no config, or it asks for what the decoder cannot do; all of it is named.
    """
    read_foreign_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of values that are not what a model's class expects: anything
        raise ConfigError(f"{folder} holds no config that transformers reads: {error}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder} is quantised; import the model as it was before")
    if config.model_type == "gpt2":
        return _gpt2(folder, config, names)
    if config.model_type in LLAMA_TYPES:
        return _llama(folder, config)
    known = ", ".join(("gpt2", *LLAMA_TYPES))
    raise ConfigError(f"{folder} is of the type {config.model_type!r}; decoders are imported from {known}")


def _gpt2(folder: Path, config: Any, names: set[str]) -> ForeignDecoder:
    _refuse(
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
        _first(config.eos_token_id),
        lambda target: _gpt2_source(prefix, target),
    )


def _gpt2_source(prefix: str, target: str) -> tuple[str, Change]:
    """GPT-2 multiplies from the left, so its matrices lie transposed; query, key, value are one."""
    outside = {
        "model.embed_tokens.weight": f"{prefix}wte.weight",
        "model.embed_positions.weight": f"{prefix}wpe.weight",
        "model.final_norm.weight": f"{prefix}ln_f.weight",
        "model.final_norm.bias": f"{prefix}ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }
    if target in outside:
        return outside[target], lambda tensor: tensor
    match = _LAYER.fullmatch(target)
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


def _llama(folder: Path, config: Any) -> ForeignDecoder:
    if absent := [name for name in _NAMED[config.model_type] if not hasattr(config, name)]:
        raise ConfigError(
            f"this version of transformers has no {', '.join(absent)} in a config of type "
            f"{config.model_type}: what the model asks for would be missed"
        )
    rope = config.rope_parameters
    attention_bias = getattr(config, "attention_bias", False)
    mlp_bias = getattr(config, "mlp_bias", False)
    window = getattr(config, "sliding_window", None)  # None in Qwen2, too, where it is not used
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _refuse(
        folder,
        {
            f"hidden_act = {config.hidden_act}": config.hidden_act != "silu",
            f"head_dim = {head_size} with hidden_size = {config.hidden_size} and "
            f"num_attention_heads = {config.num_attention_heads}": head_size * config.num_attention_heads
            != config.hidden_size,
            f"rope_type = {rope['rope_type']}": rope["rope_type"] not in ("default", "llama3"),
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
            f"attention_bias = {attention_bias} with mlp_bias = {mlp_bias}": attention_bias != mlp_bias,
        },
    )
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = RopeScalingConfig(
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_positions=rope["original_max_position_embeddings"],
        )
    decoder = DecoderConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        ffn_hidden_size=config.intermediate_size,
        activation="swiglu",
        normalization="pre_ln",
        norm="rms_norm",
        norm_eps=config.rms_norm_eps,
        biases=mlp_bias,
        qkv_biases=config.model_type == "qwen2",
        positions="rope",
        rope_base=rope["rope_theta"],
        rope_scaling=scaling,
        scale_embedding=False,
        tied_output=config.tie_word_embeddings,
    )
    return ForeignDecoder(
        decoder,
        config.vocab_size,
        min(config.max_position_embeddings, window or config.max_position_embeddings),
        config.bos_token_id,
        _first(config.eos_token_id),
        _llama_source,
    )


def _llama_source(target: str) -> tuple[str, Change]:
    renamed = (
        target.replace(".attention_norm.", ".input_layernorm.")
        .replace(".mlp_norm.", ".post_attention_layernorm.")
        .replace("model.final_norm.", "model.norm.")
    )
    return renamed, lambda tensor: tensor


def _refuse(folder: Path, problems: dict[str, bool]) -> None:
    if found := [what for what, holds in problems.items() if holds]:
        lines = [f"  {what}" for what in found]
        raise ConfigError("\n".join([f"{folder} asks for what the decoder cannot do:", *lines]))


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids
