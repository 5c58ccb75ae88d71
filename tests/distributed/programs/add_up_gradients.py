"""The gradients of one step of 64 micro-batches, in bf16 against fp32, at the same weights.

Arguments: output folder, ZeRO stages as pairs such as 1,3 (decoder, encoders).
"""

import faulthandler
import json
import os
import sys

import torch
from deepspeed.utils import safe_get_full_grad
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
    for pair in pairs:
        decoder, encoders = pair.split(",")
        found: dict[str, dict[str, Tensor]] = {}
        for name, precision, fp32_gradients in (
            ("fp32", "fp32", False),
            ("in bf16", "bf16", False),
            ("in fp32", "bf16", True),
        ):
            config = tiny_config(
                folder,
                precision=precision,
                fp32_gradients=fp32_gradients,
                decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
                encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
            )
            found[name] = gradients_of_a_step(config, topology)
        expected = found.pop("fp32")
        errors = {name: relative_error(own, expected) for name, own in found.items()}
        print("RESULT " + json.dumps({"zero": pair, "errors": errors}), flush=True)
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


def round_weights(engine: object) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

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
