"""What leads an encoder's vectors to the decoder's width."""

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
