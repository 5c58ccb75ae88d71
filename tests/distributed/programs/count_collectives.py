"""What one rank of a job calls on its groups in a step: counted on torch's fake process group.

Nothing is sent, and values are wrong for it, but finite; which collectives are called, on what, does not hang
on them. Arguments: tensor size, world size, pairs of DeepSpeed JSONs such as D.json,E.json.
"""

import faulthandler
import json
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.planned import measured_batches, planned_config
from metalm.config import RunConfig
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.planning.devices import find_device
from metalm.planning.plan import plan_run
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep

MICRO_BATCHES = 2
SMALL = 64
"""Bytes up to which an all-reduce is one of scalars: counts, norms, verdicts."""


class Called(TorchDispatchMode):
    """Counts collectives, and the bytes that a rank sends of them in a ring, by group and kind."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._names = {
            group.group_name: name
            for name, group in (
                ("world", topology.world_group),
                ("data", topology.data_group),
                ("tensor", topology.tensor_group),
            )
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(
                dist.ProcessGroup.unbox(one)
                for one in args
                if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type())
            )
            size = max(_bytes(one) for one in args)
            kind = func.name().split("::")[1].strip("_").replace("_base", "")
            of_scalars = " of scalars" if kind == "allreduce" and size <= SMALL else ""
            key = f"{self._names[group.group_name]} {kind}{of_scalars}"
            self.counts[key] += 1
            ranks = group.size()
            self.sent[key] += (2 if kind == "allreduce" else 1) * (ranks - 1) / ranks * size
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def main() -> None:
    faulthandler.enable()
    tensor, world_size, *pairs = sys.argv[1:]
    os.environ |= {"RANK": "0", "WORLD_SIZE": world_size, "LOCAL_RANK": "0"}  # DeepSpeed asks for them
    dist.init_process_group("fake", rank=0, world_size=int(world_size), store=FakeStore())
    topology = build_topology(int(tensor), torch.device("cpu"))
    for pair in pairs:
        decoder, encoders = pair.split(",")
        content = planned_config(tensor=int(tensor), decoder=decoder, encoders=encoders).model_dump(
            mode="json"
        )
        rows = content["training"]["micro_batch_size"] * MICRO_BATCHES
        content["training"]["global_batch_size"] = content["data"]["lanes"] = rows * topology.data_size
        config = RunConfig.model_validate(content)
        engines = build_engines(config, topology)
        guard = StepGuard(config.guards, ["one", "other"], topology.device)
        step = TrainStep(engines, topology, 2, guard, SemiCausal())
        batches = measured_batches(config, 0, topology.data_size)
        step.run(batches, 1e-3)  # ZeRO 3 learns the order of the layers
        with Called(topology) as called:
            result = step.run(batches, 1e-3)
        assert result.skipped_steps == 0 and len(batches) == MICRO_BATCHES
        plan = plan_run(config, int(world_size), find_device("h100"))
        found = {
            "pair": pair,
            "counts": dict(called.counts),
            "sent": dict(called.sent),
            "planned": {part.kind: part.num_bytes for part in plan.traffic},
        }
        print("RESULT " + json.dumps(found), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
