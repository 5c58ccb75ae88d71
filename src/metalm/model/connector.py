"""What stands on an encoder: the way to the decoder's width, or a head."""

from __future__ import annotations

from torch import nn


def build_connector(kind: str, encoder_size: int, decoder_size: int) -> nn.Sequential:
    """`linear`, or `feed_forward` of three layers: see `EncoderConfig.connector`."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(encoder_size, decoder_size))
    return nn.Sequential(
        nn.Linear(encoder_size, decoder_size),
        nn.GELU(),
        nn.Linear(decoder_size, decoder_size),
        nn.GELU(),
        nn.Linear(decoder_size, decoder_size),
    )


def build_detection_head(encoder_size: int) -> nn.Sequential:
    """ELECTRA's: whether a token is a replacement, as one logit."""
    return nn.Sequential(nn.Linear(encoder_size, encoder_size), nn.GELU(), nn.Linear(encoder_size, 1))
