"""An encoder without layers: patches enter the decoder through linear maps alone."""

from __future__ import annotations

import torch
from torch.nn import functional

from metalm.batch import EncoderShare
from metalm.config.model_schema import EncoderConfig, ImageConfig
from metalm.model.encoder import Encoder
from metalm.model.initialization import initialize_parameters, normal


def test_patches_do_not_meet_each_other() -> None:
    config = EncoderConfig(
        num_layers=0,
        hidden_size=16,
        num_heads=2,
        normalization="pre_ln",
        max_text_positions=4,
        image=ImageConfig(image_size=8, patch_size=4),
    )
    encoder = Encoder(config, vocab_size=32, decoder_hidden_size=24)
    initialize_parameters(encoder, "encoders", 1, lambda name: normal(1.0), 0, 1)  # norms start as they come
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 48), dtype=torch.uint8, generator=generator)
    share = EncoderShare(
        token_ids=torch.zeros(4, dtype=torch.long),
        positions=torch.arange(4),
        attention_start=torch.zeros(4, dtype=torch.int32),
        attention_end=torch.full((4,), 4, dtype=torch.int32),
        media=pixels,
        patch_slots=torch.arange(4),
        dropout_seeds=torch.zeros(4, dtype=torch.long),
        dropout_positions=torch.arange(4, dtype=torch.int32),
        routes={},
    )
    weights = dict(encoder.named_parameters())
    scaled = pixels.float() / 127.5 - 1.0
    patches = functional.linear(scaled, weights["patch_embedding.weight"], weights["patch_embedding.bias"])
    patches = patches + weights["image_positions.weight"]
    normed = functional.layer_norm(patches, (16,), weights["final_norm.weight"], weights["final_norm.bias"])
    expected = functional.linear(normed, weights["connector.0.weight"], weights["connector.0.bias"])
    torch.testing.assert_close(encoder(share), expected)
