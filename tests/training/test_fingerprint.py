"""The fingerprint of a step's rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distributed.tiny import global_batch, micro_batches, tiny_config
from metalm.training.fingerprint import fingerprint


def of_layout(step: int, tensor: int, data_size: int, micro_batch_size: int = 1) -> int:
    config = tiny_config("unused", tensor=tensor, micro_batch_size=micro_batch_size)
    rows = global_batch(step)
    return sum(fingerprint(micro_batches(rows, config, rank, data_size)) for rank in range(data_size))


def test_it_is_the_same_on_every_layout() -> None:
    layouts = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (4, 1, 4), (1, 8, 1), (3, 2, 4)]
    assert len({of_layout(3, *layout) for layout in layouts}) == 1
    assert of_layout(3, 1, 1) != of_layout(4, 1, 1)


@pytest.mark.parametrize(
    "field", ["tokens", "labels", "loss_weights", "positions", "attention_end", "source_ids"]
)
def test_any_change_of_a_row_shows(field: str) -> None:
    (batch,) = micro_batches(global_batch(0), tiny_config("unused", micro_batch_size=8), 0, 1)
    changed = getattr(batch, field).clone()
    changed.view(-1)[5] += 1
    assert fingerprint([replace(batch, **{field: changed})]) != fingerprint([batch])


def test_a_change_of_one_pixel_shows() -> None:
    (batch,) = micro_batches(global_batch(0), tiny_config("unused", micro_batch_size=8), 0, 1)
    before = fingerprint([batch])
    batch.encoders["image"].shares[0].media[3, 7] ^= 1
    assert fingerprint([batch]) != before


def test_swapped_tokens_show() -> None:
    (batch,) = micro_batches(global_batch(0), tiny_config("unused", micro_batch_size=8), 0, 1)
    tokens = batch.tokens.clone()
    tokens[0, :2] = tokens[0, :2].flip(0)
    assert not tokens.equal(batch.tokens)
    assert fingerprint([replace(batch, tokens=tokens)]) != fingerprint([batch])
