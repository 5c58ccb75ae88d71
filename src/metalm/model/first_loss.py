"""The loss that a decoder begins with: the uniform guess's, or one that its start has to unlearn first."""

from __future__ import annotations

import torch

from metalm.batch import SemiCausalBatch
from metalm.config import ModelConfig
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.parallel.topology import Topology


def first_loss(config: ModelConfig, num_rows: int, length: int, seed: int, topology: Topology) -> float:
    """Nats per token of a new decoder, on tokens that are as frequent as words (Zipf) and in no order.

    Args:
        config: of a model without encoders.
        num_rows: rows of the batch.
        length: tokens of a row.
        seed: of weights and tokens.
        topology: a rank alone.
    """
    decoder = Decoder(config, length, topology)
    initialize_parameters(decoder, "decoder", seed, lambda name: decoder_draw(config.decoder, name), 0, 1)
    frequencies = 1.0 / (torch.arange(config.vocab_size) + 2.7)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(
        frequencies, num_rows * (length + 1), replacement=True, generator=generator
    ).view(num_rows, -1)
    index = torch.arange(length).repeat(num_rows, 1)
    batch = SemiCausalBatch(
        tokens=drawn[:, :-1].contiguous(),
        labels=drawn[:, 1:].contiguous(),
        loss_weights=torch.ones(num_rows, length),
        positions=index,
        attention_start=torch.zeros(num_rows, length, dtype=torch.int32),
        attention_end=index.to(torch.int32) + 1,
        source_ids=torch.zeros(num_rows, dtype=torch.int64),
        dropout_seeds=torch.zeros(num_rows, dtype=torch.int64),
        encoders={},
    )
    with torch.no_grad():
        return float(decoder.to(topology.device)(batch.to(topology.device), {}).mean())
