"""What all families of decoders are understood as, and how what the decoder cannot do is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from metalm.config import DecoderConfig, RopeScalingConfig
from metalm.errors import ConfigError

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
"""A tensor of a layer of an exported MetaLM."""
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""What transformers calls GELU by a hyperbolic tangent."""
_UNUSED = re.compile(r".*(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")
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
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Ends of names of an exported MetaLM's tensors that the family lacks, and the value they are full of."""
    output: str = "lm_head.weight"
    """The output layer's tensor in the folder."""

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of the folder is no weight of the model."""
        return bool(_UNUSED.fullmatch(name)) or (name == self.output and self.decoder.tied_output)

    def value_of(self, target: str) -> float | None:
        """What all values of a tensor of an exported MetaLM are; None: it comes from the folder."""
        return next((value for end, value in self.fixed.items() if target.endswith(end)), None)


def refuse(folder: Path, problems: Mapping[str, bool]) -> None:
    """Refuse what the decoder cannot do.

    Args:
        folder: that asks for it.
        problems: keys of its config with their values, and whether they are such.

    Raises:
        ConfigError: naming every problem.
    """
    if found := [what for what, holds in problems.items() if holds]:
        lines = [f"  {what}" for what in found]
        raise ConfigError("\n".join([f"{folder} asks for what the decoder cannot do:", *lines]))


def rope_problems(rope: Mapping[str, Any], *, may_be_partial: bool = False) -> dict[str, bool]:
    """What of transformers' `rope_parameters` the decoder cannot do."""
    share = rope.get("partial_rotary_factor", 1.0)
    return {
        f"rope_type = {rope['rope_type']}": rope["rope_type"] not in ("default", "llama3"),
        f"partial_rotary_factor = {share}": share != 1.0 and not may_be_partial,
    }


def rope_scaling(rope: Mapping[str, Any]) -> RopeScalingConfig | None:
    """Of transformers' `rope_parameters`."""
    if rope["rope_type"] != "llama3":
        return None
    return RopeScalingConfig(
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_positions=rope["original_max_position_embeddings"],
    )


def unusual_head_dim(config: Any) -> int | None:
    """The width of a head, where heads are not as wide together as the hidden size."""
    size: int | None = getattr(config, "head_dim", None)
    usual = size is None or size * config.num_attention_heads == config.hidden_size
    return None if usual else size


def as_it_is(tensor: Tensor) -> Tensor:
    """No change."""
    return tensor


def first_of(ids: int | list[int] | None) -> int | None:
    """A token, of one or of several that mean the same."""
    return ids[0] if isinstance(ids, list) else ids
