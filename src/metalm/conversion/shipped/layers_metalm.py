"""Positions of MetaLM, and its attention and layers, the same for the decoder and the encoders.

Shape letters: B rows or spans, L positions, D hidden, H heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_metalm import MetaLMConfig


def sinusoidal_positions(positions: Tensor, hidden_size: int) -> Tensor:
    """Sines at even and cosines at odd dimensions (Vaswani et al., 2017); [...] to [..., D] float32."""
    exponents = torch.arange(0, hidden_size, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * torch.exp(exponents * (-math.log(10000.0) / hidden_size))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rotary_factors(positions: Tensor, head_size: int, parameters: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Cosines and sines that turn queries and keys (Su et al., 2021), [B, S] to [B, 1, S, turned] float32.

    Raises:
        ValueError: `parameters` ask for a scaling other than "llama3".
    """
    turned = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, turned, 2, device=positions.device, dtype=torch.float32) / turned
    frequencies = 1.0 / parameters["rope_theta"] ** exponents
    if parameters["rope_type"] == "llama3":
        # Short wavelengths stay, long ones are stretched, those between blend.
        turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / parameters["factor"])
    elif parameters["rope_type"] != "default":
        raise ValueError(f"rope_type is {parameters['rope_type']!r}, expected 'default' or 'llama3'")
    angles = positions.float()[:, None, :, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by explicit probabilities, [B, H, L, K] each, with an additive mask [B, 1, L, keys].

    Keys and values may have fewer heads, each for as many queries.

    Returns:
        Output [B, L, H, K] and probabilities [B, H, L, keys].
    """
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    attended = functional.dropout(probabilities, p=dropout, training=module.training) @ value
    return attended.transpose(1, 2).contiguous(), probabilities


class MetaLMLinear(nn.Linear):
    """A linear map that knows the gain of its initial weights."""

    init_gain = 1.0


class MetaLMAttention(nn.Module):
    """Multi-head attention, bidirectional."""

    is_causal = False

    def __init__(
        self,
        config: MetaLMConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_size: int | None = None,
        qkv_biases: bool = True,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.head_size = head_size or hidden_size // num_heads
        self.num_key_value_groups = num_heads // num_kv_heads
        query_size, key_value_size = num_heads * self.head_size, num_kv_heads * self.head_size
        self.q_proj = MetaLMLinear(hidden_size, query_size, bias=qkv_biases)
        self.k_proj = MetaLMLinear(hidden_size, key_value_size, bias=qkv_biases)
        self.v_proj = MetaLMLinear(hidden_size, key_value_size, bias=qkv_biases)
        self.o_proj = MetaLMLinear(query_size, hidden_size, bias=output_bias)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] to [B, L, D], and the probabilities where the implementation has them.

        Args:
            rotary: cosines and sines [B, 1, L, turned] that turn queries and keys.
        """
        split = (*hidden.shape[:2], -1, self.head_size)
        query, key, value = (
            projection(hidden).view(split).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = _turn(query, *rotary), _turn(key, *rotary)
        key, value = self._remember(key, value, cache)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if kwargs.pop("has_bias", False):  # the fused kernels of other implementations take no bias
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attended, probabilities = attend(
            self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0, **kwargs
        )
        return self.o_proj(attended.reshape(*hidden.shape[:2], -1)), probabilities

    def _remember(self, key: Tensor, value: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        return key, value


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions of a head's first dimensions: of T, dimension i is paired with i + T/2."""
    turned, kept = heads.tensor_split([cosines.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosines + torch.cat((-second, first), dim=-1) * sines
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


class MetaLMCausalAttention(MetaLMAttention):
    """Multi-head attention of the decoder: causal, with a cache of keys and values."""

    is_causal = True

    def __init__(self, config: MetaLMConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size=config.head_dim,
            qkv_biases=config.biases or config.qkv_biases,
            output_bias=config.biases,
        )
        self.layer_idx = layer_idx

    def _remember(self, key: Tensor, value: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        if cache is None:
            return key, value
        return cache.update(key, value, self.layer_idx)


class MetaLMFeedForward(nn.Module):
    """Two linear maps with an activation between; SwiGLU and GeGLU have a third, the gate."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "gelu", *, biases: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        if activation in ("swiglu", "geglu_tanh"):
            self.gate_proj = MetaLMLinear(hidden_size, intermediate_size, bias=biases)
        self.up_proj = MetaLMLinear(hidden_size, intermediate_size, bias=biases)
        self.down_proj = MetaLMLinear(intermediate_size, hidden_size, bias=biases)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        wide = self.up_proj(hidden)
        if self.activation == "swiglu":
            return self.down_proj(functional.silu(self.gate_proj(hidden)) * wide)
        if self.activation == "geglu_tanh":
            return self.down_proj(functional.gelu(self.gate_proj(hidden), approximate="tanh") * wide)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down_proj(functional.gelu(wide, approximate=approximate))


def build_norm(kind: str, hidden_size: int, eps: float) -> nn.Module:
    """A "layer_norm" or an "rms_norm"."""
    return (nn.RMSNorm if kind == "rms_norm" else nn.LayerNorm)(hidden_size, eps=eps)


class MetaLMRoutedFeedForward(nn.ModuleDict):
    """VLMo's feed-forwards: each element goes through the one of its modality, or through a joint one."""

    def forward(self, hidden: Tensor, routes: dict[str, Tensor]) -> Tensor:
        """[B, L, D] to [B, L, D].

        Args:
            hidden: all elements.
            routes: by name of a feed-forward, [B, L] bool; `joint` wins over the others where it is known.
        """
        output = torch.zeros_like(hidden)
        taken = torch.zeros_like(routes["joint"])
        for name in ("joint", "vision", "language"):
            if name in self:
                chosen = routes[name] & ~taken
                output[chosen] = self[name](hidden[chosen]).to(output.dtype)  # another one under autocast
                taken = taken | chosen
        return output


class MetaLMLayer(GradientCheckpointingLayer):
    """Attention and feed-forward; post-LN with DeepNorm's residual weight (Wang et al., 2022), or pre-LN."""

    def __init__(
        self,
        attention: MetaLMAttention,
        mlp: nn.Module,
        *,
        hidden_size: int,
        num_layers: int,
        normalization: str,
        norm: str,
        eps: float,
        parallel_residual: bool = False,
    ) -> None:
        super().__init__()
        self.post_norm = normalization == "deepnorm"
        self.parallel_residual = parallel_residual
        self.residual_scale = (2 * num_layers) ** 0.25 if self.post_norm else 1.0
        self.self_attn = attention
        self.attention_norm = build_norm(norm, hidden_size, eps)
        self.mlp = mlp
        self.mlp_norm = build_norm(norm, hidden_size, eps)
        # DeepNorm scales what passes values through; pre-LN what is added to the residual stream.
        linear = [part for part in mlp.modules() if isinstance(part, MetaLMLinear)]
        downs = [part.down_proj for part in mlp.modules() if isinstance(part, MetaLMFeedForward)]
        values = [attention.v_proj, attention.o_proj, *linear]
        scaled = values if self.post_norm else [attention.o_proj, *downs]
        for part in scaled:
            part.init_gain = (8 * num_layers) ** -0.25 if self.post_norm else (2 * num_layers) ** -0.5

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        routes: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        if self.post_norm:
            attended, _ = self.self_attn(hidden, attention_mask, cache, **kwargs)
            hidden = self.attention_norm(self.residual_scale * hidden + attended)
            return self.mlp_norm(self.residual_scale * hidden + self._feed_forward(hidden, routes))
        attended, _ = self.self_attn(self.attention_norm(hidden), attention_mask, cache, **kwargs)
        attended = hidden + attended
        seen = hidden if self.parallel_residual else attended
        return attended + self._feed_forward(self.mlp_norm(seen), routes)

    def _feed_forward(self, hidden: Tensor, routes: dict[str, Tensor] | None) -> Tensor:
        return self.mlp(hidden) if routes is None else self.mlp(hidden, routes)


class MetaLMDecoderLayer(MetaLMLayer):
    """A layer of the decoder."""

    def __init__(self, config: MetaLMConfig, layer_idx: int) -> None:
        super().__init__(
            MetaLMCausalAttention(config, layer_idx),
            MetaLMFeedForward(
                config.hidden_size, config.intermediate_size, config.activation, biases=config.biases
            ),
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            normalization=config.normalization,
            norm=config.norm,
            eps=config.norm_eps,
            parallel_residual=config.parallel_residual,
        )


class MetaLMEncoderLayer(MetaLMLayer):
    """A layer of an encoder, whose sizes are `config.encoders[name]`."""

    def __init__(self, config: MetaLMConfig, name: str, layer: int) -> None:
        sizes = config.encoders[name]
        hidden_size, num_heads, biases = (
            sizes[key] for key in ("hidden_size", "num_attention_heads", "biases")
        )

        def feed_forward() -> MetaLMFeedForward:
            wide, activation = sizes["intermediate_size"], sizes["activation"]
            return MetaLMFeedForward(hidden_size, wide, activation, biases=biases)

        mlp: nn.Module
        if sizes["joint_layers"] is None:
            mlp = feed_forward()
        else:
            joint = ("joint",) if layer >= sizes["num_hidden_layers"] - sizes["joint_layers"] else ()
            names = ("vision", "language", *joint)
            mlp = MetaLMRoutedFeedForward({name: feed_forward() for name in names})
        super().__init__(
            MetaLMAttention(
                config,
                hidden_size,
                num_heads,
                sizes["num_key_value_heads"] or num_heads,
                qkv_biases=biases,
                output_bias=biases,
            ),
            mlp,
            hidden_size=hidden_size,
            num_layers=sizes["num_hidden_layers"],
            normalization=sizes["normalization"],
            norm=sizes["norm"],
            eps=sizes["norm_eps"],
        )
