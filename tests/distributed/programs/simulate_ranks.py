"""One rank of a large job, on torch's fake process group: its groups, and its share of the model.

Arguments: pipeline, rank, world size, overrides. Everything is built on the meta device: shapes, no memory.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from metalm.config import load_config
from metalm.model.decoder import Decoder
from metalm.model.encoder import EncoderBank
from metalm.parallel.mpu import decoder_mpu, encoders_mpu
from metalm.parallel.topology import build_topology, close_topology


def main() -> None:
    pipeline, rank, world_size, *overrides = sys.argv[1:]
    config = load_config(Path(pipeline), overrides)
    dist.init_process_group("fake", rank=int(rank), world_size=int(world_size), store=FakeStore())
    topology = build_topology(config.parallel.tensor, torch.device("cpu"))
    with torch.device("meta"):
        decoder = Decoder(config.model, config.data.sequence_length, topology)
        encoders = EncoderBank(config.model)
    assert all(p.is_meta for p in [*decoder.parameters(), *encoders.parameters()])
    found = {
        "tensor_ranks": dist.get_process_group_ranks(topology.tensor_group),
        "data_ranks": dist.get_process_group_ranks(topology.data_group),
        "decoder": sum(p.numel() for p in decoder.parameters()),
        "decoder_shards": decoder_mpu(topology).get_data_parallel_world_size(),
        "encoders": sum(p.numel() for p in encoders.parameters()),
        "encoders_shards": encoders_mpu(topology).get_data_parallel_world_size(),
    }
    print("RESULT " + json.dumps(found), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
