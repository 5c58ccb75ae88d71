"""Steps of training data as digests of their rows, to compare them over ranks, workers and resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from metalm.batch import SemiCausalBatch
from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.loader import TrainingData
from metalm.objectives.semi_causal import SemiCausal

ROW_FIELDS = ("tokens", "labels", "loss_weights", "positions", "attention_start", "attention_end")


def with_data(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def data_of(config: RunConfig, **arguments: Any) -> TrainingData:
    return TrainingData(Corpus(config), SemiCausal(), **arguments)


@contextmanager
def opened(config: RunConfig, **arguments: Any) -> Iterator[TrainingData]:
    data = data_of(config, **{"dp_rank": 0, "dp_size": 1, "tp_size": 1, **arguments})
    try:
        yield data
    finally:
        data.close()


def row_digests(batches: list[SemiCausalBatch]) -> list[str]:
    """A digest of every field of every row; its docked elements are listed in the order of positions."""
    digests = []
    for batch in batches:
        length = batch.tokens.shape[1]
        for b in range(len(batch.tokens)):
            digest = hashlib.sha256()
            for name in ROW_FIELDS:
                digest.update(getattr(batch, name)[b].numpy().tobytes())
            for name, encoder in batch.encoders.items():
                digest.update(name.encode())
                share_length = len(encoder.shares[0].token_ids)
                order = np.argsort(encoder.dock_positions.numpy())
                for n in order:
                    position = int(encoder.dock_positions[n])
                    if position // length != b:
                        continue
                    share_number, element = divmod(int(encoder.dock_vectors[n]), share_length)
                    share = encoder.shares[share_number]
                    digest.update(f"{position % length} {share.token_ids[element]}".encode())
                    digest.update(f"{share.positions[element]}".encode())
                    for slot in np.flatnonzero(share.patch_slots.numpy() == element):
                        digest.update(share.media[slot].numpy().tobytes())
            digests.append(digest.hexdigest())
    return digests


def global_rows(
    config: RunConfig, steps: int, *, dp_size: int, tp_size: int = 1, states: dict[int, Any] | None = None
) -> tuple[list[list[str]], dict[int, Any]]:
    """Per step the sorted digests of the global batch's rows, and the states of all lanes at the end."""
    rows: list[list[str]] = [[] for _ in range(steps)]
    end_states: dict[int, Any] = {}
    for dp_rank in range(dp_size):
        with opened(config, dp_rank=dp_rank, dp_size=dp_size, tp_size=tp_size, lane_states=states) as data:
            for step in range(steps):
                rows[step] += row_digests(next(data))
            end_states |= data.lane_states()
    return [sorted(step) for step in rows], json.loads(json.dumps(end_states), object_hook=_integer_keys)


def _integer_keys(value: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: item for key, item in value.items()}
