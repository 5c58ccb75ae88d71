"""How many parameters an encoder has, from its config alone."""

from __future__ import annotations

import math

from metalm.config import EncoderConfig, ModelConfig
from metalm.modalities import modality_of_encoder
from metalm.model.adapter_parameters import count_encoder_adapter, encoder_adapter_layer


def count_encoder(encoder: EncoderConfig, config: ModelConfig) -> int:
    """One encoder with its adapter, without its connector."""
    if encoder.pretrained is not None:
        return sum(_count_pretrained(encoder))
    final_norm = _norm(encoder) if encoder.normalization == "pre_ln" else 0
    layers = sum(_encoder_layer(encoder, number) for number in range(encoder.num_layers))
    total = _encoder_embeddings(encoder, config) + layers + final_norm
    return total + count_encoder_adapter(encoder)


def count_connector(encoder: EncoderConfig, config: ModelConfig) -> int:
    """The connector of one encoder, or its detection head."""
    if encoder.connector == "detection":
        return encoder.hidden_size * (encoder.hidden_size + 1) + encoder.hidden_size + 1
    decoder_hidden = config.decoder.hidden_size
    total = (encoder.hidden_size + 1) * decoder_hidden
    if encoder.connector == "feed_forward":
        total += 2 * (decoder_hidden + 1) * decoder_hidden
    return total


def count_frozen_connector(encoder: EncoderConfig, config: ModelConfig) -> int:
    """The connector of one encoder, if it is not trained."""
    return 0 if encoder.trained_connector else count_connector(encoder, config)


def count_frozen(encoder: EncoderConfig, config: ModelConfig) -> int:
    """Parameters of one encoder that are not trained, without its connector."""
    if encoder.pretrained is not None:
        return _count_pretrained(encoder)[1]
    if encoder.trained_layers == "all":
        return 0
    if encoder.trained_layers == "none":
        return count_encoder(encoder, config) - count_encoder_adapter(encoder)
    layers = sum(_encoder_layer(encoder, number) for number in range(encoder.num_frozen_layers))
    return _encoder_embeddings(encoder, config) + layers


def encoder_layer_weights(encoder: EncoderConfig) -> int:
    """Weights of the matrix products that one element passes in one layer."""
    hidden = encoder.hidden_size
    return (
        hidden * (_qkv_rows(encoder) + hidden)
        + _feed_forward_maps(encoder) * hidden * encoder.feed_forward_size
    )


def encoder_adapter_weights(encoder: EncoderConfig) -> int:
    """Weights of the adapter that one element passes, in all layers."""
    if encoder.adapter is None:
        return 0
    if encoder.pretrained is not None:  # beside an adapter nothing else is trained
        return _count_pretrained(encoder)[0]
    return encoder.num_layers * encoder_adapter_layer(encoder)


def _count_pretrained(encoder: EncoderConfig) -> tuple[int, int]:
    """Trained and frozen parameters of an encoder of transformers, from its shapes on the meta device."""
    from metalm.model.pretrained import count_parameters  # needs transformers, which takes seconds

    return count_parameters(encoder.model_dump_json())


def _encoder_embeddings(encoder: EncoderConfig, config: ModelConfig) -> int:
    """Embeddings of tokens, patches and positions, and the table of the relative bias."""
    hidden = encoder.hidden_size
    text_positions = encoder.max_text_positions if encoder.positions == "learned" else 0
    total = (config.padded_vocab_size + text_positions) * hidden
    total += sum(
        math.prod(shape) for shape in modality_of_encoder(encoder).embedding_shapes(encoder).values()
    )
    if encoder.relative_bias is not None:
        total += encoder.relative_bias.num_buckets * encoder.num_heads
    return total


def _encoder_layer(encoder: EncoderConfig, number: int) -> int:
    hidden, wide, maps = encoder.hidden_size, encoder.feed_forward_size, _feed_forward_maps(encoder)
    attention = (_qkv_rows(encoder) + hidden) * hidden
    one = maps * hidden * wide
    if encoder.biases:
        attention += _qkv_rows(encoder) + hidden
        one += (maps - 1) * wide + hidden
    return attention + 2 * _norm(encoder) + len(encoder.feed_forwards(number)) * one


def _qkv_rows(encoder: EncoderConfig) -> int:
    return (encoder.num_heads + 2 * encoder.key_value_heads) * encoder.head_size


def _feed_forward_maps(encoder: EncoderConfig) -> int:
    return 3 if encoder.is_gated else 2


def _norm(encoder: EncoderConfig) -> int:
    return encoder.hidden_size * (2 if encoder.norm == "layer_norm" else 1)
