"""What a decoder begins with: a loss near the uniform guess's at every width."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metalm.config import DecoderConfig, EncoderConfig, ModelConfig
from metalm.model.decoder import decoder_draw
from metalm.model.encoder import encoder_draw
from metalm.model.first_loss import first_loss

VOCABULARY = 2048


def loss_of(width: int, topology: Any, **options: Any) -> float:
    decoder = DecoderConfig(num_layers=2, hidden_size=width, num_heads=width // 32, **options)
    config = ModelConfig(vocab_size=VOCABULARY, decoder=decoder)
    return first_loss(config, 2, 128, 1, topology)


@pytest.mark.parametrize(
    "options", [{}, {"positions": "rope", "norm": "rms_norm"}, {"normalization": "pre_ln"}]
)
def test_the_first_loss_is_that_of_logits_of_unit_variance_at_every_width(
    topology: Any, options: dict[str, Any]
) -> None:
    """E[-log softmax] of independent logits of variance 1: ln V + 1/2."""
    losses = [loss_of(width, topology, **options) for width in (64, 192, 512)]
    assert losses == pytest.approx([math.log(VOCABULARY) + 0.5] * 3, abs=0.15)


def test_plain_gains_predict_their_own_token_with_the_width(topology: Any) -> None:
    """The own token's logit is the cosine of input and output times the root of the width."""
    losses = [loss_of(width, topology, start="plain") for width in (192, 768)]
    assert losses[0] > math.log(VOCABULARY) + 3
    assert losses[1] / losses[0] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(
    ("options", "last", "is_mirrored"),
    [
        ({}, "layers.1.mlp_norm", True),
        ({"normalization": "pre_ln"}, "final_layernorm", True),
        ({"start": "plain"}, "layers.1.mlp_norm", False),
        ({"tied_output": False}, "layers.1.mlp_norm", False),
        ({"scale_embedding": False}, "layers.1.mlp_norm", False),
    ],
)
def test_only_the_last_norm_of_a_tied_and_scaled_output_is_mirrored(
    options: dict[str, Any], last: str, is_mirrored: bool
) -> None:
    config = DecoderConfig(num_layers=2, hidden_size=32, num_heads=4, **options)
    for name in ("layers.0.mlp_norm", "layers.1.attention_norm", last):
        drawn = torch.empty(32)
        decoder_draw(config, f"gpt.decoder.{name}.weight")(drawn, torch.Generator())
        wanted = [1.0, -1.0] * 16 if name == last and is_mirrored else [1.0] * 32
        assert drawn.tolist() == wanted, name


@pytest.mark.parametrize("connector", ["linear", "feed_forward"])
def test_scaled_docked_vectors_begin_as_large_as_others(connector: str) -> None:
    """The last map of the connector is drawn smaller by what its vectors are multiplied by."""
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}
    encoder = EncoderConfig(**sizes, max_text_positions=8, connector=connector)
    name = f"encoders.text.connector.{'0' if connector == 'linear' else '4'}.weight"
    drawn = []
    for is_scaled in (False, True):
        decoder = DecoderConfig(num_layers=1, hidden_size=64, num_heads=2, scale_docked_vectors=is_scaled)
        config = ModelConfig(vocab_size=90, decoder=decoder, encoders={"text": encoder})
        drawn.append(torch.empty(64, 16 if connector == "linear" else 64))
        encoder_draw(config, name)(drawn[-1], torch.Generator().manual_seed(1))
    assert drawn[1] * 8 == pytest.approx(drawn[0], rel=1e-5)
