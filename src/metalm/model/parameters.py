"""How many parameters a model has, from its config alone: plans are made where no model can be built."""

from __future__ import annotations

from dataclasses import dataclass

from metalm.config import DecoderConfig, ModelConfig
from metalm.model.adapter_parameters import count_decoder_adapter
from metalm.model.encoder_parameters import (
    count_connector,
    count_encoder,
    count_frozen,
    count_frozen_connector,
)


@dataclass(frozen=True)
class ParameterCount:
    """Of one component."""

    total: int
    """Of the whole component."""
    per_rank: int
    """What one tensor-parallel rank holds of it, before ZeRO."""
    frozen: int = 0
    """Of those of one rank: not trained, so without gradients and optimizer."""
    total_frozen: int = 0
    """Of those of the whole component."""

    @property
    def total_trained(self) -> int:
        """What is trained of the whole component."""
        return self.total - self.total_frozen

    @property
    def trained_per_rank(self) -> int:
        """What one tensor-parallel rank trains of it, before ZeRO."""
        return self.per_rank - self.frozen


def count_decoder(config: ModelConfig, tensor_size: int) -> ParameterCount:
    """The decoder: embedding, output layer where it is another, positions where they are learned, layers."""
    decoder = config.decoder
    split, repeated = _decoder_layers(decoder, decoder.num_layers)
    table = config.padded_vocab_size * decoder.hidden_size
    split += table * (1 if decoder.tied_output else 2)
    if decoder.positions == "learned":
        repeated += (decoder.max_positions or 0) * decoder.hidden_size
    frozen_split, frozen_repeated = 0, 0
    if decoder.trained_layers == "none":
        frozen_split, frozen_repeated = split, repeated
    elif decoder.trained_layers != "all":  # what stands behind the layers is trained with them
        trained_split, trained_repeated = _decoder_layers(decoder, decoder.trained_layers)
        frozen_split = split - trained_split - (0 if decoder.tied_output else table)
        frozen_repeated = repeated - trained_repeated
    adapter_split, adapter_repeated = count_decoder_adapter(decoder)
    split, repeated = split + adapter_split, repeated + adapter_repeated
    return ParameterCount(
        split + repeated,
        split // tensor_size + repeated,
        frozen_split // tensor_size + frozen_repeated,
        frozen_split + frozen_repeated,
    )


def count_encoders(config: ModelConfig) -> ParameterCount:
    """All encoders with their connectors; no tensor parallelism splits them."""
    encoders = config.encoders.values()
    total = sum(count_encoder(one, config) + count_connector(one, config) for one in encoders)
    frozen = sum(count_frozen(one, config) + count_frozen_connector(one, config) for one in encoders)
    return ParameterCount(total, total, frozen, frozen)


def decoder_layer_weights(config: DecoderConfig) -> int:
    """Weights of one layer's matrix products."""
    hidden, key_value = config.hidden_size, config.key_value_heads * config.head_size
    matrices = 3 if config.is_gated else 2
    return 2 * hidden * (config.attention_size + key_value) + matrices * hidden * config.feed_forward_size


def _decoder_layers(config: DecoderConfig, num_layers: int) -> tuple[int, int]:
    """Parameters of so many last layers that tensor parallelism splits, and those that it repeats."""
    hidden, norm = config.hidden_size, config.hidden_size * (2 if config.norm == "layer_norm" else 1)
    split, repeated = decoder_layer_weights(config), 2 * norm
    if config.has_qkv_biases:
        split += config.attention_size + 2 * config.key_value_heads * config.head_size
    if config.biases:
        split += config.feed_forward_size * (2 if config.is_gated else 1)
        repeated += 2 * hidden
    final_norm = norm if config.normalization == "pre_ln" else 0
    return num_layers * split, num_layers * repeated + final_norm
