"""Adapters: few trained weights beside a linear map whose own are frozen.

Their parameters stand in the module of the map, where ZeRO 3 gathers them together with its weight:
`lora_a` [rank, in] and `lora_b` [out, rank], or `ia3`. They start with B = 0, or with a vector of ones, so
that the map is what it is without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.config import AdapterConfig, DecoderConfig, EncoderConfig
from metalm.errors import ConfigError
from metalm.model.initialization import Draw, constant

LORA_A, LORA_B, IA3 = "lora_a", "lora_b", "ia3"
_TARGET_OF = {
    "qkv": "query_key_value",
    "attention_output": "attention_output",
    "ffn_in": "feed_forward_in",
    "ffn_out": "feed_forward_out",
}
"""Of the maps in our encoders' layers, by module."""


@dataclass(frozen=True)
class KeyValueScale:
    """Where in the rows of a fused projection the keys and values are that IA3 scales.

    The rows are those of `groups` groups, each with its queries first; of heads of `head_size` rows.
    """

    groups: int
    queries: int
    """Heads of one group."""
    key_values: int
    """Heads of keys and values of one group."""
    head_size: int

    @property
    def size(self) -> int:
        """Of the vector."""
        return self.groups * self.key_values * self.head_size

    def rows(self, vector: Tensor) -> Tensor:
        """What each row is multiplied by: [rows], ones for the queries."""
        scales = vector.view(self.groups, self.key_values, self.head_size)
        ones = scales.new_ones(self.groups, self.queries, self.head_size)
        return torch.cat((ones, scales), dim=1).flatten()


def decoder_key_values(config: DecoderConfig, tensor_size: int = 1) -> KeyValueScale:
    """By key head: its queries, the key, the value."""
    groups = config.key_value_heads
    return KeyValueScale(groups // tensor_size, config.num_heads // groups, 2, config.head_size)


def encoder_key_values(encoder: EncoderConfig) -> KeyValueScale:
    """All queries, all keys, all values."""
    return KeyValueScale(1, encoder.num_heads, 2 * encoder.key_value_heads, encoder.head_size)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, is an adapter's."""
    return name.rsplit(".", 1)[-1] in (LORA_A, LORA_B, IA3)


def adapter_draw(name: str) -> Draw | None:
    """How a parameter starts; None where it is no adapter's. A as in LoRA's own implementation."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == LORA_A:
        return _draw_a
    return {LORA_B: constant(0.0), IA3: constant(1.0)}.get(leaf)


def _draw_a(whole: Tensor, generator: torch.Generator) -> None:
    bound = whole.shape[1] ** -0.5
    whole.uniform_(-bound, bound, generator=generator)


class _BesideLinear(nn.Linear):
    """Takes the place, weight and bias of a linear map."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias


class LoraLinear(_BesideLinear):
    """W x + scale * B A x."""

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base)
        self.scale, rank, weight = config.scale, config.factor_rank, base.weight
        self.lora_a = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(weight.new_empty(base.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        low = functional.linear(input, self.lora_a)
        return super().forward(input) + self.scale * functional.linear(low, self.lora_b)


class ScaledKeyValues(_BesideLinear):
    """A fused projection whose keys and values are scaled, element by element."""

    def __init__(self, base: nn.Linear, places: KeyValueScale) -> None:
        super().__init__(base)
        self.places = places
        self.ia3 = nn.Parameter(base.weight.new_empty(places.size))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return super().forward(input) * self.places.rows(self.ia3)


class ScaledInput(_BesideLinear):
    """A map whose input is scaled, element by element."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.ia3 = nn.Parameter(base.weight.new_empty(base.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return super().forward(input * self.ia3)


def adapt_encoder(layers: nn.Module, config: EncoderConfig) -> None:
    """Put the adapter's maps in the place of those of an encoder of ours."""
    adapter = config.adapter
    assert adapter is not None
    for name, module in _linear_modules(layers).items():
        target = _TARGET_OF.get(name.rsplit(".", 1)[-1])
        if target not in adapter.own_targets:
            continue
        if adapter.kind == "lora":
            layers.set_submodule(name, LoraLinear(module, adapter))
        elif target == "query_key_value":
            layers.set_submodule(name, ScaledKeyValues(module, encoder_key_values(config)))
        else:
            layers.set_submodule(name, ScaledInput(module))


def adapt_pretrained(model: nn.Module, adapter: AdapterConfig, unused: frozenset[str]) -> None:
    """Put LoRA's maps in the place of those of a model of transformers.

    Args:
        model: with its weights.
        adapter: its targets are ends of modules' names.
        unused: parameters that the vectors do not depend on.

    Raises:
        ConfigError: a target is the end of no linear module's name.
    """
    modules = {n: m for n, m in _linear_modules(model).items() if f"{n}.weight" not in unused}
    for target in adapter.targets:
        found = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
            raise ConfigError(
                f"adapter.targets: no linear module of {type(model).__name__} has a name that ends in "
                f"{target!r}; ends of names: {known}"
            )
        for name in found:
            model.set_submodule(name, LoraLinear(modules.pop(name), adapter))


def _linear_modules(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if type(part) is nn.Linear}
