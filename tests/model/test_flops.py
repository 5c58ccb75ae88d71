from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distributed.tiny import LENGTH, tiny_config, to_row
from metalm.data.collate import collate
from metalm.model.decoder import Decoder
from metalm.model.encoder import EncoderBank
from metalm.model.flops import FORWARD_AND_BACKWARD, count_training_flops
from metalm.parallel.topology import Topology
from reference.rows import DOCUMENT, PAD, PARAGRAPH, START, Document, PlainRow, Span


@pytest.mark.parametrize("options", ["paper", "llama"])
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
    pairs = hidden["decoder"] * decoder_pairs + hidden["text"] * text_pairs + hidden["image"] * image_pairs
    attention = 4 * 2 * pairs  # two layers each
    # The output layer computes the true vocabulary only; the count, like its weight, has the padding rows.
    padding_rows = 2 * 2 * LENGTH * hidden["decoder"] * (config.padded_vocab_size - config.vocab_size)
    counted = count_training_flops(batch, config) / FORWARD_AND_BACKWARD
    assert counted - attention == products + padding_rows
