"""Six ranks, tensor 2 x data 3 under ZeRO 3, whose partitions of norms and biases end in padding.

DeepSpeed leaves the padding as its memory was: here it is another on every rank. Result: what the drift
check finds.
"""

import faulthandler
import json
import os

from distributed.tiny import tiny_config
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.drift import find_drift
from metalm.training.engines import build_engines
from metalm.training.owned_ranges import owned_part


def main() -> None:
    faulthandler.enable()
    topology = build_topology(2, open_process_group(find_launch(os.environ), timeout_minutes=3))
    config = tiny_config("unused", tensor=2, decoder="deepspeed_configs/decoder_zero3.json")
    engines = build_engines(config, topology)
    num_padded = 0
    for parameter in engines.decoder.module.parameters():
        size = owned_part(engines.decoder, parameter).numel()
        num_padded += parameter.ds_tensor.numel() - size
        parameter.ds_tensor.data[size:] = topology.rank
    result = {"padded": num_padded, "drift": find_drift(engines, topology)}
    print("RESULT " + json.dumps(result), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
