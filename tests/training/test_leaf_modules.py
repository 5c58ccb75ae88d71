"""Which layers ZeRO 3 gathers whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules

from distributed.tiny import tiny_config
from metalm.config import ModelConfig
from metalm.errors import ConfigError
from metalm.model.encoder import EncoderBank
from metalm.training.leaf_modules import mark_leaf_modules


def bank_of(**text: Any) -> EncoderBank:
    content = tiny_config("unused").model.model_dump()
    content["encoders"]["text"] |= text
    return EncoderBank(ModelConfig.model_validate(content))


def test_all_layers_are_gathered_whole() -> None:
    bank = bank_of()
    assert mark_leaf_modules(bank) == 4
    layers = [layer for encoder in bank.encoders.values() for layer in encoder.layers]
    assert get_z3_leaf_modules(bank) == layers


def test_not_so_the_lowest_trained_one_whose_input_has_no_gradient() -> None:
    bank = bank_of(num_layers=4, trained_layers=2)
    assert mark_leaf_modules(bank) == 5
    layers = bank.encoders["text"].layers
    assert [layer for layer in get_z3_leaf_modules(bank) if layer in layers] == [
        layers[0],
        layers[1],
        layers[3],
    ]


def test_a_layer_that_would_not_be_trained_is_refused() -> None:
    bank = bank_of()
    mark_leaf_modules(bank)
    hidden = torch.zeros(1, 24, requires_grad=True)
    with pytest.raises(ConfigError, match="EncoderLayer cannot be gathered whole"):
        bank.encoders["text"].layers[0](hidden=hidden)
