"""Encoders whose layers run from CUDA graphs train like encoders that are launched, to the bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed.tiny import tiny_config
from metalm.batch import EncoderShare, SemiCausalBatch
from metalm.config import RunConfig
from metalm.config.model_schema import ModelConfig
from metalm.data.collate import collate
from metalm.data.row import Row, RowSpans
from metalm.kernels import IntervalMask
from metalm.model.encoder import Encoder
from metalm.model.graph_rules import why_no_encoder_graphs
from metalm.model.graphs import LayerGraphs
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.topology import Topology
from metalm.share_lengths import padded_length
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep
from reference.rerun import Rerun
from reference.rows import loss_weights

LENGTH, PATCHES, PATCH_BYTES = 256, 4, 48
SHAPE = {"num_layers": 3, "hidden_size": 64, "num_heads": 2, "max_text_positions": 64, "dropout": 0.1}
TEXT = {**SHAPE, "relative_bias": {"num_buckets": 8, "max_distance": 16}, "trained_layers": 2}
PAIRS = {
    **SHAPE,
    "normalization": "pre_ln",
    "image": {"image_size": 8, "patch_size": 4},
    "joint_layers": 1,
    "connector": "feed_forward",
}


def model_config(encoder: dict[str, Any]) -> ModelConfig:
    # Dropout keeps the decoder to a backend that repeats itself to the bit.
    decoder = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "dropout": 0.1}
    return ModelConfig.model_validate({"vocab_size": 300, "decoder": decoder, "encoders": {"own": encoder}})


def row_of(seed: int, sizes: list[int], images: bool) -> Row:
    """A row with spans of these sizes, every other one with an image, or with one alone."""
    random = np.random.default_rng(seed)
    ends = np.cumsum([size + 3 for size in sizes])
    bounds = np.stack([ends - sizes, ends], axis=1) if sizes else np.zeros((0, 2), np.int64)
    count = np.array([PATCHES * (images and number % 2 == 0) for number in range(len(sizes))], np.int64)
    patches = random.integers(0, 256, (count.sum(), PATCH_BYTES)).astype(np.uint8) if images else None
    spans = {"own": RowSpans(bounds, count, patches)} if sizes else {}
    tokens = random.integers(5, 300, LENGTH).astype(np.int32)
    weights = loss_weights(LENGTH, [LENGTH], bounds.tolist())
    return Row(tokens, weights, [LENGTH], spans=spans, dropout_seed=seed)


def batch_of(model: ModelConfig, seed: int, sizes: list[int], *, images: bool) -> SemiCausalBatch:
    rows = [row_of(seed, sizes, images), row_of(seed + 100, [], images)]
    return collate(rows, model_config=model, sequence_length=LENGTH, tp_size=1, pad_id=3)


SIZES = [[9, 21, 30], [7, 21, 31], [], [9, 21, 30], [], [11, 20, 30], [4, 4, 16], [4, 4, 16], [9, 22, 29]]
"""Of spans, by micro-batch: three forms at least, one of padding alone."""


def gradients(encoder: Encoder, shares: list[EncoderShare]) -> list[Tensor]:
    """Outputs of all shares, and what they add to the gradients together."""
    outputs = []
    for number, share in enumerate(shares):
        output = encoder(share)
        generator = torch.Generator().manual_seed(number)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        outputs.append(output.detach().clone())
    found = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    for parameter in encoder.parameters():
        parameter.grad = None
    return [*outputs, *found]


@pytest.mark.parametrize(
    ("name", "changes", "backward_layers"),
    [("text", {}, 2), ("text", {"trained_layers": "none"}, 0), ("pairs", {}, 3)],
)
def test_recorded_layers_give_the_same(
    name: str, changes: dict[str, Any], backward_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A graph derives from the mask what its kernels need each time; work that is run again must do so, too.
    monkeypatch.setattr(IntervalMask, "derived", lambda self, name, build: build(self))
    images = name == "pairs"
    model = model_config((PAIRS if images else TEXT) | changes)
    torch.manual_seed(0)
    encoder = Encoder(model.encoders["own"], model.padded_vocab_size, model.decoder.hidden_size)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.1)
    shares = [
        batch_of(model, number, sizes, images=images).encoders["own"].shares[0]
        for number, sizes in enumerate(SIZES)
    ]
    launched, recorder = gradients(encoder, shares), Rerun()
    encoder.graphs = LayerGraphs(encoder.layers, recorder, what="shares", max_forms=12)
    for _ in range(2):
        torch.testing.assert_close(gradients(encoder, shares), launched, rtol=0, atol=0)
    assert encoder.graphs.num_forms >= 2
    assert recorder.recorded == encoder.graphs.num_forms * (3 + backward_layers)
    assert recorder.launched > recorder.recorded
    before = recorder.launched
    encoder.eval()
    encoder(shares[0])
    assert recorder.launched == before


def test_frozen_layers_leave_their_output_to_whoever_needs_it_later() -> None:
    model = model_config(TEXT | {"trained_layers": "none"})
    encoder = Encoder(model.encoders["own"], model.padded_vocab_size, model.decoder.hidden_size)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.1)
    share = batch_of(model, 1, SIZES[0], images=False).encoders["own"].shares[0]
    other = batch_of(model, 2, SIZES[0], images=False).encoders["own"].shares[0]
    expected = torch.autograd.grad(encoder(share).sum(), [encoder.connector[0].weight])
    encoder.graphs = LayerGraphs(encoder.layers, Rerun(), max_forms=12)
    for _ in range(2):
        encoder(other)
    first = encoder(share)
    encoder(other)
    found = torch.autograd.grad(first.sum(), [encoder.connector[0].weight])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_lengths_are_few_and_little_padding() -> None:
    lengths = [padded_length(length, 8, 16) for length in range(1, 4097)]
    assert all(found - length < 16 or found - length < length / 8 for length, found in enumerate(lengths, 1))
    assert {length % 16 for length in lengths} == {0}
    assert len({length for length in lengths if 1024 < length <= 2048}) == 8


def test_routes_are_padded_with_what_sees_nothing() -> None:
    model = model_config(PAIRS)
    (share,) = batch_of(model, 5, [5] * 27, images=True).encoders["own"].shares
    sees = share.attention_end > share.attention_start
    for routes in share.routes.values():
        every = torch.cat(list(routes.values()))
        assert torch.equal(every.sort().values, torch.arange(len(share.token_ids)))
    joint = share.routes["joint"]["joint"]
    assert sees[joint].sum() == 14 * 5
    assert len(joint) == padded_length(14 * 5, 16) == 72
    vision = share.routes["separate"]["vision"]
    assert torch.equal(vision[sees[vision]], share.patch_slots)
    assert len(vision) == padded_length(14 * PATCHES, 16)


@pytest.mark.parametrize(
    ("changes", "stage", "reason"),
    [
        ({}, 1, None),
        ({}, 3, "ZeRO 3"),
        ({"recompute": True}, 1, "recompute"),
        ({"trained_layers": "all"}, 1, "relative bias"),
    ],
)
def test_the_reason_is_named(changes: dict[str, Any], stage: int, reason: str | None, tmp_path: Path) -> None:
    config, encoder = tiny_config(str(tmp_path)), model_config(TEXT | changes).encoders["own"]

    found = why_no_encoder_graphs(config, encoder, "cuda", stage)
    assert (found is None) is (reason is None)
    assert (reason or "") in (found or "")
    assert why_no_encoder_graphs(config, encoder, "cpu", stage) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["text", "pairs"])
def test_on_a_gpu_steps_are_the_same(
    name: str, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    for variable, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(variable, value)
    images = name == "pairs"
    stages = {part: f"deepspeed_configs/{part}_zero1.json" for part in ("decoder", "encoders")}
    content = tiny_config(str(tmp_path), micro_batch_size=2, dropout=0.1, **stages).model_dump()
    model = model_config(PAIRS if images else TEXT)
    content["model"] = model.model_dump()
    readers = {"image": "own", "text": "own"} if images else {"text": "own"}
    content["data"] |= {"sources": {"own": {"path": "unused", "readers": readers}}, "sequence_length": LENGTH}
    content["training"] |= {"precision": "bf16", "global_batch_size": 4}
    results = []
    torch.use_deterministic_algorithms(False)
    for graphs in (False, False, True):
        content["training"]["cuda_graphs"] = graphs
        config = RunConfig.model_validate(content)
        engines = build_engines(config, topology)
        guard = StepGuard(config.guards, config.data.sources, topology.device)
        step = TrainStep(engines, topology, 1, guard, SemiCausal())
        with caplog.at_level(logging.INFO):
            losses = [
                step.run(
                    [batch_of(config.model, 10 * number + part, sizes, images=images) for part in range(2)],
                    1e-2,
                ).loss_sums
                for number, sizes in enumerate(SIZES)
            ]
        weights = [weight for part in engines.by_component().values() for weight in part.module.parameters()]
        results.append([torch.stack(losses), *(weight.detach().clone() for weight in weights)])
    encoder = engines.encoders.module.encoders["own"]
    assert encoder.graphs.num_forms >= 3, caplog.text
    assert not [record for record in caplog.records if "and so slower" in record.getMessage()], caplog.text
    launched, again, recorded = results
    torch.testing.assert_close(again, launched, rtol=0, atol=0)
    torch.testing.assert_close(recorded, launched, rtol=0, atol=0)
