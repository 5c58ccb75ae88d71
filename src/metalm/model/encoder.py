"""Bidirectional encoders over packed spans: text, and images followed by a text prefix.

One class serves both. All spans of a share lie end to end in one sequence, and the interval mask keeps
them apart; so a share of any mixture of lengths is one dense forward without padding to the longest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metalm.batch import EncoderShare
from metalm.config import EncoderConfig, ModelConfig
from metalm.errors import ConfigError
from metalm.kernels import RelativeBias
from metalm.modalities import modality_of_encoder
from metalm.model.adapters import adapt_encoder, adapter_draw, is_adapter
from metalm.model.connector import build_connector, build_detection_head
from metalm.model.deepnorm import deepnorm_divisor
from metalm.model.encoder_layer import EncoderLayer, EncoderNorm, Where
from metalm.model.graph_inputs import encoder_inputs
from metalm.model.graphs import LayerGraphs, Run
from metalm.model.hidden_dropout import SITES_PER_LAYER, SpanDropout
from metalm.model.initialization import Draw, constant, normal, xavier_std
from metalm.model.positions import rotary_angles, rotation
from metalm.model.visibility import share_mask

EMBEDDING_STD = 0.02


class SharedRelativeBias(nn.Module):
    """The table of T5's relative-position bias, one for all layers of an encoder."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Embedding(num_buckets, num_heads)

    def forward(self) -> RelativeBias:
        """The bias, of a copy of the table: ZeRO 3 takes the table itself apart when this returns."""
        buckets = torch.arange(self.table.num_embeddings, device=self.table.weight.device)
        return RelativeBias(self.table(buckets).t(), self.max_distance)


class Encoder(nn.Module):
    """An encoder with its connector: packed elements in, vectors of the decoder's width out."""

    def __init__(self, config: EncoderConfig, vocab_size: int, decoder_hidden_size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.token_embedding = nn.Embedding(vocab_size, hidden)
        self.config = config
        if config.positions == "learned":
            self.text_positions = nn.Embedding(config.max_text_positions, hidden)
        self.modality = modality_of_encoder(config)
        for name, module in self.modality.embedding_modules(config).items():
            self.add_module(name, module)
        if config.relative_bias:
            buckets, distance = config.relative_bias.num_buckets, config.relative_bias.max_distance
            self.relative_bias = SharedRelativeBias(buckets, distance, config.num_heads)
        self.layers = nn.ModuleList(EncoderLayer(config, number) for number in range(config.num_layers))
        self.graphs: LayerGraphs | None = None
        """What runs the layers in training, where they can run so."""
        self.final_norm = EncoderNorm(config) if config.normalization == "pre_ln" else None
        if config.connector == "detection":
            self.detection_head = build_detection_head(hidden)
        else:
            self.connector = build_connector(config.connector, hidden, decoder_hidden_size)
        if config.adapter is not None:
            adapt_encoder(self.layers, config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(config, name))

    def forward(self, share: EncoderShare) -> Tensor:
        """Encode one share.

        Every sub-module runs whatever the share holds, or ZeRO's collectives would not match up.

        Args:
            share: packed spans of one rank.

        Returns:
            [L, decoder hidden size], or [L, 1] from a detection head; in the parameters' dtype.
        """
        hidden, dropout = self._embed(share), self._dropout(share)
        if dropout is not None:
            hidden = dropout.at(SITES_PER_LAYER * len(self.layers)).drop(hidden)
        mask = share_mask(share)
        where = self._where(share)

        def launch(layer: nn.Module, hidden: Tensor) -> Tensor:
            output: Tensor = layer(hidden, mask, where, share.routes, dropout)
            return output

        run: Run = launch
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            run = self.graphs.start(launch, hidden, encoder_inputs(mask, where, share.routes, dropout))
        for layer in self.layers:
            if self.config.recompute:
                hidden = checkpoint(run, layer, hidden, use_reentrant=False)
            else:
                hidden = run(layer, hidden)
        if self.final_norm is not None:
            hidden, _ = self.final_norm(hidden)
        return self.detection_head(hidden) if self.config.connector == "detection" else self.connector(hidden)

    def _dropout(self, share: EncoderShare) -> SpanDropout | None:
        if not self.training or not self.config.dropout:
            return None
        return SpanDropout(self.config.dropout, share.dropout_seeds, share.dropout_positions)

    def _where(self, share: EncoderShare) -> Where:
        config = self.config
        bias = None
        if config.relative_bias:
            bias, length = self.relative_bias(), share.token_ids.shape[0]
            bias.by_distance(length, length)  # outside of the layers, which may be computed again
        if config.positions == "learned":
            return Where(bias, None)
        angles = rotary_angles(share.positions, config.head_size, config.rope_base)
        return Where(bias, rotation(angles))

    def _embed(self, share: EncoderShare) -> Tensor:
        hidden = self.token_embedding(share.token_ids)
        if self.config.positions == "learned":
            last = self.text_positions.num_embeddings - 1
            hidden = hidden + self.text_positions(
                share.positions.clamp(max=last)
            )  # patches are replaced below
        return self.modality.embed(self, share, hidden)


class EncoderBank(nn.Module):
    """All encoders of a model: one module, because they share one ZeRO engine."""

    def __init__(self, config: ModelConfig) -> None:
        """Build them.

        Raises:
            ConfigError: a module of torch has something else under an encoder's name.
        """
        super().__init__()
        if taken := [name for name in config.encoders if hasattr(nn.ModuleDict(), name)]:
            raise ConfigError(
                f"model.encoders.{taken[0]}: torch's modules use that word; choose another name"
            )
        self.encoders = nn.ModuleDict(
            {name: _build_encoder(encoder, config) for name, encoder in config.encoders.items()}
        )

    def forward(self, shares: dict[str, EncoderShare]) -> dict[str, Tensor]:
        """Encode this rank's share with every encoder; see `Encoder.forward`."""
        return {name: encoder(shares[name]) for name, encoder in self.encoders.items()}


def is_trained(config: EncoderConfig, name: str) -> bool:
    """Whether a parameter, by its name within the encoder, is trained: see `EncoderConfig.trained_layers`."""
    part, *rest = name.split(".")
    if part == "connector":
        return config.trained_connector
    if config.trained_layers == "all" or is_adapter(name):
        return True
    if part == "layers":
        return int(rest[0]) >= config.num_frozen_layers
    return part == "final_norm" and config.num_frozen_layers < config.num_layers


def _build_encoder(encoder: EncoderConfig, config: ModelConfig) -> nn.Module:
    if encoder.pretrained is None:
        device = torch.get_default_device()
        with torch.device("meta"):  # torch would draw weights that `initialize_parameters` draws anew
            module = Encoder(encoder, config.padded_vocab_size, config.decoder.hidden_size)
        return module.to_empty(device=device)
    from metalm.model.pretrained import PretrainedEncoder  # needs transformers, which takes seconds

    return PretrainedEncoder(encoder, config.decoder.hidden_size)


PretrainedWeights = Mapping[str, Mapping[str, Tensor]]
"""By encoder and name in its model of transformers."""


def load_pretrained_weights(config: ModelConfig) -> PretrainedWeights:
    """The weights of all encoders from transformers, read from their folders.

    Raises:
        ConfigError: see `metalm.model.pretrained.load_weights`.
    """
    folders = {name: encoder for name, encoder in config.encoders.items() if encoder.pretrained}
    if not folders:
        return {}
    from metalm.model.pretrained import load_weights

    return {name: load_weights(encoder) for name, encoder in folders.items()}


def encoder_draw(config: ModelConfig, name: str, pretrained: PretrainedWeights | None = None) -> Draw:
    """How a parameter of the EncoderBank starts. Embedding scale and connector are *open* in the paper.

    Args:
        pretrained: from `load_pretrained_weights`; not needed for the other parameters.
    """
    if (draw := adapter_draw(name)) is not None:
        return draw
    _, encoder_name, *rest = name.split(".")
    encoder = config.encoders[encoder_name]
    if encoder.pretrained is not None and rest[0] == "model":
        assert pretrained is not None
        value = pretrained[encoder_name][".".join(rest[1:])]
        return lambda whole, generator: whole.copy_(value)
    leaf, kind = rest[-2], rest[-1]
    if kind == "bias":
        return constant(0.0)
    if leaf.endswith("norm"):
        return constant(1.0)
    if rest[0] in ("connector", "detection_head"):
        last = "0" if encoder.connector == "linear" else "4"
        is_scaled = config.decoder.scale_docked_vectors and rest[:2] == ["connector", last]
        divisor = config.decoder.hidden_size**0.5 if is_scaled else 1.0
        return lambda whole, generator: _xavier(whole, generator, divisor)
    if rest[0] != "layers":
        return normal(EMBEDDING_STD)
    if encoder.normalization == "pre_ln":
        depth = 2 * encoder.num_layers if leaf in ("attention_output", "ffn_out") else 1
        return normal(EMBEDDING_STD / depth**0.5)
    divisor = deepnorm_divisor(encoder.num_layers)
    if leaf == "qkv":
        return lambda whole, generator: _deepnorm_qkv(whole, generator, divisor, encoder)
    if leaf == "ffn_in":  # gate and value are maps of their own
        return lambda whole, generator: _xavier_each(whole, generator, divisor, encoder.feed_forward_size)
    return lambda whole, generator: _xavier(whole, generator, divisor)


def _xavier(whole: Tensor, generator: torch.Generator, divisor: float = 1.0) -> None:
    fan_out, fan_in = whole.shape
    whole.normal_(0.0, xavier_std(fan_in, fan_out) / divisor, generator=generator)


def _xavier_each(whole: Tensor, generator: torch.Generator, divisor: float, rows: int) -> None:
    for part in whole.split(rows):
        _xavier(part, generator, divisor)


def _deepnorm_qkv(whole: Tensor, generator: torch.Generator, divisor: float, config: EncoderConfig) -> None:
    key_value = config.key_value_heads * config.head_size
    parts = whole.split((config.hidden_size, key_value, key_value))
    for part, scale in zip(parts, (1.0, 1.0, divisor), strict=True):
        _xavier(part, generator, scale)
