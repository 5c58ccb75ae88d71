"""Two ranks on one GPU over NCCL, or on CPU over gloo, against one rank: `metalm train` on every layout.

python tools/check_ranks.py --out ranks_check --nccl libnccl.so.2      two ranks on one GPU
python tools/check_ranks.py --out ranks_check --device cpu                  two ranks on CPU

NCCL lets several ranks share a GPU from 2.30 on: where torch brings an older one, give a library. Starting a
process takes longer than training in it, so two ranks train one layout after another, beside one rank alone;
each is the product's own command on a tiny model and data made here. Speed means nothing here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVED_STEP = 12, 6
OLDEST_NCCL = (2, 30)

Record = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One `metalm train`, and what its losses are compared with."""

    ranks: int
    overrides: tuple[str, ...] = ()
    resumes: str | None = None
    """Starts from the checkpoint that this layout saved at `SAVED_STEP`."""
    tolerance: float = 1e-5
    """Of a loss in nats against one rank in float32: what other orders of summation may make of it."""


ENCODERS_AT_3 = "deepspeed.encoders=deepspeed_configs/encoders_zero3.json"
LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, ("parallel.tensor=2",)),
    "dp2": Layout(2),
    "dp2_encoders_zero3": Layout(2, (ENCODERS_AT_3,)),
    "dp2_both_zero3": Layout(2, ("deepspeed.decoder=deepspeed_configs/decoder_zero3.json", ENCODERS_AT_3)),
    "tp2_sequence_parallel": Layout(2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "cp2": Layout(2, ("parallel.context=2",)),
    "dp2_encoders_zero3_resumed": Layout(2, (ENCODERS_AT_3,), resumes="dp2_encoders_zero3"),
    "one_resumed_from_tp2": Layout(1, resumes="tp2"),
    "tp2_resumed_from_dp2_both_zero3": Layout(2, ("parallel.tensor=2",), resumes="dp2_both_zero3"),
    "dp2_bf16_fp32_gradients": Layout(
        2,
        ("training.precision=bf16", "training.fp32_gradients=true", ENCODERS_AT_3),
        tolerance=3e-2,
    ),
}

_PIPELINE = """
run: {{name: ranks, folder: {folder}/runs, seed: 3}}
parallel: {{timeout_minutes: 2}}
deepspeed:
  decoder: deepspeed_configs/decoder_zero1.json
  encoders: deepspeed_configs/encoders_zero1.json
model:
  vocab_size: 384
  decoder: {{num_layers: 2, hidden_size: 64, num_heads: 4}}
  encoders:
    text: {{num_layers: 2, hidden_size: 32, num_heads: 2, max_text_positions: 16}}
    image:
      num_layers: 2
      hidden_size: 32
      num_heads: 2
      max_text_positions: 16
      image: {{image_size: 24, patch_size: 12}}
      connector: feed_forward
data:
  tokenizer: {folder}/tokenizer
  sequence_length: 64
  lanes: 4
  workers: 0
  spans: {{min_length: 4, max_length: 8}}
  sources:
    text: {{path: {folder}/text, readers: {{text: text}}}}
    pairs: {{path: {folder}/pairs, readers: {{image: image, text: image}}}}
training:
  steps: {steps}
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  optimizer: {{learning_rate: 1.0e-3}}
  schedule: {{warmup_steps: 2}}
checkpoint: {{every_steps: {saved}}}
monitor:
  log_every_steps: 1
  evaluate_every_steps: 1000
  sample_every_steps: 1000
  sinks: {{tensorboard: false}}
"""


def check_ranks(
    folder: Path, keep: Callable[[Record], None], *, nccl: Path | None, on_cpu: bool, seconds: float
) -> None:
    """Train every layout and hand over what became of it, as it is known.

    Args:
        folder: for data, runs and logs; emptied first.
        keep: gets a record for each layout.
        nccl: library to load instead of torch's own.
        on_cpu: over gloo.
        seconds: after which what still trains is ended.
    """
    if not on_cpu and (reason := _missing_nccl(nccl)):
        keep({"not_run": reason})
        return
    shutil.rmtree(folder, ignore_errors=True)
    prepare(folder)
    began = time.monotonic()
    ranks = [_start(folder, 1, 0, nccl, on_cpu, port := _free_port())]
    ranks += [_start(folder, 2, rank, nccl, on_cpu, port) for rank in range(2)]
    waiting = dict(LAYOUTS)
    try:
        while waiting and time.monotonic() - began < seconds:
            over = all(rank.poll() is not None for rank in ranks)
            for name in [name for name in waiting if _ended(folder, name).exists()]:
                del waiting[name]
                keep(compare(folder, name))
            if over:
                break
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for name in waiting:
        keep({"layout": name, "not_run": f"not done after {seconds:.0f} s, see {folder}/rank_*.log"})


def compare(folder: Path, name: str) -> Record:
    """The losses of a layout against those of one rank."""
    from metalm.run_metrics import read_metrics

    def losses(run: str) -> dict[int, float]:
        lines = read_metrics(folder / "runs" / run)
        return {line["step"]: line["loss/all"] for line in lines if "loss/all" in line}

    layout, told = LAYOUTS[name], json.loads(_ended(folder, name).read_text())
    found, expected = losses(name), losses("one")
    first = SAVED_STEP if layout.resumes else 0
    record = {"layout": name, "ranks": layout.ranks, **told}
    if told["rc"] == 0 and sorted(found) == list(range(first + 1, STEPS + 1)) and len(expected) == STEPS:
        difference = max(abs(found[step] - expected[step]) for step in found)
        record |= {"first_loss": found[first + 1], "last_loss": found[STEPS]}
        record |= {"largest_difference": difference, "is_fine": difference <= layout.tolerance}
    else:
        record |= {"steps_with_losses": sorted(found), "is_fine": False}
    return record


def prepare(folder: Path) -> None:
    """Random sentences, blocks of colour and their captions; a tokenizer; the pipeline; folders of runs."""
    import io

    import numpy as np
    import webdataset
    from PIL import Image

    from metalm.data.storage.index import build_index
    from metalm.data.tokenizer import train_tokenizer

    draw = np.random.default_rng(7)
    words = ["".join(draw.choice(list("aeiounrstlm"), draw.integers(2, 7))) for _ in range(60)]

    def sentence(length: int) -> str:
        return " ".join(draw.choice(words, length))

    def image() -> bytes:
        buffer = io.BytesIO()
        blocks = draw.integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(12, axis=0).repeat(12, axis=1)
        Image.fromarray(blocks).save(buffer, "PNG")
        return buffer.getvalue()

    samples: dict[str, Callable[[], dict[str, bytes]]] = {
        "text": lambda: {"txt": sentence(int(draw.integers(5, 60))).encode()},
        "pairs": lambda: {"png": image(), "txt": sentence(int(draw.integers(3, 9))).encode()},
    }
    for name, kind in (("text", "text"), ("pairs", "image_text")):
        (folder / name).mkdir(parents=True)
        with webdataset.TarWriter(str(folder / name / "000000.tar"), encoder=False) as writer:
            for number in range(200):
                writer.write({"__key__": f"{number:06d}", **samples[name]()})
        build_index(folder / name, kind=kind)
    train_tokenizer([sentence(2000)], 384, folder / "tokenizer")
    (folder / "ranks.yaml").write_text(_PIPELINE.format(folder=folder, steps=STEPS, saved=SAVED_STEP))
    for name, layout in LAYOUTS.items():
        if layout.resumes:
            checkpoints = folder / "runs" / name / "checkpoints"
            checkpoints.mkdir(parents=True)
            saved = f"step_{SAVED_STEP:08d}"
            (checkpoints / saved).symlink_to(folder / "runs" / layout.resumes / "checkpoints" / saved)


def train_layouts(folder: Path, num_ranks: int) -> None:
    """What a rank does: one layout of as many ranks after another, until one fails."""
    from metalm import cli

    port = int(os.environ["MASTER_PORT"])
    for number, (name, layout) in enumerate(_of_ranks(num_ranks)):
        while layout.resumes and not _ended(folder, layout.resumes).exists():
            time.sleep(0.2)
        if num_ranks > 1:
            os.environ["MASTER_PORT"] = str(port + number)
        began = time.monotonic()
        words = [str(folder / "ranks.yaml"), f"run.name={name}", *layout.overrides]
        sys.argv = ["metalm", "train", *words]
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        if os.environ.get("RANK", "0") == "0":
            content = json.dumps({"rc": code, "seconds": time.monotonic() - began, "nccl": _own_nccl()})
            partial = _ended(folder, name).with_suffix(".partial")
            partial.write_text(content)
            partial.rename(_ended(folder, name))
        if code:
            sys.exit(code)


def _of_ranks(num_ranks: int) -> Iterator[tuple[str, Layout]]:
    return ((name, layout) for name, layout in LAYOUTS.items() if layout.ranks == num_ranks)


def _ended(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _start(
    folder: Path, num_ranks: int, rank: int, nccl: Path | None, on_cpu: bool, port: int
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    environment |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if num_ranks > 1:
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"}
    if nccl is not None:
        environment["LD_PRELOAD"] = str(nccl.resolve())
    command = [sys.executable, __file__, "--out", str(folder), "--train", str(num_ranks)]
    with (folder / f"rank_{rank}_of_{num_ranks}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _missing_nccl(nccl: Path | None) -> str | None:
    """Why two ranks cannot share the GPU."""
    if nccl is not None:
        return None if nccl.is_file() else f"{nccl}, given by --nccl, is not there"
    if (own := _own_nccl()) is None or own >= OLDEST_NCCL:
        return "no GPU" if own is None else None
    version = ".".join(map(str, own))
    return f"torch brings NCCL {version}; two ranks share a GPU from 2.30 on: give such a library by --nccl"


def _own_nccl() -> tuple[int, ...] | None:
    """The version of the loaded library; None where there is no GPU."""
    import torch

    return torch.cuda.nccl.version() if torch.cuda.is_available() else None


def _free_port() -> int:
    """With as many free ones behind it as there are layouts, in all likelihood."""
    while True:
        port = random.randrange(20000, 32000, len(LAYOUTS) + 1)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("ranks_check"), help="folder for data, runs and logs"
    )
    parser.add_argument("--nccl", type=Path, help="libnccl.so.2 of 2.30 or newer, instead of torch's own")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=85, help="end what still trains after so long")
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    if arguments.train:
        train_layouts(folder, arguments.train)
        return
    failed: list[Record] = []

    def keep(record: Record) -> None:
        print(json.dumps(record), flush=True)
        failed.extend([record] * (not record.get("is_fine", False)))

    check_ranks(
        folder, keep, nccl=arguments.nccl, on_cpu=arguments.device == "cpu", seconds=arguments.seconds
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
