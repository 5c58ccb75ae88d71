"""How many parameters a model has, from its config alone: plans are made where no model can be built."""

from __future__ import annotations

from dataclasses import dataclass

from metalm.config import DecoderConfig, EncoderConfig, ModelConfig


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
    total = sum(count_encoder(encoder, config) for encoder in config.encoders.values())
    return ParameterCount(total, total)


def count_encoder(encoder: EncoderConfig, config: ModelConfig) -> int:
    """One encoder with its connector."""
    hidden, decoder_hidden = encoder.hidden_size, config.decoder.hidden_size
    total = (config.padded_vocab_size + encoder.max_text_positions) * hidden + sum(_layers(encoder))
    if encoder.image is not None:
        total += (3 * encoder.image.patch_size**2 + 1 + encoder.image.num_patches) * hidden
    total += (hidden + 1) * decoder_hidden
    if encoder.connector == "feed_forward":
        total += 2 * (decoder_hidden + 1) * decoder_hidden
    return total


def _layers(config: DecoderConfig | EncoderConfig) -> tuple[int, int]:
    """Parameters of all layers that tensor parallelism would split, and those that it repeats."""
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    weights = 4 * hidden**2 + 2 * hidden * feed_forward
    split_biases = 3 * hidden + feed_forward
    repeated = 2 * hidden + 2 * 2 * hidden  # output biases; two norms
    final_norm = 2 * hidden if config.normalization == "pre_ln" else 0
    return config.num_layers * (weights + split_biases), config.num_layers * repeated + final_norm
