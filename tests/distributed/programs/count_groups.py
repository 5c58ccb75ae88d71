"""The process groups that one rank of a large job on GPUs opens: counted, on torch's fake process group.

Arguments: tensor-parallel size, rank, world size. The device is said to be CUDA, and is never used; of each
group its ranks and the backend that was asked for are noted, and a fake one is opened in its place. Then the
tiny model's engines are built on these groups, on the CPU.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from distributed.tiny import tiny_config
from metalm.config import RunConfig
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.engines import build_engines

DEFAULT = "cpu:gloo,cuda:nccl"

opened: list[tuple[list[int], str]] = []
calls = 0
_new_group = dist.new_group


def note_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
    """In the place of `torch.distributed.new_group`."""
    global calls
    calls += 1
    members = list(range(dist.get_world_size()) if ranks is None else ranks)
    if dist.get_rank() in members:
        opened.append((members, backend or DEFAULT))
    return _new_group(ranks, backend="fake", **options)


def count() -> dict[str, Any]:
    """What has been opened so far, the world's group included."""
    gloo = [len(ranks) for ranks, backend in opened if "gloo" in backend]
    return {"calls": calls, "groups": len(opened), "gloo": sorted(gloo), "peers": sum(gloo) - len(gloo)}


def main() -> None:
    tensor, rank, world_size = map(int, sys.argv[1:])
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    opened.append((list(range(world_size)), DEFAULT))
    dist.new_group = note_group
    topology = build_topology(tensor, torch.device("cuda", 0))
    found = {"topology": count()}
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
    }  # DeepSpeed asks for them
    stages = {
        "decoder": "deepspeed_configs/decoder_zero1.json",
        "encoders": "deepspeed_configs/encoders_zero3.json",
    }
    content = tiny_config("unused", **stages).model_dump(mode="json")
    content["parallel"]["tensor"] = content["model"]["decoder"]["num_heads"] = tensor
    content["training"]["global_batch_size"] = world_size // tensor
    config = RunConfig.model_validate(content)
    build_engines(config, replace(topology, device=torch.device("cpu")))
    found["with engines"] = count()
    print("RESULT " + json.dumps(found), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
