"""A micro-batch in one piece of memory, and the part of it that a rank needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.tiny import global_batch, micro_batches, tiny_config
from metalm.batch import SemiCausalBatch, in_one_piece, piece_of, views_in
from metalm.objectives.replaced_tokens import _with_tokens


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def batch_of(tensor: int) -> SemiCausalBatch:
    (batch,) = micro_batches(global_batch(0), tiny_config("unused", tensor=tensor, micro_batch_size=8), 0, 1)
    return batch


def test_one_piece_holds_the_same_and_can_be_copied_as_a_whole() -> None:
    batch = batch_of(2)
    assert piece_of(batch) is None
    moved = in_one_piece(batch, pinned=False)
    piece = piece_of(moved)
    assert piece is not None
    copied = views_in(moved, piece.clone())
    assert piece_of(copied).data_ptr() != piece.data_ptr()
    of_batch, of_copy = list(tensors(batch)), list(tensors(copied))
    assert len(of_batch) == len(of_copy) > 20
    for one, other in zip(of_batch, of_copy, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
        assert other.storage_offset() * other.itemsize % 128 == 0
    assert copied.encoders["text"].dock_bounds == batch.encoders["text"].dock_bounds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_part_is_its_share_and_all_tokens(rank: int) -> None:
    batch = batch_of(2)
    part = batch.of_rank(rank)
    for name, encoder in batch.encoders.items():
        mine, others = part.encoders[name].shares[rank], part.encoders[name].shares[1 - rank]
        assert mine is encoder.shares[rank]
        assert others.token_ids is encoder.shares[1 - rank].token_ids
        assert sum(tensor.numel() for tensor in tensors(others)) == others.token_ids.numel()
        new = torch.arange(batch.tokens.numel())  # as replaced-token detection puts tokens in
        expected = _with_tokens(encoder, new).shares[rank]
        assert torch.equal(_with_tokens(part.encoders[name], new).shares[rank].token_ids, expected.token_ids)


def test_alone_a_rank_needs_all() -> None:
    batch = batch_of(1)
    assert batch.of_rank(0) is batch
