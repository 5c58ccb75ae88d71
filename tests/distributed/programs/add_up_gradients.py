"""The gradients of one step of 64 micro-batches, added up in bf16 and in fp32, against all in fp32.

Arguments: output folder, ZeRO stages as pairs such as 1,3 (decoder, encoders): the first one also adds up in
bf16.
"""

import faulthandler
import json
import os
import sys
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor

from distributed.tiny import global_batch, micro_batches, tiny_config
from metalm.config import RunConfig
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.training.engines import Engines, build_engines
from metalm.training.guards import StepGuard
from metalm.training.owned_ranges import push_masters, set_state
from metalm.training.step import TrainStep

STEPS = 8
"""Whose rows are the micro-batches: 8 of each."""


def main() -> None:
    faulthandler.enable()
    folder, *pairs = sys.argv[1:]
    topology = build_topology(1, open_process_group(find_launch(os.environ), timeout_minutes=3))
    runs = [("fp32", pairs[0], {"precision": "fp32"}), ("in bf16", pairs[0], {"precision": "bf16"})]
    runs += [(f"in fp32, {pair}", pair, {"precision": "bf16", "fp32_gradients": True}) for pair in pairs]
    found: dict[str, dict[str, Tensor]] = {}
    for name, pair, precision in runs:
        decoder, encoders = pair.split(",")
        config = tiny_config(
            folder,
            **precision,
            decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
            encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
        )
        found[name] = gradients_of_a_step(config, topology)
    expected = found.pop("fp32")
    errors = {name: relative_error(own, expected) for name, own in found.items()}
    print("RESULT " + json.dumps(errors), flush=True)
    close_topology()


def gradients_of_a_step(config: RunConfig, topology: Topology) -> dict[str, Tensor]:
    """By parameter, of 64 micro-batches at weights that bf16 can hold."""
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"global_batch_size": 8 * STEPS})}
    )
    engines = build_engines(config, topology)
    for engine in engines.trained().values():
        round_weights(engine)
    guard = StepGuard(config.guards, config.data.sources, topology.device)
    step = TrainStep(engines, topology, 2, guard, SemiCausal())
    found: dict[str, Tensor] = {}
    measure = step._joint_norm.measure

    def look_and_measure() -> object:
        found.update(current_gradients(engines))
        return measure()

    step._joint_norm.measure = look_and_measure
    batches = [
        batch for number in range(STEPS) for batch in micro_batches(global_batch(number), config, 0, 1)
    ]
    assert len(batches) == 8 * STEPS
    step.run(batches, 0.0)
    return found


def round_weights(engine: Any) -> None:
    weights = {
        parameter: safe_get_full_fp32_param(parameter).bfloat16().float().flatten()
        for parameter in engine.module.parameters()
    }
    for parameter, values in weights.items():
        set_state(engine, parameter, "master", values)
    push_masters(engine)


def current_gradients(engines: Engines) -> dict[str, Tensor]:
    return {
        f"{component}/{name}": safe_get_full_grad(parameter).double().flatten()
        for component, engine in engines.trained().items()
        for name, parameter in engine.module.named_parameters()
    }


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm."""
    difference = torch.cat([found[name] - value for name, value in expected.items()])
    return float(difference.norm() / torch.cat(list(expected.values())).norm())


if __name__ == "__main__":
    main()
