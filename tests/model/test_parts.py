from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distributed.encoder_variants import VARIANTS, variant_config
from distributed.finetuned import changed_config
from distributed.tiny import LENGTH, OPTIONS, tiny_config
from metalm.config import DecoderConfig, EncoderConfig, ImageConfig, ModelConfig, RelativeBiasConfig
from metalm.errors import ConfigError
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.deepnorm import deepnorm_alpha, deepnorm_divisor
from metalm.model.encoder import Encoder, EncoderBank, encoder_draw
from metalm.model.encoder_parameters import count_encoder
from metalm.model.initialization import initialize_parameters
from metalm.model.parameters import count_decoder, count_encoders
from metalm.model.positions import sinusoidal_positions
from metalm.parallel.topology import Topology


def test_deepnorm_constants_of_the_paper() -> None:
    assert deepnorm_alpha(24) == pytest.approx(2.6321, abs=5e-5)
    assert deepnorm_divisor(24) == pytest.approx(3.7224, abs=5e-5)


def test_sinusoidal_positions_equal_the_formula() -> None:
    found = sinusoidal_positions(torch.tensor([[0, 1], [7, 2047]]), 8)
    for row, positions in enumerate(((0, 1), (7, 2047))):
        for column, position in enumerate(positions):
            for i in range(0, 8, 2):
                angle = position / 10000 ** (i / 8)
                assert found[row, column, i].item() == pytest.approx(math.sin(angle), abs=2e-4)
                assert found[row, column, i + 1].item() == pytest.approx(math.cos(angle), abs=2e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_counts_equal_the_built_modules(topology: Topology, options: str) -> None:
    config = tiny_config("unused", options=options).model
    built = sum(p.numel() for p in Decoder(config, LENGTH, topology).parameters())
    assert count_decoder(config, 1).total == count_decoder(config, 1).per_rank == built
    assert count_encoders(config).total == sum(p.numel() for p in EncoderBank(config).parameters())


def test_counts_of_the_papers_language_setting() -> None:
    encoder = EncoderConfig(num_layers=24, hidden_size=1024, num_heads=16, max_text_positions=512)
    decoder = DecoderConfig(num_layers=24, hidden_size=2048, num_heads=32)
    config = ModelConfig(vocab_size=64_001, vocab_multiple=1, decoder=decoder, encoders={"text": encoder})
    assert count_decoder(config, 1).total == pytest.approx(1339.7e6, rel=1e-3)
    assert count_encoder(encoder, config) == pytest.approx(368.4e6, rel=1e-3)


def test_count_of_the_papers_vision_language_encoder() -> None:
    """Twelve layers of attention, norms and two feed-forwards, two of them with a third; embeddings."""
    hidden, wide = 768, 3072
    one = 2 * hidden * wide + hidden + wide
    layers = 12 * (4 * (hidden + 1) * hidden + 4 * hidden) + (2 * 12 + 2) * one + 2 * hidden
    embeddings = (50_257 + 512 + 14**2 + 3 * 16**2 + 1) * hidden
    encoder = EncoderConfig(
        num_layers=12,
        hidden_size=hidden,
        num_heads=12,
        normalization="pre_ln",
        max_text_positions=512,
        image=ImageConfig(image_size=224, patch_size=16),
        joint_layers=2,
    )
    decoder = DecoderConfig(num_layers=24, hidden_size=1024, num_heads=16)
    config = ModelConfig(vocab_size=50_257, vocab_multiple=1, decoder=decoder, encoders={"pair": encoder})
    with torch.device("meta"):
        built = Encoder(encoder, 50_257, 1024)
    assert layers + embeddings == pytest.approx(191e6, rel=1e-3)
    assert count_encoder(encoder, config) == layers + embeddings
    assert sum(p.numel() for n, p in built.named_parameters() if "connector" not in n) == layers + embeddings


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_of_encoders_equal_the_built_modules(variant: str) -> None:
    config = variant_config(variant, "unused").model
    assert count_encoders(config).total == sum(p.numel() for p in EncoderBank(config).parameters())


@pytest.mark.parametrize("options", ["llama", "paper"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model.decoder.trained_layers": "none", "model.encoders.text.trained_connector": False},
        {"model.decoder.trained_layers": 1, "model.encoders.image.adapter": {"rank": 3}},
        {"model.decoder.adapter": {"rank": 2, "targets": ["attention_output", "feed_forward_in"]}},
        {"model.decoder.adapter": {"kind": "ia3"}, "model.encoders.text.adapter": {"kind": "ia3"}},
    ],
)
def test_counts_of_what_is_trained_equal_the_built_modules(
    options: str, changes: dict[str, Any], topology: Topology
) -> None:
    shape = {"tensor": 1, "micro_batch_size": 1, "options": options, "changes": changes}
    config = changed_config("", shape).model
    for module, count in (
        (Decoder(config, LENGTH, topology), count_decoder(config, 1)),
        (EncoderBank(config), count_encoders(config)),
    ):
        parameters = list(module.parameters())
        assert count.total == sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert count.total_trained == count.trained_per_rank == trained


@pytest.mark.parametrize("trained_layers", ["all", "none", 1, 3])
def test_counts_of_frozen_parameters_equal_the_built_modules(trained_layers: str | int) -> None:
    encoder = EncoderConfig(
        num_layers=3,
        hidden_size=8,
        num_heads=2,
        normalization="pre_ln",
        max_text_positions=4,
        relative_bias=RelativeBiasConfig(),
        trained_layers=trained_layers,
    )
    decoder = DecoderConfig(num_layers=1, hidden_size=16, num_heads=2)
    config = ModelConfig(vocab_size=32, decoder=decoder, encoders={"text": encoder})
    parameters = list(EncoderBank(config).parameters())
    assert count_encoders(config).total == sum(p.numel() for p in parameters)
    assert count_encoders(config).frozen == sum(p.numel() for p in parameters if not p.requires_grad)


def test_count_of_the_papers_vision_language_decoder() -> None:
    decoder = DecoderConfig(num_layers=24, hidden_size=1024, num_heads=16)
    config = ModelConfig(vocab_size=50_257, vocab_multiple=1, decoder=decoder)
    assert count_decoder(config, 1).total == pytest.approx(353.8e6, rel=1e-3)


def test_deepnorm_divides_values_and_outputs_but_not_queries_and_keys(topology: Topology) -> None:
    config = ModelConfig(
        vocab_size=128, decoder=DecoderConfig(num_layers=1, hidden_size=256, num_heads=4, ffn_hidden_size=256)
    )
    decoder = Decoder(config, LENGTH, topology)
    initialize_parameters(decoder, "decoder", 1, lambda name: decoder_draw(config.decoder, name), 0, 1)
    weights = {name.rsplit(".", 2)[-2]: p for name, p in decoder.named_parameters() if p.dim() == 2}
    xavier, divisor = (2 / 512) ** 0.5, 8**0.25
    by_kind = weights["linear_qkv"].view(4, 3, 64, 256)
    for kind, scale in ((0, 1.0), (1, 1.0), (2, divisor)):
        assert by_kind[:, kind].std().item() == pytest.approx(xavier / scale, rel=0.03)
    for name in ("linear_proj", "linear_fc1", "linear_fc2"):
        assert weights[name].std().item() == pytest.approx(xavier / divisor, rel=0.03)


def test_initial_weights_of_an_encoder_do_not_depend_on_the_others() -> None:
    config = tiny_config("unused").model
    fewer = config.model_copy(update={"encoders": {"text": config.encoders["text"]}})
    banks = []
    for one in (config, fewer):
        bank = EncoderBank(one)
        initialize_parameters(bank, "encoders", 1, lambda name, one=one: encoder_draw(one, name), 0, 1)
        banks.append(dict(bank.named_parameters()))
    assert all(torch.equal(parameter, banks[0][name]) for name, parameter in banks[1].items())


def test_an_encoder_cannot_have_a_name_that_modules_use() -> None:
    config = tiny_config("unused").model
    renamed = config.model_copy(update={"encoders": {"items": config.encoders["text"]}})
    with pytest.raises(ConfigError, match=r"model\.encoders\.items: .*choose another name"):
        EncoderBank(renamed)
