"""Micro-batches on their way to the device."""

from __future__ import annotations

import pytest
import torch

from metalm.training.upload import Uploads
from test_batch import batch_of, tensors


def test_on_the_cpu_a_batch_is_used_as_it_is() -> None:
    batch, uploads = batch_of(1), Uploads(torch.device("cpu"), 0)
    uploads.begin(batch)
    with uploads.use(batch) as used:
        assert used is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_piece_is_written_to_again_when_it_was_read() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batches = [batch_of(2) for _ in range(6)]
    for number, batch in enumerate(batches):
        batch.tokens.fill_(number)
    uploads, found = Uploads(device, 1), []
    busy = torch.randn(4096, 4096, device=device)
    for number, batch in enumerate(batches):
        with uploads.use(batch) as uploaded:
            if number + 1 < len(batches):
                uploads.begin(batches[number + 1])
            for _ in range(10):  # the device is still at this when later copies are asked for
                busy @ busy
            found.append(uploaded.tokens.clone())
    assert [values.unique().tolist() for values in found] == [[number] for number in range(len(batches))]
    with uploads.use(batches[0]) as uploaded:
        for one, other in zip(tensors(uploaded), tensors(batches[0].of_rank(1)), strict=True):
            assert one.is_cuda and torch.equal(one.cpu(), other)
