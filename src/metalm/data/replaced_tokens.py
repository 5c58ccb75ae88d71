"""Rows for replaced-token detection: which tokens are masked, and the documents as spans of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from metalm.batch import SemiCausalBatch
from metalm.data.rows import Row, RowSpans


def documents_as_spans(rows: Sequence[Row], encoder: str) -> list[Row]:
    """The rows with each of their documents as a span of the encoder."""
    found = []
    for row in rows:
        ends = np.array(row.document_ends, np.int64)
        bounds = np.stack([np.concatenate(([0], ends))[:-1], ends], axis=1)
        found.append(replace(row, spans={encoder: RowSpans(bounds, np.zeros(len(ends), np.int64))}))
    return found


def mask_tokens(
    batch: SemiCausalBatch, rows: Sequence[Row], fraction: float, special_ids: Sequence[int], pad_id: int
) -> SemiCausalBatch:
    """Mask some tokens of each row; the masked ones are trained, and each predicts itself.

    What is masked depends on the row alone, wherever and whenever it is trained on. The decoder sees the
    padding id at masked positions.

    Args:
        batch: of these rows with their documents as spans, between which the decoder is bidirectional.
        fraction: of a row's tokens, rounded, but at least one is masked.
        special_ids: tokens that are never masked.
    """
    tokens = np.full(tuple(batch.tokens.shape), pad_id, np.int64)
    positions, draws = [], []
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = row.tokens
        random = np.random.Generator(np.random.Philox(key=row.dropout_seed % 2**64))
        candidates = np.flatnonzero(~np.isin(row.tokens, special_ids))
        count = min(max(round(fraction * len(row.tokens)), 1), len(candidates))
        chosen = np.sort(random.choice(candidates, count, replace=False)) if count else candidates
        positions.append(b * batch.tokens.shape[1] + chosen)
        draws.append(random.random(count))
    masked = np.concatenate(positions)
    is_masked = np.zeros(tokens.shape, bool)
    is_masked.reshape(-1)[masked] = True
    return replace(
        batch,
        tokens=torch.from_numpy(np.where(is_masked, pad_id, tokens)),
        labels=torch.from_numpy(np.where(is_masked, tokens, pad_id)),
        loss_mask=torch.from_numpy(is_masked.astype(np.float32)),
        masked_positions=torch.from_numpy(masked),
        replacement_draws=torch.from_numpy(np.concatenate(draws)),
    )
