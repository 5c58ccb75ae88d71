"""Bidirectional encoders over packed spans: text, and images followed by a text prefix.

One class serves both. All spans of a share lie end to end in one sequence, and the interval mask keeps
them apart; so a share of any mixture of lengths is one dense forward without padding to the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from metalm.batch import EncoderShare
from metalm.config import EncoderConfig, ModelConfig
from metalm.kernels import IntervalMask, interval_attention
from metalm.model.deepnorm import deepnorm_alpha, deepnorm_divisor
from metalm.model.initialization import Draw, constant, normal, xavier_std

EMBEDDING_STD = 0.02
LAYER_NORM_EPS = 1e-5


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, post-LN with DeepNorm or pre-LN."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.post_norm = config.normalization == "deepnorm"
        self.residual_scale = deepnorm_alpha(config.num_layers) if self.post_norm else 1.0
        self.attention_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.ffn_in = nn.Linear(hidden, config.feed_forward_size)
        self.ffn_out = nn.Linear(config.feed_forward_size, hidden)

    def forward(self, hidden: Tensor, mask: IntervalMask) -> Tensor:
        """[L, D] to [L, D]."""
        if self.post_norm:
            hidden = self.attention_norm(self.residual_scale * hidden + self._attend(hidden, mask))
            return self.ffn_norm(self.residual_scale * hidden + self._feed_forward(hidden))
        hidden = hidden + self._attend(self.attention_norm(hidden), mask)
        return hidden + self._feed_forward(self.ffn_norm(hidden))

    def _attend(self, hidden: Tensor, mask: IntervalMask) -> Tensor:
        length, width = hidden.shape
        qkv = self.qkv(hidden).view(length, 3, self.num_heads, width // self.num_heads)
        query, key, value = (part.transpose(0, 1)[None] for part in qkv.unbind(1))  # [1, H, L, K]
        attended = interval_attention(query, key, value, mask)
        return self.attention_output(attended[0].transpose(0, 1).reshape(length, width))

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.ffn_out(functional.gelu(self.ffn_in(hidden)))


class Encoder(nn.Module):
    """An encoder with its connector: packed elements in, vectors of the decoder's width out."""

    def __init__(self, config: EncoderConfig, vocab_size: int, decoder_hidden_size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.token_embedding = nn.Embedding(vocab_size, hidden)
        self.text_positions = nn.Embedding(config.max_text_positions, hidden)
        if config.image:
            self.patch_embedding = nn.Linear(3 * config.image.patch_size**2, hidden)
            self.image_positions = nn.Embedding(config.image.num_patches, hidden)
        self.has_images = config.image is not None
        self.recompute = config.recompute
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        pre_norm = config.normalization == "pre_ln"
        self.final_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS) if pre_norm else nn.Identity()
        self.connector = _build_connector(config.connector, hidden, decoder_hidden_size)

    def forward(self, share: EncoderShare) -> Tensor:
        """Encode one share.

        Every sub-module runs whatever the share holds, or ZeRO's collectives would not match up.

        Args:
            share: packed spans of one TP rank.

        Returns:
            [L, decoder hidden size], in the parameters' dtype.
        """
        hidden = self._embed(share)
        mask = IntervalMask(share.attention_start[None], share.attention_end[None], hidden.shape[0])
        for layer in self.layers:
            hidden = (
                checkpoint(layer, hidden, mask, use_reentrant=False)
                if self.recompute
                else layer(hidden, mask)
            )
        return self.connector(self.final_norm(hidden))

    def _embed(self, share: EncoderShare) -> Tensor:
        last_text_position = self.text_positions.num_embeddings - 1
        text_positions = share.positions.clamp(max=last_text_position)  # patches are replaced below
        hidden = self.token_embedding(share.token_ids) + self.text_positions(text_positions)
        if not self.has_images:
            return hidden
        pixels = share.patches.to(hidden.dtype) / 127.5 - 1.0
        grid_positions = share.positions.index_select(0, share.patch_slots)
        patches = self.patch_embedding(pixels) + self.image_positions(grid_positions)
        return hidden.index_copy(0, share.patch_slots, patches)


class EncoderBank(nn.Module):
    """All encoders of a model: one module, because they share one ZeRO engine."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                name: Encoder(encoder, config.padded_vocab_size, config.decoder.hidden_size)
                for name, encoder in config.encoders.items()
            }
        )

    def forward(self, shares: dict[str, EncoderShare]) -> dict[str, Tensor]:
        """Encode this rank's share with every encoder; see `Encoder.forward`."""
        return {name: encoder(shares[name]) for name, encoder in self.encoders.items()}


def encoder_draw(config: ModelConfig, name: str) -> Draw:
    """How a parameter of the EncoderBank starts. Embedding scale and connector are *open* in the paper."""
    _, encoder_name, *rest = name.split(".")
    encoder = config.encoders[encoder_name]
    leaf, kind = rest[-2], rest[-1]
    if kind == "bias":
        return constant(0.0)
    if leaf.endswith("norm"):
        return constant(1.0)
    if rest[0] == "connector":
        return _xavier
    if rest[0] != "layers":
        return normal(EMBEDDING_STD)
    if encoder.normalization == "pre_ln":
        depth = 2 * encoder.num_layers if leaf in ("attention_output", "ffn_out") else 1
        return normal(EMBEDDING_STD / depth**0.5)
    divisor = deepnorm_divisor(encoder.num_layers)
    if leaf == "qkv":
        return lambda whole, generator: _deepnorm_qkv(whole, generator, divisor)
    return lambda whole, generator: _xavier(whole, generator, divisor)


def _xavier(whole: Tensor, generator: torch.Generator, divisor: float = 1.0) -> None:
    fan_out, fan_in = whole.shape
    whole.normal_(0.0, xavier_std(fan_in, fan_out) / divisor, generator=generator)


def _deepnorm_qkv(whole: Tensor, generator: torch.Generator, divisor: float) -> None:
    for part, scale in zip(whole.chunk(3), (1.0, 1.0, divisor), strict=True):
        _xavier(part, generator, scale)


def _build_connector(kind: str, encoder_size: int, decoder_size: int) -> nn.Module:
    if kind == "linear":
        return nn.Sequential(nn.Linear(encoder_size, decoder_size))
    return nn.Sequential(
        nn.Linear(encoder_size, decoder_size),
        nn.GELU(),
        nn.Linear(decoder_size, decoder_size),
        nn.GELU(),
        nn.Linear(decoder_size, decoder_size),
    )
