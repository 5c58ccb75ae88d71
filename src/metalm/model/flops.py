"""Floating-point operations of training on a batch: counted from what the batch holds, not its padding.

A matrix product costs 2 operations per weight and position forward and 4 backward. Attention costs, per
layer, 4 * hidden operations per visible pair forward (scores and weighted values) and twice that backward.
"""

from __future__ import annotations

from metalm.batch import SemiCausalBatch
from metalm.config import DecoderConfig, EncoderConfig, ModelConfig
from metalm.model.parameters import layer_weights

FORWARD_AND_BACKWARD = 3


def count_training_flops(batch: SemiCausalBatch, config: ModelConfig) -> float:
    """Operations of one forward and backward pass over a micro-batch held in host memory.

    The encoder shares of all TP ranks are counted, and the decoder as a whole: divide by the ranks that
    work on the batch for the rate of one.
    """
    decoder, hidden = config.decoder, config.decoder.hidden_size
    positions = int((batch.attention_end > batch.attention_start).sum())
    pairs = int((batch.attention_end - batch.attention_start).sum())
    forward = positions * (_layer_flops(decoder) + 2 * hidden * config.padded_vocab_size)
    forward += 4 * decoder.num_layers * hidden * pairs
    for name, spans in batch.encoders.items():
        encoder = config.encoders[name]
        elements = sum(int((s.attention_end > s.attention_start).sum()) for s in spans.shares)
        pairs = sum(int((s.attention_end - s.attention_start).sum()) for s in spans.shares)
        forward += elements * (_layer_flops(encoder) + _connector_flops(encoder, hidden))
        forward += 4 * encoder.num_layers * encoder.hidden_size * pairs
        if encoder.image is not None:
            patches = sum(share.patches.shape[0] for share in spans.shares)
            forward += patches * 2 * 3 * encoder.image.patch_size**2 * encoder.hidden_size
    return float(FORWARD_AND_BACKWARD * forward)


def _layer_flops(config: DecoderConfig | EncoderConfig) -> int:
    """Matrix products of all layers for one position, forward."""
    return 2 * config.num_layers * layer_weights(config)


def _connector_flops(config: EncoderConfig, decoder_size: int) -> int:
    weights = config.hidden_size * decoder_size
    if config.connector == "feed_forward":
        weights += 2 * decoder_size**2
    return 2 * weights
