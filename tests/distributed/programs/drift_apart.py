"""Four ranks, tensor 2 x data 2, whose data-parallel groups do not sum gradients in the same order.

What another order does to a sum is simulated: in the second tensor rank's group every sum of gradients is the
next larger number, alike on both of its ranks. Arguments: pairs of decoder ZeRO stage and `unified` or
`apart`, as in 1,unified; the latter leaves out what makes the gradients one. Results: what the drift check
finds after each step.
"""

import faulthandler
import json
import os
import sys
from typing import Any

import deepspeed.comm
import torch
from deepspeed.runtime.zero import stage3

from distributed.tiny import global_batch, micro_batches, rate_of, tiny_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training import step as step_module
from metalm.training.drift import find_drift
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard

_all_reduce, _reduce_scatter = deepspeed.comm.all_reduce, stage3.reduce_scatter_coalesced


def sum_otherwise(data_group: Any) -> None:
    """From now on this rank's sums of gradients over its data-parallel group come out a bit larger."""
    beyond = torch.tensor(float("inf"))

    def all_reduce(tensor: torch.Tensor, *arguments: Any, group: Any = None, **options: Any) -> Any:
        result = _all_reduce(tensor, *arguments, group=group, **options)
        if group is data_group and tensor.numel() > 1:
            tensor.copy_(torch.nextafter(tensor, beyond))
        return result

    def reduce_scatter(tensors: Any, group: Any) -> Any:
        parts = _reduce_scatter(tensors, group)
        return [torch.nextafter(part, beyond) for part in parts] if group is data_group else parts

    deepspeed.comm.all_reduce, stage3.reduce_scatter_coalesced = all_reduce, reduce_scatter


def main() -> None:
    faulthandler.enable()
    launch = find_launch(os.environ)
    topology = build_topology(2, open_process_group(launch, timeout_minutes=3))
    if topology.tensor_rank == 1:
        sum_otherwise(topology.data_group)
    unify = step_module.unify_gradients
    for pair in sys.argv[1:]:
        stage, kind = pair.split(",")
        step_module.unify_gradients = unify if kind == "unified" else lambda engine, topology: None
        config = tiny_config(
            "unused",
            tensor=2,
            micro_batch_size=2,
            decoder=f"deepspeed_configs/decoder_zero{stage}.json",
            encoders="deepspeed_configs/encoders_zero1.json",
        )
        engines = build_engines(config, topology)
        guard = StepGuard(config.guards, config.data.sources, topology.device)
        step = step_module.TrainStep(engines, topology, 2, guard, SemiCausal())
        drift, losses = [], []
        for number in range(2):
            batches = micro_batches(global_batch(number), config, topology.data_rank, topology.data_size)
            result = step.run(batches, rate_of(number))
            losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
            drift.append(find_drift(engines, topology))
        if launch.rank == 0:
            print("RESULT " + json.dumps({"pair": pair, "drift": drift, "losses": losses}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
