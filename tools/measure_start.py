"""The loss that a decoder begins with, by width: near that of the uniform guess, or far above it.

Examples:
    python tools/measure_start.py
    python tools/measure_start.py --widths 2048 --layers 24 --vocabulary 64001
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from metalm.cli import ToolParser, run_tool

HEAD_SIZE = 32
LENGTH = 128
STARTS: dict[str, dict[str, Any]] = {
    "mirrored": {"start": "mirrored"},
    "plain": {"start": "plain"},
    "untied": {"tied_output": False},
    "unscaled": {"scale_embedding": False},
}
"""What is set of `model.decoder`."""


def main() -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 512, 1024, 2048])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH} tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    from metalm.config import DecoderConfig, ModelConfig
    from metalm.model.first_loss import first_loss
    from metalm.parallel.launch import find_launch, open_process_group
    from metalm.parallel.topology import build_topology, close_topology

    topology = build_topology(1, open_process_group(find_launch(os.environ), timeout_minutes=3))
    print("".join(f"{name:>10}" for name in ("width", *STARTS, "uniform")))
    for width in options.widths:
        sizes = {"num_layers": options.layers, "hidden_size": width, "num_heads": width // HEAD_SIZE}
        losses = []
        for start in STARTS.values():
            decoder = DecoderConfig(**sizes, **start)
            config = ModelConfig(vocab_size=options.vocabulary, decoder=decoder)
            losses.append(first_loss(config, options.rows, LENGTH, options.seed, topology))
        shown = "".join(f"{loss:10.3f}" for loss in (*losses, math.log(options.vocabulary)))
        print(f"{width:>10}{shown}", flush=True)
    close_topology()


if __name__ == "__main__":
    run_tool(main)
