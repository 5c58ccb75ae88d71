"""A number that tells whether two runs trained on the same rows, whatever ranks they were dealt to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metalm.batch import EncoderBatch, SemiCausalBatch


def fingerprint(batches: Sequence[SemiCausalBatch]) -> int:
    """Hash of the rows of micro-batches in host memory, and of the spans docked into them.

    Those of all data-parallel ranks add up to that of the global batch on any topology.
    """
    total = 0
    for batch in batches:
        fields = [batch.tokens, batch.labels, batch.loss_weights.view(torch.int32).long(), batch.positions]
        fields += [batch.attention_start, batch.attention_end, batch.source_ids[:, None]]
        for number, field in enumerate(fields):
            total += _sum_of_hashes(field, salt=number)
        for name, encoder in enumerate(batch.encoders.values()):
            total += _encoder_hash(encoder, salt=100 * (name + 1))
    return total


def _encoder_hash(encoder: EncoderBatch, salt: int) -> int:
    length = encoder.shares[0].token_ids.shape[0]
    total = 0
    for number, share in enumerate(encoder.shares):
        docked = torch.zeros(length, dtype=torch.bool)
        docked[encoder.dock_vectors[encoder.dock_vectors // length == number] % length] = True
        elements = torch.stack([share.token_ids, share.positions], dim=1)[docked]
        media = share.media.view(torch.int32) if share.media.is_floating_point() else share.media
        total += _sum_of_hashes(elements, salt) + _sum_of_hashes(media.flatten(1), salt + 1)
    return total


def _sum_of_hashes(rows: Tensor, salt: int) -> int:
    """[N, M] integers to the sum of the rows' 32-bit hashes."""
    places = torch.arange(rows.shape[1]) + 1000 * salt + 1
    weights = places * 0x1E3779B97F4A7C15 ^ (places << 21)
    mixed = ((rows.long() + 1) * weights).sum(dim=1)
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return int((mixed >> 32 & 0xFFFFFFFF).sum())
