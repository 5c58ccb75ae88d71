from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distributed.finetuned import changed_config
from distributed.tiny import LENGTH, tiny_config, to_row
from metalm.batch import SemiCausalBatch
from metalm.config import ModelConfig
from metalm.data.collate import collate
from metalm.model.decoder import Decoder
from metalm.model.encoder import EncoderBank
from metalm.model.flops import count_training_flops, work_of
from metalm.parallel.topology import Topology
from reference.rows import DOCUMENT, PAD, PARAGRAPH, START, Document, PlainRow, Span

FORWARD_AND_BACKWARD = 3


@pytest.mark.parametrize("options", ["paper", "llama", "parallel"])
def test_matrix_products_equal_torchs_own_count(topology: Topology, options: str) -> None:
    """Rows and encoder shares without padding; attention is known: pairs seen, two products, all layers."""
    config = tiny_config("unused", options=options).model
    text = Document([START, *range(4, LENGTH + 2), DOCUMENT], [Span("text", 3, 19)])
    pixels = np.zeros((4, 48), np.uint8)
    pair = Document([START, *[PARAGRAPH] * 4, 10, 11, 12, 13, DOCUMENT], [Span("image", 1, 5, pixels)])
    rows = [to_row(PlainRow([text], 0)), to_row(PlainRow([pair] * 4, 1))]
    batch = collate(rows, model_config=config, sequence_length=LENGTH, tp_size=1, pad_id=PAD)
    decoder, encoders = Decoder(config, LENGTH, topology), EncoderBank(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(batch, encoders({name: spans.shares[0] for name, spans in batch.encoders.items()}))
    found = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in found.items() if str(op) in ("aten.mm", "aten.addmm"))

    decoder_pairs = LENGTH * (LENGTH + 1) // 2 + 4 * (10 * 11 // 2)
    text_pairs, image_pairs = 16**2, 4 * 4**2
    hidden = {"decoder": 32, "text": 24, "image": 16}
    pairs = (
        config.decoder.attention_size * decoder_pairs
        + hidden["text"] * text_pairs
        + hidden["image"] * image_pairs
    )
    attention = 4 * 2 * pairs  # two layers each
    # The output layer computes the true vocabulary only; the count, like its weight, has the padding rows.
    padding_rows = 2 * 2 * LENGTH * hidden["decoder"] * (config.padded_vocab_size - config.vocab_size)
    counted = count_training_flops(batch, config) / FORWARD_AND_BACKWARD
    assert counted - attention == products + padding_rows


@pytest.mark.parametrize(
    "changes",
    [
        {"model.decoder.trained_layers": "none"},
        {
            "model.decoder.trained_layers": 1,
            "model.encoders.image.trained_layers": "none",
            "model.encoders.image.trained_connector": False,
        },
        {"model.decoder.adapter": {"rank": 3}},
        {
            "model.decoder.trained_layers": 1,
            "model.encoders.text.trained_layers": "none",
            "model.encoders.text.trained_connector": False,
            "model.encoders.image.trained_layers": "none",
            "model.encoders.image.trained_connector": False,
        },
    ],
)
def test_what_is_frozen_has_no_gradients_to_compute(topology: Topology, changes: dict[str, Any]) -> None:
    """Both passes, by torch's count; the output layer, in chunks of its own, is left out on both sides."""
    shape = {"tensor": 1, "micro_batch_size": 2, "options": "llama"}
    config, trained = (changed_config("", shape | {"changes": c}).model for c in (changes, {}))
    pixels = np.zeros((4, 48), np.uint8)
    text = Document([START, *range(4, LENGTH + 2), DOCUMENT], [Span("text", 3, 19)])
    pair = Document([START, *[PARAGRAPH] * 4, 10, 11, 12, 13, DOCUMENT], [Span("image", 1, 5, pixels)])
    rows = [to_row(PlainRow([text], 0)), to_row(PlainRow([pair] * 4, 1))]

    def products(model: ModelConfig) -> int:
        batch = collate(rows, model_config=model, sequence_length=LENGTH, tp_size=1, pad_id=PAD)
        decoder, encoders = Decoder(model, LENGTH, topology), EncoderBank(model)
        shares = {name: spans.shares[0] for name, spans in batch.encoders.items()}
        with FlopCounterMode(display=False) as counter:
            decoder._layers(decoder._input(batch, encoders(shares)), batch).sum().backward()
        found = counter.get_flop_counts()["Global"]
        return sum(count for op, count in found.items() if str(op) in ("aten.mm", "aten.addmm"))

    batch = collate(rows, model_config=config, sequence_length=LENGTH, tp_size=1, pad_id=PAD)
    counted = count_training_flops(batch, trained) - count_training_flops(batch, config)
    # Also counted: the output layer's gradient, attention's backward pass, and that of pixels.
    if config.decoder.trained_layers == "none":
        counted -= 2 * 2 * LENGTH * 32 * config.padded_vocab_size
    if config.encoders["image"].trained_layers == "none":
        counted -= 2 * 16 * 48 * 16
    counted -= _attention_without_backward(batch, config)
    assert products(trained) - products(config) == counted


def _attention_without_backward(batch: SemiCausalBatch, config: ModelConfig) -> float:
    work = work_of(batch)
    total = 0.0
    for name, encoder in config.encoders.items():
        total += 2 * 4 * encoder.hidden_size * work.encoders[name].pairs * encoder.num_frozen_layers
    if not any(encoder.is_trained for encoder in config.encoders.values()):
        total += 2 * 4 * 32 * work.pairs * config.decoder.num_frozen_layers
    return total
