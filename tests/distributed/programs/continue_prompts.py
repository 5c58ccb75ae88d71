"""Continue prompts and judge endings by the tiny model as it starts, on one layout of ranks after another.

Arguments: for each layout JSON of `tiny_config`'s arguments with `name` and `zero` (stages of decoder and
encoders).
"""

import faulthandler
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from distributed.continuations import SpecialTokens, by_beams, greedily, how_likely, prompts
from distributed.tiny import tiny_config
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.engines import build_engines


def main() -> None:
    faulthandler.enable()
    device = open_process_group(find_launch(os.environ), timeout_minutes=3)
    for layout in sys.argv[1:]:
        parallel_state.destroy_model_parallel()
        answer(device, **json.loads(layout))
    close_topology()


def answer(device: torch.device, *, name: str, zero: str, **shape: Any) -> None:
    decoder, encoders = zero.split(",")
    config = tiny_config(
        "unused",
        **shape,
        decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
        encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
    )
    topology = build_topology(config.parallel.tensor, device, context_size=config.parallel.context)
    engines = build_engines(config, topology)
    asked = (engines, topology, config, SpecialTokens(), prompts()[topology.data_rank :: topology.data_size])
    answers = [greedily(*asked), by_beams(*asked), how_likely(*asked)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, answers)
    if topology.rank == 0:
        shares = gathered[:: dist.get_world_size() // topology.data_size]
        found = [[share[kind] for share in shares] for kind in range(3)]
        whole = [[one for some in zip(*kind, strict=True) for one in some] for kind in found]
        kinds = dict(zip(("greedy", "beams", "likelihoods"), whole, strict=True))
        print("RESULT " + json.dumps({"name": name, **kinds}), flush=True)


if __name__ == "__main__":
    main()
