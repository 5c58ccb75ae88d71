"""A small decoder's training step on CPU beside transformers' GPT-2 of its size under DeepSpeed, in turns.

python tools/bench_step.py --turns 40 --dropout 0

Each side is a process of its own, which steps when it is told to. Ratios are of medians and of the fastest
steps, by the wall's clock and by the processor's, which other work on the machine disturbs less: threads
sleep while they wait. `--against SRC` takes another tree of this library in the peer's place.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, ROWS = 4, 256, 4, 8192, 512, 4
WARM_UP_TURNS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--against", type=Path, help="folder `src` of another version")
    parser.add_argument("--overrides", nargs="*", default=[], help="`section.key=value` of our decoder")
    parser.add_argument("--side", choices=("ours", "gpt2"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        serve(arguments)
        return
    against = None if arguments.against is None else arguments.against.resolve()
    sides = [
        start("ours", ROOT / "src", arguments),
        start("ours" if against else "gpt2", against or ROOT / "src", arguments),
    ]
    seconds: list[list[tuple[float, float]]] = [[], []]
    for _ in range(WARM_UP_TURNS + arguments.turns):
        for side, times in zip(sides, seconds, strict=True):
            times.append(step(side))
    for side in sides:
        side.communicate()
    found: dict[str, object] = {"peer": "GPT-2 of transformers" if against is None else str(against)}
    for clock, number in (("wall", 0), ("processor", 1)):
        for name, reduce in (("median", statistics.median), ("fastest", min)):
            ours, theirs = (reduce([pair[number] for pair in times[WARM_UP_TURNS:]]) for times in seconds)
            found[f"{clock}, {name}"] = {"step_s": ours, "peer_step_s": theirs, "ratio": theirs / ours}
    print(json.dumps(found, indent=1))


def start(side: str, source: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """A side's process, ready to step."""
    command = [sys.executable, __file__, "--side", side, "--threads", str(arguments.threads)]
    command += ["--dropout", str(arguments.dropout), "--overrides", *arguments.overrides]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone |= {"MASTER_PORT": str(free.getsockname()[1]), "PYTHONPATH": str(source)}
    alone |= {"OMP_NUM_THREADS": str(arguments.threads), "DS_ACCELERATOR": "cpu"}
    alone |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    process = subprocess.Popen(
        command, env=os.environ | alone, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line == "ready\n":
            return process
    raise SystemExit(f"{side} ended with {process.wait()}")


def step(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Seconds that a side says one step took, by the wall's clock and the processor's."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    while line := process.stdout.readline():
        if line.startswith("took "):
            _, wall, processor = line.split()
            return float(wall), float(processor)
    raise SystemExit(f"a side ended with {process.wait()}")


def serve(arguments: argparse.Namespace) -> None:
    """Step whenever a line comes."""
    import torch

    torch.set_num_threads(arguments.threads)
    sides: dict[str, Callable[[argparse.Namespace], Callable[[], object]]] = {"ours": ours, "gpt2": gpt2}
    run = sides[arguments.side](arguments)
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter(), time.process_time()
        run()
        print("took", time.perf_counter() - began[0], time.process_time() - began[1], flush=True)


def ours(arguments: argparse.Namespace) -> Callable[[], object]:
    """The trainer's step on made-up rows, each of one document."""
    from metalm.commands.starting import set_up_libraries

    set_up_libraries()
    from metalm.config.load import load_config
    from metalm.objectives import build_objective
    from metalm.parallel.launch import find_launch, open_process_group
    from metalm.parallel.topology import build_topology
    from metalm.training.engines import build_engines
    from metalm.training.guards import StepGuard
    from metalm.training.step import TrainStep
    from metalm.training.step_benchmark import made_up_batches

    overrides = ["parallel.tensor=1", "model.encoders=null", "data.evaluation=null", "data.workers=0"]
    overrides += ["data.sources={pile: {path: data/pile/shards/train, readers: {}}}"]
    overrides += [
        f"training.global_batch_size={ROWS}",
        f"training.micro_batch_size={ROWS}",
        f"data.lanes={ROWS}",
    ]
    overrides += [
        f"data.sequence_length={LENGTH}",
        "training.precision=fp32",
        f"model.vocab_size={VOCABULARY}",
    ]
    overrides += [f"model.decoder.num_layers={LAYERS}", f"model.decoder.hidden_size={WIDTH}"]
    overrides += [f"model.decoder.num_heads={HEADS}", f"model.decoder.dropout={arguments.dropout}"]
    config = load_config(ROOT / "pipelines" / "pretrain_language.yaml", [*overrides, *arguments.overrides])
    device = open_process_group(find_launch(os.environ), config.parallel.timeout_minutes)
    topology = build_topology(1, device)
    engines = build_engines(config, topology)
    guard = StepGuard(config.guards, config.data.sources, device)
    train_step = TrainStep(engines, topology, 1, guard, build_objective(config))
    batches = made_up_batches(config, one_document=True)
    return lambda: train_step.run(batches, 1e-4)


def gpt2(arguments: argparse.Namespace) -> Callable[[], object]:
    """Transformers' model in a DeepSpeed engine of ZeRO 1."""
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from metalm.training.extensions import prepare_extensions

    prepare_extensions()
    given: dict[str, Any] = {"use_cache": False, "attn_implementation": "sdpa"}
    given |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), arguments.dropout)
    given |= {
        "vocab_size": VOCABULARY,
        "n_positions": LENGTH,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
    }
    model = GPT2LMHeadModel(GPT2Config(**given))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        },
    )
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))

    def run() -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    return run


if __name__ == "__main__":
    main()
