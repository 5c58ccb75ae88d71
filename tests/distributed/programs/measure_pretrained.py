"""Bytes of an encoder of transformers that a rank holds under ZeRO 3. Arguments: its folder."""

import faulthandler
import json
import os
import sys

from distributed.tiny import tiny_config
from metalm.config import RunConfig
from metalm.config.pretrained_folder import fill_in_pretrained
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.engines import build_engines


def main() -> None:
    faulthandler.enable()
    launch = find_launch(os.environ)
    topology = build_topology(1, open_process_group(launch, timeout_minutes=3))
    content = tiny_config("unused").model_dump(mode="json")
    content["model"]["encoders"]["image"] = {"pretrained": {"path": sys.argv[1]}, "trained_layers": 1}
    content["deepspeed"]["encoders"] = "deepspeed_configs/encoders_zero3.json"
    fill_in_pretrained(content)
    engines = build_engines(RunConfig.model_validate(content), topology)
    parameters = engines.encoders.module.encoders["image"].model.named_parameters()
    held = sum(parameter.ds_tensor.nbytes for _, parameter in parameters)
    print("RESULT " + json.dumps({"rank": launch.rank, "held": held}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
