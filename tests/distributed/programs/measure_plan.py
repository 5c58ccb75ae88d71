"""What a rank really holds, keeps and sends in a step, for some ZeRO pairs, measured from the tensors.

Arguments: tensor size, context size, pairs of DeepSpeed JSONs such as D.json,E.json (decoder, encoders).
"""

import faulthandler
import json
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.planned import measured_batches, planned_config
from metalm.objectives import encode
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.saving import HostBuffers
from metalm.training.step import TrainStep


def main() -> None:
    faulthandler.enable()
    tensor, context = map(int, sys.argv[1:3])
    launch = find_launch(os.environ)
    device = open_process_group(launch, timeout_minutes=3)
    topology = build_topology(tensor, device, context_size=context)
    for pair in sys.argv[3:]:
        decoder, encoders = pair.split(",")
        config = planned_config(tensor=tensor, context=context, decoder=decoder, encoders=encoders)
        engines = build_engines(config, topology)
        found: dict[str, Any] = {"rank": launch.rank, "pair": pair}
        for name, engine in engines.by_component().items():
            taken = HostBuffers().snapshot(engine, name, topology)
            found[name] = {
                "weights": weight_bytes(engine),
                "optimizer": optimizer_bytes(engine),
                "snapshot": storage_bytes(list(taken.tensors.values())),
            }
        batches = measured_batches(config, topology.data_rank, topology.data_size)
        found["activations"] = kept_bytes(engines, batches[0], topology)
        step = TrainStep(
            engines, topology, 2, StepGuard(config.guards, ["one", "other"], topology.device), SemiCausal()
        )
        with Sent(topology) as sent:
            step.run(batches, 1e-3)
        found["sent"] = dict(sent.by_group)
        print("RESULT " + json.dumps(found), flush=True)
    close_topology()


def weight_bytes(engine: Any) -> int:
    held = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return storage_bytes([tensor.data for tensor in held])


def optimizer_bytes(engine: Any) -> int:
    optimizer = engine.optimizer
    stage_3 = engine.zero_optimization_stage() == 3
    masters = optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for key, value in state.items()
        if key in ("exp_avg", "exp_avg_sq")
    ]
    return storage_bytes([*masters, *moments])


def kept_bytes(engines: Any, batch: Any, topology: Topology) -> int:
    """Storages that autograd saves in a forward pass, without the weights' own."""
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = engines.decoder(batch, encode(engines, batch, topology))
    weights = {
        p.untyped_storage().data_ptr()
        for engine in engines.by_component().values()
        for p in engine.module.parameters()
    }
    size = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    engines.decoder.backward(losses.sum() * 0.0, scale_wrt_gas=False)  # the graph is used up, nothing learnt
    for engine in engines.by_component().values():
        engine.optimizer.zero_grad()
        engine.micro_steps = 0
    return size


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Sent(TorchDispatchMode):
    """Adds up what a ring sends of every collective, by group."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.by_group: Counter[str] = Counter()
        names = ("world", "data", "replica", "context", "rows", "tensor")
        groups = {name: getattr(topology, f"{name}_group") for name in names}
        self._names = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.name().split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
            and "ProcessGroup" in str(arg._type())
        )  # fmt: skip
        whole = max(_bytes(arg) for arg in args)
        ranks = dist.get_process_group_ranks(group)
        factor = (2 if name.startswith("allreduce") else 1) * (len(ranks) - 1) / len(ranks)
        self.by_group[self._names[tuple(ranks)]] += factor * whole


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    return 0


if __name__ == "__main__":
    main()
