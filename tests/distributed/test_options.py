"""Every option of the decoder on several ranks: same start, losses and weights as the plain model.

Also with sequence parallelism, with recomputation, and with the decoder itself sharded by ZeRO 3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.ranks import run_ranks
from distributed.test_topologies import read_weights
from distributed.tiny import LENGTH, RATES, STEPS, global_batch, tiny_config
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import EncoderBank, encoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.parallel.topology import Topology
from reference import training as reference

CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "paper, sequence-parallel": (2, {"tensor": 2, "sequence_parallel": True}, "1,3"),
    "llama, sequence-parallel": (2, {"options": "llama", "tensor": 2, "sequence_parallel": True}, "2,3"),
    "gpt2, sequence-parallel over 2 x 2": (
        4,
        {"options": "gpt2", "tensor": 2, "sequence_parallel": True, "micro_batch_size": 2},
        "1,1",
    ),
    "mixed, recomputed, sequence-parallel": (
        2,
        {"options": "mixed", "tensor": 2, "sequence_parallel": True},
        "1,3",
    ),
    "mixed, recomputed under ZeRO 3": (2, {"options": "mixed", "micro_batch_size": 2}, "3,3"),
    "norms and activations recomputed, sequence-parallel": (
        2,
        {"options": "selective", "tensor": 2, "sequence_parallel": True},
        "2,1",
    ),
    "parallel residuals, wide heads, sequence-parallel": (
        2,
        {"options": "parallel", "tensor": 2, "sequence_parallel": True},
        "2,3",
    ),
    "one key head, ZeRO 3 over the data-parallel ranks": (2, {"options": "qkv_biases"}, "3,1"),
    "optimizers in host memory": (2, {"tensor": 2, "micro_batch_size": 4}, "2_offload,3_offload"),
}
"""Ranks, arguments of `tiny_config`, ZeRO stages of decoder and encoders."""


def start_weights(topology: Topology, options: str) -> dict[str, torch.Tensor]:
    """What one rank alone starts with, in float64."""
    config = tiny_config("unused", options=options)
    model = config.model
    decoder, encoders = Decoder(model, config.data.sequence_length, topology), EncoderBank(model)
    seed = config.run.seed
    initialize_parameters(decoder, "decoder", seed, lambda n: decoder_draw(model.decoder, n), 0, 1)
    initialize_parameters(encoders, "encoders", seed, lambda n: encoder_draw(model, n), 0, 1)
    parts = {"decoder": decoder, "encoders": encoders}
    return {f"{part}/{n}": p.detach().double() for part, m in parts.items() for n, p in m.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_equal_the_plain_model(name: str, topology: Topology, tmp_path: Path) -> None:
    num_ranks, shape, zero = CASES[name]
    options = shape.get("options", "paper")
    (result,) = run_ranks("train_tiny", num_ranks, str(tmp_path), json.dumps(shape), zero)
    start = start_weights(topology, options)
    batches = [global_batch(number) for number in range(STEPS)]
    losses, weights = reference.train(batches, start, tiny_config("unused", options=options), RATES)
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    positions = shape.get("micro_batch_size", 1) * LENGTH  # the rows of a micro-batch, end to end
    assert result["layer_positions"] == positions // (shape["tensor"] if "sequence_parallel" in shape else 1)
    assert result["optimizer_is_offloaded"] == ("offload" in zero)
    assert result["drift"] == []
    for step, wanted in ((0, start), (STEPS, weights)):
        found = read_weights(tmp_path / f"zero_{zero.replace(',', '_')}", step)
        assert found.keys() == wanted.keys()
        for parameter, value in wanted.items():
            torch.testing.assert_close(
                found[parameter], value, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}"
            )


def test_replicas_stay_equal_for_twenty_steps(tmp_path: Path) -> None:
    shape = {"options": "llama", "tensor": 2, "sequence_parallel": True, "steps": 20, "micro_batch_size": 4}
    (result,) = run_ranks("train_tiny", 2, str(tmp_path), json.dumps(shape), "1,3")
    assert len(result["losses"]) == 20 and result["drift"] == []
