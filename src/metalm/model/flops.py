"""Floating-point operations of training, counted from what a batch holds, not from its padding.

A matrix product costs 2 operations per weight and position forward and 4 backward. Attention costs, per
layer, 4 operations per visible pair and dimension of its heads forward (scores and weighted values) and twice
that backward.
Frozen weights have no gradient, which saves half of the backward pass of their products; where nothing below
is trained, either, it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from metalm.config import DecoderConfig, EncoderConfig, ModelConfig
from metalm.modalities import modality_of_encoder
from metalm.model.adapter_parameters import count_decoder_adapter
from metalm.model.encoder_parameters import encoder_adapter_weights, encoder_layer_weights
from metalm.model.parameters import decoder_layer_weights

if TYPE_CHECKING:
    from metalm.batch import SemiCausalBatch


@dataclass(frozen=True)
class EncoderWork:
    """What one encoder has to do."""

    elements: float
    pairs: float
    """Of an element and an element that it sees."""
    patches: float


@dataclass(frozen=True)
class Work:
    """What a batch, or the mean batch of a plan, has the model do."""

    positions: float
    """Of the decoder, without padding."""
    pairs: float
    encoders: dict[str, EncoderWork]


def count_training_flops(batch: SemiCausalBatch, config: ModelConfig) -> float:
    """Operations of one forward and backward pass over a micro-batch held in host memory.

    The encoder shares of all TP ranks are counted, and the decoder as a whole: divide by the ranks that
    work on the batch for the rate of one.
    """
    return training_flops(work_of(batch), config)


def work_of(batch: SemiCausalBatch) -> Work:
    """The work in a micro-batch held in host memory."""
    return Work(
        positions=int((batch.attention_end > batch.attention_start).sum()),
        pairs=int((batch.attention_end - batch.attention_start).sum()),
        encoders={
            name: EncoderWork(
                elements=sum(int((s.attention_end > s.attention_start).sum()) for s in spans.shares),
                pairs=sum(int((s.attention_end - s.attention_start).sum()) for s in spans.shares),
                patches=sum(share.patch_slots.shape[0] for share in spans.shares),
            )
            for name, spans in batch.encoders.items()
        },
    )


def training_flops(work: Work, config: ModelConfig) -> float:
    """Operations of one forward and backward pass, of the decoder and all encoders."""
    total = decoder_flops(work, config) + decoder_backward_flops(work, config)
    for name, part in work.encoders.items():
        total += encoder_flops(part, name, config) + encoder_backward_flops(part, name, config)
    return total


def decoder_flops(work: Work, config: ModelConfig) -> float:
    """Operations of the decoder's forward pass, with the output layer."""
    parts = _decoder_parts(work, config)
    return parts.output + config.decoder.num_layers * (parts.products + parts.attention) + parts.adapter


def decoder_backward_flops(work: Work, config: ModelConfig) -> float:
    """Operations of the decoder's backward pass."""
    decoder, parts = config.decoder, _decoder_parts(work, config)
    frozen = decoder.num_frozen_layers
    total = (decoder.num_layers - frozen) * (2 * parts.products + 2 * parts.attention) + 2 * parts.adapter
    if decoder.adapter is not None or any(one.is_trained for one in config.encoders.values()):
        total += frozen * (parts.products + 2 * parts.attention)
    return total + parts.output * (2 if trains_output(decoder) else 1)


def trains_output(config: DecoderConfig) -> bool:
    """Whether the output layer's weight is trained."""
    return config.trained_layers == "all" or (config.trained_layers != "none" and not config.tied_output)


@dataclass(frozen=True)
class _DecoderParts:
    """Operations of the forward pass."""

    products: float
    """Of a layer's weights."""
    attention: float
    """Of a layer."""
    output: float
    adapter: float
    """Of all layers."""


def _decoder_parts(work: Work, config: ModelConfig) -> _DecoderParts:
    decoder = config.decoder
    return _DecoderParts(
        products=work.positions * 2 * decoder_layer_weights(decoder),
        attention=4 * decoder.attention_size * work.pairs,
        output=work.positions * 2 * decoder.hidden_size * config.padded_vocab_size,
        adapter=work.positions * 2 * sum(count_decoder_adapter(decoder)),
    )


def encoder_flops(work: EncoderWork, name: str, config: ModelConfig) -> float:
    """Operations of one encoder's forward pass, with its connector."""
    encoder = config.encoders[name]
    linear = 2 * encoder.num_layers * encoder_layer_weights(encoder)
    linear += 2 * encoder_adapter_weights(encoder)
    total = work.elements * (linear + _connector_flops(encoder, config.decoder.hidden_size))
    total += 4 * encoder.num_layers * encoder.hidden_size * work.pairs
    return float(total + _patch_flops(work, encoder))


def encoder_backward_flops(work: EncoderWork, name: str, config: ModelConfig) -> float:
    """Operations of one encoder's backward pass."""
    encoder = config.encoders[name]
    if not encoder.is_trained:
        return 0.0
    total = 2 * (encoder_flops(work, name, config) - frozen_flops(work, name, config))
    if encoder.adapter is not None:  # the layers' own weights have no gradients
        total -= work.elements * 2 * encoder.num_layers * encoder_layer_weights(encoder)
    if not encoder.trained_connector:
        total -= work.elements * _connector_flops(encoder, config.decoder.hidden_size)
    return total


def frozen_flops(work: EncoderWork, name: str, config: ModelConfig) -> float:
    """Those of an encoder's forward pass that have no backward pass."""
    encoder = config.encoders[name]
    if encoder.trained_layers == "all":
        return 0.0
    below = _patch_flops(work, encoder)
    if encoder.adapter is not None:
        return float(below)
    layer = work.elements * 2 * encoder_layer_weights(encoder) + 4 * encoder.hidden_size * work.pairs
    return float(encoder.num_frozen_layers * layer + below)


def _patch_flops(work: EncoderWork, encoder: EncoderConfig) -> float:
    return work.patches * 2 * modality_of_encoder(encoder).weights_per_vector(encoder)


def _connector_flops(config: EncoderConfig, decoder_size: int) -> int:
    if config.connector == "detection":
        return 2 * config.hidden_size * (config.hidden_size + 1)
    weights = config.hidden_size * decoder_size
    if config.connector == "feed_forward":
        weights += 2 * decoder_size**2
    return 2 * weights
