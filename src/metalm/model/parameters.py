"""How many parameters a model has, from its config alone: plans are made where no model can be built."""

from __future__ import annotations

from dataclasses import dataclass

from metalm.config import DecoderConfig, ModelConfig
from metalm.model.encoder_parameters import count_connector, count_encoder, count_frozen


@dataclass(frozen=True)
class ParameterCount:
    """Of one component."""

    total: int
    """Of the whole component."""
    per_rank: int
    """What one tensor-parallel rank holds of it, before ZeRO."""
    frozen: int = 0
    """Of those of one rank: not trained, so without gradients and optimizer."""

    @property
    def trained_per_rank(self) -> int:
        """What one tensor-parallel rank trains of it, before ZeRO."""
        return self.per_rank - self.frozen


def count_decoder(config: ModelConfig, tensor_size: int) -> ParameterCount:
    """The decoder: embedding (also the output layer) and layers."""
    decoder = config.decoder
    embedding = config.padded_vocab_size * decoder.hidden_size
    sharded, replicated = _layers(decoder)
    split = embedding + sharded
    return ParameterCount(split + replicated, split // tensor_size + replicated)


def count_encoders(config: ModelConfig) -> ParameterCount:
    """All encoders with their connectors; no tensor parallelism splits them."""
    encoders = config.encoders.values()
    total = sum(count_encoder(one, config) + count_connector(one, config) for one in encoders)
    return ParameterCount(total, total, sum(count_frozen(one, config) for one in encoders))


def _layers(config: DecoderConfig) -> tuple[int, int]:
    """Parameters of all layers that tensor parallelism would split, and those that it repeats."""
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    weights = 4 * hidden**2 + 2 * hidden * feed_forward
    split_biases = 3 * hidden + feed_forward
    repeated = 2 * hidden + 2 * 2 * hidden  # output biases; two norms
    final_norm = 2 * hidden if config.normalization == "pre_ln" else 0
    return config.num_layers * (weights + split_biases), config.num_layers * repeated + final_norm
