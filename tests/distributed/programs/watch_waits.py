"""`metalm ARGUMENTS` on one rank: where the host looked at tensors of a step, and which steps were profiled.

Arguments: first of the steps that are watched, then those of `metalm`.
"""

import json
import sys
from typing import Any

import torch

from metalm import cli
from metalm.training import loop
from training.host_reads import HostReads

_advance, _run = loop._Run._advance, loop.TrainStep.run


def main() -> None:
    first = int(sys.argv.pop(1))
    places: dict[int, list[str]] = {}
    is_profiled: list[bool] = []

    def run_step(step: loop.TrainStep, batches: Any, rate: float) -> Any:
        is_profiled.append(torch.autograd._profiler_enabled())
        return _run(step, batches, rate)

    def advance(run: loop._Run, upcoming: Any) -> None:
        step = run._step + 1
        if step < first or run._is_logged(step):
            return _advance(run, upcoming)
        with HostReads() as reads:
            _advance(run, upcoming)
        places[step] = reads.places
        return None

    loop._Run._advance, loop.TrainStep.run = advance, run_step
    sys.argv[0] = "metalm"
    try:
        cli.main()
    finally:
        print("RESULT " + json.dumps({"places": places, "is_profiled": is_profiled}), flush=True)


if __name__ == "__main__":
    main()
