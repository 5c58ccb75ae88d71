"""Layers that run from CUDA graphs train like layers that are launched, to the bit, or say why they do not.

On the CPU a recorder runs the recorded work again, between the same tensors, as a graph would.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed.tiny import global_batch, micro_batches, tiny_config
from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.data.collate import collate
from metalm.data.row import Row
from metalm.kernels import IntervalMask, backend_counts, reset_backend_counts
from metalm.model.cuda_recorder import CudaRecorder, Launch, Work
from metalm.model.decoder_layer import Visibility
from metalm.model.graph_inputs import decoder_inputs
from metalm.model.graph_rules import why_not_graphs
from metalm.model.graphs import LayerGraphs
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines, build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep
from reference.rerun import Rerun
from reference.rows import loss_weights

WIDTH = 16


class Layer(nn.Module):
    """A layer of which attention's backend and failures are made up."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)
        self.waits = False

    def forward(
        self, hidden: Tensor, attention_mask: Visibility, rotary_pos_emb: None
    ) -> tuple[Tensor, None]:
        if self.waits:
            hidden.sum().item()
        seen = (attention_mask.mask.end - attention_mask.mask.start)[0, :, None, None]
        return hidden + self.map(hidden).tanh() * seen, None


def stack_of(num_layers: int, device: torch.device) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(num_layers)).to(device)


def inputs_of(step: int, device: torch.device, length: int = 8) -> tuple[Tensor, Visibility, None]:
    """Hidden vectors [8, 1, 16] and causal documents, of one length where `length` is 8 or 4."""
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(8, 1, WIDTH, generator=generator).to(device).requires_grad_()
    start = torch.arange(8, dtype=torch.int32)[None] // length * length
    return hidden, Visibility(IntervalMask.packed_documents(start).to(device), None, None), None


def run(graphs: LayerGraphs, layers: nn.ModuleList, hidden: Tensor, *seen: Any) -> Tensor:
    """A forward as the decoder runs it."""
    run_layer = graphs.start(lambda layer, hidden: layer(hidden, *seen)[0], hidden, decoder_inputs(*seen))
    for layer in layers:
        hidden = run_layer(layer, hidden)
    return hidden


def train_step(engines: Engines, config: RunConfig, topology: Topology) -> TrainStep:
    guard = StepGuard(config.guards, config.data.sources, topology.device)
    return TrainStep(engines, topology, len(config.data.sources), guard, SemiCausal())


def train(engines: Engines, config: RunConfig, topology: Topology, steps: list[list[SemiCausalBatch]]) -> Any:
    """Sums of losses, and at the end the weights."""
    step = train_step(engines, config, topology)
    losses = [step.run(batches, 1e-2).loss_sums for batches in steps]
    return torch.stack(losses), list(engines.decoder.module.parameters())


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the test on a GPU does it")
@pytest.mark.parametrize(("options", "stage"), [("paper", 1), ("qkv_biases", 2)])
def test_steps_from_recorded_layers_are_the_same(
    options: str,
    stage: int,
    topology: Topology,
    tmp_path: Path,
    one_rank: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A graph derives from the mask what its kernels need each time; work that is run again must do so, too.
    monkeypatch.setattr(IntervalMask, "derived", lambda self, name, build: build(self))
    stages = {name: f"deepspeed_configs/{name}_zero{stage}.json" for name in ("decoder", "encoders")}
    config = tiny_config(str(tmp_path), micro_batch_size=4, options=options, dropout=0.1, **stages)
    steps = [micro_batches(global_batch(step), config, 0, 1) for step in range(4)]
    launched = train(build_engines(config, topology), config, topology, steps)
    engines, recorder = build_engines(config, topology), Rerun()
    decoder = engines.decoder.module
    decoder.graphs = LayerGraphs(decoder.gpt.decoder.layers, recorder)
    reset_backend_counts()
    recorded = train(engines, config, topology, steps)
    num_layers = config.model.decoder.num_layers
    assert recorder.recorded == 2 * num_layers
    assert recorder.launched == 7 * 2 * num_layers  # all micro-batches but the first
    torch.testing.assert_close(recorded, launched, rtol=0, atol=0)


def test_what_is_not_training_runs_without_graphs_and_frozen_layers_have_no_backward() -> None:
    device, recorder = torch.device("cpu"), Rerun()
    layers = stack_of(3, device)
    layers[0].requires_grad_(False)
    graphs = LayerGraphs(layers, recorder)
    for step in range(3):
        hidden, *seen = inputs_of(step, device)
        output = run(graphs, layers, hidden.detach(), *seen)
        output.sum().backward()
    assert recorder.recorded == 3 + 2
    assert recorder.launched == 2 * (3 + 2)
    assert layers[0].map.weight.grad is None
    expected, hidden = stack_of(3, device), None
    for step in range(3):
        hidden, *seen = inputs_of(step, device)
        hidden = hidden.detach()
        for layer in expected:
            hidden = layer(hidden, *seen)[0]
        hidden.sum().backward()
    torch.testing.assert_close(layers[1].map.weight.grad, expected[1].map.weight.grad, rtol=0, atol=0)


def test_a_second_forward_before_the_backward_leaves_the_first_alone() -> None:
    device, recorder = torch.device("cpu"), Rerun()
    layers = stack_of(2, device)
    graphs = LayerGraphs(layers, recorder)
    for step in range(2):
        run(graphs, layers, *inputs_of(step, device)).sum().backward()
    (hidden, *seen), (other, *also) = inputs_of(2, device), inputs_of(3, device)
    first = run(graphs, layers, hidden, *seen)
    kept, launched = first.clone(), recorder.launched
    second = run(graphs, layers, other, *also)
    assert recorder.launched == launched
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    (first.sum() + second.sum()).backward()
    del first, second
    run(graphs, layers, *inputs_of(4, device))
    assert recorder.launched == launched + 4  # and one that is never followed by its backward blocks nothing
    run(graphs, layers, *inputs_of(5, device))
    assert recorder.launched == launched + 6


def test_forms_are_recorded_apart_and_anew_where_weights_have_moved() -> None:
    device, recorder = torch.device("cpu"), Rerun()
    layers = stack_of(2, device)
    graphs = LayerGraphs(layers, recorder)

    def newly_recorded(length: int) -> int:
        recorded = recorder.recorded
        run(graphs, layers, *inputs_of(0, device, length)).sum().backward()
        return recorder.recorded - recorded

    assert [newly_recorded(length) for length in (8, 3, 8, 3, 8, 5, 4, 4, 3)] == [0, 0, 4, 4, 0, 0, 0, 0, 0]
    for parameter in layers.parameters():
        parameter.data = parameter.data.clone()
    assert [newly_recorded(length) for length in (8, 8, 8)] == [0, 4, 0]


def test_work_that_cannot_be_recorded_runs_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Rerun):
        def record(self, work: Work) -> tuple[Sequence[Tensor | None], Launch]:
            raise RuntimeError("operation not permitted\nand much more")

    device = torch.device("cpu")
    layers = stack_of(2, device)
    graphs = LayerGraphs(layers, Refusing())
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            run(graphs, layers, *inputs_of(step, device)).sum().backward()
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("run without CUDA graphs, and so slower: operation not permitted")


@pytest.mark.parametrize(
    ("changes", "stage", "reason"),
    [
        ({}, 1, None),
        ({}, 3, "ZeRO 3"),
        ({"model": {"decoder": {"recompute": True}}}, 1, "recompute"),
        ({"model": {"decoder": {"recompute": "selective"}}}, 1, "recompute"),
        ({"training": {"cuda_graphs": False}}, 1, "training.cuda_graphs is false"),
        ({"parallel": {"tensor": 2}}, 1, "tensor-parallel"),
    ],
)
def test_the_reason_is_named(changes: dict[str, Any], stage: int, reason: str | None, tmp_path: Path) -> None:
    content = tiny_config(str(tmp_path)).model_dump()
    for section, values in changes.items():
        for name, value in values.items():
            content[section][name] = content[section][name] | value if isinstance(value, dict) else value
    config = RunConfig.model_validate(content)

    found = why_not_graphs(config, "cuda", stage)
    assert (found is None) is (reason is None)
    assert (reason or "") in (found or "")
    assert why_not_graphs(config, "cpu", stage) is not None


def packed(config: RunConfig, step: int, lengths: list[int]) -> list[SemiCausalBatch]:
    """Two micro-batches of two rows of documents of these lengths, the second with a span seen whole."""
    generator, size = np.random.default_rng(step), sum(lengths)
    ends = np.cumsum(lengths).tolist()
    batches = []
    for _ in range(2):
        rows = [
            Row(
                generator.integers(4, config.model.vocab_size, size).astype(np.int32),
                loss_weights(size, ends, []),
                ends,
                dropout_seed=int(generator.integers(2**40)),
            )
            for _ in range(2)
        ]
        batches.append(collate(rows, model_config=config.model, sequence_length=size, tp_size=1, pad_id=3))
    if len(set(lengths)) > 1:
        seen = batches[1].attention_end.clone()
        seen[:, 4:12] = 12
        batches[1] = replace(batches[1], attention_end=seen, segment_bounds=torch.empty(0, dtype=torch.int32))
    return batches


def gpu_config(folder: Path, **training: Any) -> RunConfig:
    content = tiny_config(
        str(folder), micro_batch_size=2, dropout=0.1, decoder="deepspeed_configs/decoder_zero1.json"
    ).model_dump()
    content["model"]["encoders"] = {}
    content["model"]["decoder"] |= {"hidden_size": 128, "num_heads": 2, "num_layers": 3}
    content["data"] |= {"sources": {"text": {"path": "unused"}}, "sequence_length": 256}
    content["training"] |= {"precision": "bf16", "global_batch_size": 4, **training}
    return RunConfig.model_validate(content)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_steps_are_the_same_beside_evaluations_and_other_masks(
    topology: Topology, tmp_path: Path, one_rank: None, caplog: pytest.LogCaptureFixture
) -> None:
    ragged, uniform = [100, 31, 125], [128, 128]
    results = []
    torch.use_deterministic_algorithms(False)
    for graphs in (False, False, True):
        config = gpu_config(tmp_path, cuda_graphs=graphs)
        engines = build_engines(config, topology)
        decoder, step = engines.decoder.module, train_step(engines, config, topology)
        held_out = packed(config, 99, [20, 21, 12])[0].to(topology.device)
        losses: list[Tensor] = []
        reset_backend_counts()
        for number, lengths in enumerate((ragged, ragged, uniform, ragged, uniform, ragged)):
            with caplog.at_level(logging.INFO):
                losses += step.run(packed(config, number, lengths), 1e-2).loss_sums
            engines.decoder.eval()
            with torch.no_grad():
                losses.append(engines.decoder(held_out, {}).sum().double())
            engines.decoder.train()
        # Dropout keeps training to one backend, whatever evaluation runs on.
        assert backend_counts()["triton"] >= 6 * 2 * config.model.decoder.num_layers
        results.append([torch.stack(losses), *(weight.detach().clone() for weight in decoder.parameters())])
    lines = [record for record in caplog.records if "from CUDA graphs" in record.getMessage()]
    assert [record.levelname for record in lines] == ["INFO", "INFO"], caplog.text
    assert decoder.graphs.num_forms == 2
    launched, again, recorded = results
    torch.testing.assert_close(again, launched, rtol=0, atol=0)
    torch.testing.assert_close(recorded, launched, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_recording_that_fails_leaves_everything_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = torch.device("cuda", 0)
    recorder, layers = CudaRecorder(device), stack_of(3, device)
    graphs = LayerGraphs(layers, recorder)
    for waits in (True, False):
        layers[1].waits = waits
        lengths = (8, 8, 8) if waits else (3, 3, 3)
        for step, length in enumerate(lengths):
            hidden, *seen = inputs_of(step, device, length)
            expected, inputs = hidden, hidden.detach().clone().requires_grad_()
            run(graphs, layers, inputs, *seen).square().sum().backward()
            for layer in layers:
                expected = layer(expected, *seen)[0]
            expected.square().sum().backward()
            torch.testing.assert_close(inputs.grad, hidden.grad, rtol=0, atol=0)
        assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        torch.rand(3, device=device)  # torch's generator is out of the recording, too
    levels = [record.levelname for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert levels[0] == "WARNING" and "WARNING" not in levels[1:]
