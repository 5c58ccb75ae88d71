"""Selective recomputation: the same losses and gradients, and as many bytes less as a plan says."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distributed.planned import measured_batches, planned_config
from distributed.tiny import LLAMA
from metalm.config import RunConfig
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.parallel.topology import Topology
from metalm.planning.devices import find_device
from metalm.planning.memory import decoder_activations
from metalm.planning.plan import plan_run

PAPER = {"normalization": "deepnorm", "activation": "gelu"}


def config_of(options: dict[str, object], recompute: bool | str) -> RunConfig:
    content = planned_config().model_dump()
    content["model"]["decoder"] |= {**options, "recompute": recompute}
    content["model"]["encoders"] = {}
    content["data"]["sources"]["text"]["readers"] = {}
    return RunConfig.model_validate(content)


@pytest.mark.parametrize("options", [PAPER, LLAMA], ids=["paper", "llama"])
def test_norms_and_activations_are_made_again_and_not_kept(
    options: dict[str, object], topology: Topology
) -> None:
    losses, gradients, kept, planned = {}, {}, {}, {}
    for recompute in (False, "selective"):
        config = config_of(options, recompute)
        decoder = Decoder(config.model, config.data.sequence_length, topology)
        draw = config.model.decoder
        initialize_parameters(decoder, "decoder", 3, lambda name, own=draw: decoder_draw(own, name), 0, 1)
        decoder.double()
        batch = measured_batches(config, 0, 1)[0]
        decoder(batch, {}).sum()  # what is made once stays
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            losses[recompute] = decoder(batch, {})
        kept[recompute] = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
        losses[recompute].sum().backward()
        gradients[recompute] = [p.grad for p in decoder.parameters()]
        planned[recompute] = decoder_activations(config, 8)
    torch.testing.assert_close(losses["selective"], losses[False], atol=1e-12, rtol=0)
    for found, wanted in zip(gradients["selective"], gradients[False], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    # One layer's outputs are held while its backward runs: the plan counts them, the forward does not.
    layer = (planned[False] - planned["selective"]) / (config.model.decoder.num_layers - 1)
    saved = layer * config.model.decoder.num_layers
    assert saved > 0.2 * kept[False]
    # The output layer keeps what the paper's last layer gives; on CPU, RMS norms keep more than on a GPU.
    assert 0.95 * saved < kept[False] - kept["selective"] < 1.21 * saved


def test_a_plan_sends_and_multiplies_no_more_but_moves_more_bytes() -> None:
    plain, selective = (
        plan_run(config_of(LLAMA, how), 1, find_device("h100")) for how in (False, "selective")
    )
    assert selective.executed_flops == plain.executed_flops
    assert selective.total_bytes < plain.total_bytes
    assert selective.parts_s["elementwise"] > plain.parts_s["elementwise"]
