"""Which families of language models can be the decoder, and the reading of a folder of one.

A family is understood when every number of its forward pass can be given by a DecoderConfig; whatever
else its config asks for is refused by name, and never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from metalm.config.foreign_folder import read_foreign_config
from metalm.conversion.families.family import ForeignDecoder
from metalm.conversion.families.gemma import read_gemma
from metalm.conversion.families.gpt2 import read_gpt2
from metalm.conversion.families.gpt_neox import read_gpt_neox
from metalm.conversion.families.llama import read_llama
from metalm.conversion.families.olmo import read_olmo
from metalm.errors import ConfigError

FAMILIES: dict[str, Callable[[Path, Any, set[str]], ForeignDecoder]] = {
    "gpt2": read_gpt2,
    "llama": read_llama,
    "mistral": read_llama,
    "qwen2": read_llama,
    "gpt_neox": read_gpt_neox,
    "olmo": read_olmo,
    "gemma": read_gemma,
}
"""By transformers' name of the type; each reader takes the folder, its config and the tensors' names."""
_NAMED = {
    "gpt2": (),
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "mistral": ("sliding_window", "head_dim"),
    "qwen2": ("sliding_window", "use_sliding_window"),
    "gpt_neox": ("attention_bias", "use_parallel_residual"),
    "olmo": ("attention_bias", "clip_qkv"),
    "gemma": ("attention_bias", "head_dim", "use_bidirectional_attention"),
}
"""What transformers' config of each type has beyond what all have."""
_SANDWICH = "rms_norm_eps is of four norms in each layer, before and behind attention and feed-forward"
_NORMS_BEHIND = (
    "rms_norm_eps is of norms behind attention and feed-forward, and of all queries and all keys at once"
)
_CANNOT_BE = {
    "gemma2": f"{_SANDWICH}; attn_logit_softcapping and final_logit_softcapping cap scores and logits; "
    "query_pre_attn_scalar scales scores; layer_types has windows",
    "gemma3": f"{_SANDWICH}, and of queries and keys; layer_types has windows, with rotary positions of "
    "their own; query_pre_attn_scalar scales scores",
    "olmo2": _NORMS_BEHIND,
    "olmo3": f"{_NORMS_BEHIND}; layer_types has windows",
}
_CANNOT_BE["gemma3_text"] = _CANNOT_BE["gemma3"]
"""Relatives of families that Megatron's layer cannot hold, and what their config asks for."""


def read_foreign_decoder(folder: Path, names: set[str]) -> ForeignDecoder:
    """Understand the config of a folder.

    Args:
        folder: as transformers saves models.
        names: of the tensors in it.

    Raises:
        ConfigError: there is no config, or it asks for what the decoder cannot do; all of it is named.
    """
    content = read_foreign_config(folder)
    kind = content.get("model_type")
    if kind in _CANNOT_BE:
        raise ConfigError(
            f"{folder} is of the type {kind!r}, which the decoder cannot be: {_CANNOT_BE[kind]}"
        )
    if kind not in FAMILIES:
        raise ConfigError(
            f"{folder} is of the type {kind!r}; decoders are imported from {', '.join(FAMILIES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of values that are not what a model's class expects: anything
        raise ConfigError(f"{folder} holds no config that transformers reads: {error}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder} is quantised; import the model as it was before")
    if absent := [name for name in _NAMED[kind] if not hasattr(config, name)]:
        raise ConfigError(
            f"this version of transformers has no {', '.join(absent)} in a config of type "
            f"{kind}: what the model asks for would be missed"
        )
    return FAMILIES[kind](folder, config, names)
