"""Measure the data engine beside plain webdataset, StreamingDataset, Energon and litdata, on one corpus.

Rates are medians of several rounds in which all loaders take turns on one core, per second of processor
time, so that other work on the machine does not count; a loader that is not installed is said to be so. Rows
of metalm come with spans, labels, positions and intervals, collated to tensors; the peers' rows are only
packed. Nothing needs a download: the text is Python's standard library, the photographs are drawn.

Example: python tools/bench_data.py --out bench.json
"""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from bench_data_peers import Peer, installed_peers, pack
from PIL import Image
from torch.utils.data import DataLoader

from metalm.cli import ToolParser, run_tool
from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.loader import TrainingData
from metalm.data.preparation.text_shards import prepare_text
from metalm.data.sources import open_source
from metalm.data.storage.index import build_index
from metalm.data.storage.tar import member_header, padding
from metalm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from metalm.modalities.image import decode_image
from metalm.objectives.semi_causal import SemiCausal

LENGTH = 2048
PHOTOGRAPHS = {"512 to 1024 pixels": [(640, 480), (1024, 768), (512, 512)], "256 pixels": [(256, 256)]}
FRACTIONS = (0.01, 0.5, 0.99)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--text-mb", type=float, default=60, help="raw text (default: %(default)s)")
    parser.add_argument(
        "--photographs", type=int, default=300, help="per group of sizes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--million", action="store_true", help="also restore on an index of 1M samples")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON here")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory(prefix="metalm-bench-") as folder:
        results = measure(Path(folder), options.text_mb, options.photographs, options.rounds)
        if options.million:
            results["restore, 1M samples (s)"] = {"metalm": restore_in_a_million(Path(folder))}
    show(results)
    if options.out:
        facts = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine(), "command": sys.argv[1:]}
        options.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


def measure(root: Path, text_mb: float, num_photographs: int, rounds: int) -> dict[str, dict[str, Any]]:
    """All measurements: {what: {loader: number, or a list of them}}."""
    texts = list(standard_library(text_mb))
    train_tokenizer(texts[:1500], 8192, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    documents = [ids.astype("<u2") for ids in tokenizer.encode(texts)]
    photographs = {name: photographs_of(sizes, num_photographs) for name, sizes in PHOTOGRAPHS.items()}
    num_tokens = sum(map(len, documents))
    print(f"{len(documents):,} documents, {num_tokens:,} tokens, {text_mb:g} MB of text", flush=True)

    peers, missing = installed_peers()
    for peer in peers:
        for name, images in photographs.items():
            peer.write(root / peer.name / name, documents, images)
    first = next(iter(PHOTOGRAPHS))
    own, raw = root / "webdataset" / first / "text", root / "raw"
    build_index(own, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
    for name in PHOTOGRAPHS:
        build_index(root / "webdataset" / name / "images", kind="image_text")
    raw.mkdir()
    with webdataset.TarWriter(str(raw / "0.tar"), encoder=False) as writer:
        for number, text in enumerate(texts[:6000]):
            writer.write({"__key__": f"{number:08d}", "txt": text.encode()})
    build_index(raw, kind="text")

    results: dict[str, dict[str, Any]] = {}
    contests: dict[str, dict[str, Callable[[], float]]] = {
        "raw text to shards, MB/s": {
            "metalm": lambda: rate_of_preparation(root, texts),
            "Hugging Face tokenizer": lambda: rate_of_tokenizer(tokenizer, texts),
        },
        "samples/s": {"metalm": lambda: rate_of_samples(own, tokenizer)},
        "packed rows, Mtokens/s": {"metalm": lambda: rate_of_rows(config_of(root, own), 12) / 1e6},
        "rows of raw text, Mtokens/s": {
            "metalm": lambda: rate_of_rows(config_of(root, raw), 2) / 1e6,
            "webdataset": lambda: rate_of_raw_rows(raw, tokenizer) / 1e6,
        },
    }
    for peer in peers:
        folder = root / peer.name / first
        contests["samples/s"][peer.name] = partial(rate_of_documents, peer, folder)
        contests["packed rows, Mtokens/s"][peer.name] = partial(rate_of_packed_documents, peer, folder)
    for name in PHOTOGRAPHS:
        contest = contests[f"photographs of {name} to 224, /s"] = {
            "metalm": partial(rate_of_images, root / "webdataset" / name / "images", tokenizer)
        }
        for peer in peers:
            if peer.images(root / peer.name / name) is not None:
                contest[peer.name] = partial(rate_of_decoded_images, peer, root / peer.name / name)
    for what, contest in contests.items():
        taken: dict[str, list[float]] = {name: [] for name in contest}
        for _ in range(rounds):
            for name, run in contest.items():
                taken[name].append(run())
        results[what] = {name: statistics.median(values) for name, values in taken.items()}
        print(what, {name: f"{value:,.4g}" for name, value in results[what].items()}, flush=True)

    restores: dict[str, list[float | None]] = {
        "metalm": [restore_in(config_of(root, own), len(documents), f) for f in FRACTIONS]
    }
    memory = {"metalm": in_fresh_process("memory_of_worker", root, own)}
    for peer in peers:
        folder = root / peer.name / first
        restores[peer.name] = [peer.restore(folder, fraction) for fraction in FRACTIONS]
        if peer.dataset(folder) is not None:
            memory[peer.name] = in_fresh_process("memory_of_peer", peer.name, folder)
    results["restore at 1%, 50%, 99% (s)"] = restores
    results["memory of a worker (MiB)"] = memory
    results["memory after epochs 1 and 10 (MiB)"] = {"metalm": memory_over_epochs(config_of(root, own))}
    for name in missing:
        for row in results.values():
            row.setdefault(name, "not installed")
    return results


def describe_machine() -> str:
    """The processor, and how busy it is with other work: the load over the last five minutes."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return (
        f"{model or platform.machine()}, one of {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, "
        f"Python {platform.python_version()}"
    )


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints a table with one line per measurement and loader."""
    for what, row in results.items():
        print(f"\n{what}")
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            text = "  ".join(item if isinstance(item, str) else f"{item:,.4g}" for item in values)
            ratio = ""
            if name != "metalm" and isinstance(value, float) and value:
                ratio = f"   metalm / {name} = {row['metalm'] / value:.2f}"
            print(f"  {name:18}{text}{ratio}")


def standard_library(megabytes: float) -> Iterator[str]:
    """Sources of Python's standard library in pieces of 200 to 20,000 characters, repeated as needed."""
    random = np.random.default_rng(0)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    left = megabytes * 1e6
    for path in itertools.cycle(paths):
        text = path.read_text(errors="ignore")
        while text:
            size = int(np.clip(random.lognormal(7.6, 0.9), 200, 20_000))
            yield text[:size]
            left -= size
            text = text[size:]
            if left < 0:
                return


def photographs_of(sizes: list[tuple[int, int]], count: int) -> list[bytes]:
    """JPEGs with the detail of photographs: smooth structure and grain."""
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        width, height = sizes[seed % len(sizes)]
        coarse = random.integers(0, 256, (height // 16, width // 16, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        grain = random.integers(-10, 11, smooth.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def config_of(root: Path, folder: Path, *, lanes: int = 16, workers: int = 0) -> RunConfig:
    """A run on one source of text in the language-only setting."""
    shape = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16}
    source = {"path": folder, "readers": {"text": "text"}}
    return RunConfig.model_validate(
        {
            "run": {"name": "bench"},
            "model": {
                "vocab_size": 8192,
                "decoder": shape,
                "encoders": {"text": {**shape, "max_text_positions": 512}},
            },
            "data": {
                "tokenizer": root / "tokenizer",
                "sequence_length": LENGTH,
                "lanes": lanes,
                "workers": workers,
                "sources": {"text": source},
            },
            "training": {"steps": 1, "global_batch_size": 4 * lanes, "micro_batch_size": 8},
        }
    )


def open_data(config: RunConfig, states: dict | None = None) -> TrainingData:
    """All lanes, on this rank."""
    return TrainingData(Corpus(config), SemiCausal(), dp_rank=0, dp_size=1, tp_size=1, lane_states=states)


def rate_of_documents(peer: Peer, folder: Path) -> float:
    """Of a peer, per second."""
    return rate(peer.documents(folder), lambda _: 1)


def rate_of_packed_documents(peer: Peer, folder: Path) -> float:
    """Of a peer, in millions of tokens per second."""
    return rate(pack(peer.documents(folder), LENGTH), len) / 1e6


def rate_of_decoded_images(peer: Peer, folder: Path) -> float:
    """Of a peer, per second."""
    images = peer.images(folder)
    assert images is not None
    return rate(images, lambda _: 1)


def rate(items: Iterator[Any], amount: Callable[[Any], int]) -> float:
    """Amount per second of processor time, from the first item on."""
    total = 0
    next(items)
    began = time.process_time()
    for item in items:
        total += amount(item)
    return total / (time.process_time() - began)


def rate_of_rows(config: RunConfig, steps: int) -> float:
    """Tokens per second of whole micro-batches."""
    with closing(open_data(config)) as data:
        return rate(itertools.islice(data, steps), lambda batches: sum(b.tokens.numel() for b in batches))


def rate_of_preparation(root: Path, texts: list[str]) -> float:
    """MB of text per second from JSON Lines to shards with an index, all in one process."""
    source, out = root / "raw.jsonl", root / "prepared"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shutil.rmtree(out, ignore_errors=True)
    began = time.process_time()
    report = prepare_text([source], out, root / "tokenizer")
    return report["bytes"] / 1e6 / (time.process_time() - began)


def rate_of_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> float:
    """MB of text per second through the tokenizer alone."""
    sample = texts[:1000]
    began = time.process_time()
    tokenizer.encode(sample)
    return sum(len(text.encode()) for text in sample) / 1e6 / (time.process_time() - began)


def rate_of_raw_rows(folder: Path, tokenizer: Tokenizer) -> float:
    """What a user of webdataset writes: the same tokenizer, then the packer of the peers."""
    samples = webdataset.WebDataset(
        sorted(map(str, folder.glob("*.tar"))), shardshuffle=False, nodesplitter=None
    )
    documents = (tokenizer.encode([sample["txt"].decode()])[0] for sample in samples)
    return rate(pack(documents, LENGTH), len)


def rate_of_samples(folder: Path, tokenizer: Tokenizer) -> float:
    """Documents in random order, found by index, read by byte range and checked."""
    source = open_source("text", folder, tokenizer)
    order = np.random.default_rng(1).permutation(source.index.num_samples)

    def documents() -> Iterator[np.ndarray]:
        for block in np.array_split(order, max(1, len(order) // 256)):
            yield from map(source.token_ids, source.index.locate(block))

    result = rate(documents(), lambda _: 1)
    source.reader.close()
    return result


def rate_of_images(folder: Path, tokenizer: Tokenizer) -> float:
    """Images in the order of the index, decoded and resized."""
    source = open_source("photographs", folder, tokenizer)
    locations = source.index.locate(np.arange(source.index.num_samples))
    data = map(source.main_member, locations)
    result = rate((decode_image(item, image_size=224) for item in data), lambda _: 1)
    source.reader.close()
    return result


def restore_in(config: RunConfig, num_samples: int, fraction: float) -> float:
    """Seconds from opening the data with saved states, that far into an epoch, to the first batches."""
    with closing(open_data(config)) as data:
        next(data)
        states = json.loads(json.dumps(data.lane_states()))
    samples_per_lane = fraction * num_samples / config.data.lanes
    for state in states.values():
        packer = state["sources"]["text"]["packer"]
        packer.update(place=[int(samples_per_lane / config.data.shuffle_window), 3], consumed=1)
    began = time.perf_counter()
    with closing(open_data(config, {int(lane): state for lane, state in states.items()})) as data:
        next(data)
        return time.perf_counter() - began


def restore_in_a_million(root: Path) -> list[float]:
    """`restore_in` on a million documents of 30 tokens, in 64 lanes."""
    folder = root / "million"
    folder.mkdir()
    body = np.full(30, 9, "<u2").tobytes()
    for shard in range(10):
        with (folder / f"{shard}.tar").open("wb") as file:
            for number in range(100_000):
                file.write(member_header(f"{number:08d}.u16", len(body)) + body + padding(len(body)))
            file.write(bytes(1024))
    build_index(folder, kind="text", tokenizer_fingerprint=load_tokenizer(root / "tokenizer").fingerprint)
    return [restore_in(config_of(root, folder, lanes=64), 10**6, fraction) for fraction in FRACTIONS]


def in_fresh_process(function: str, *arguments: object) -> float:
    """Calls a function of this file where a spawned worker does not import this file, as in training."""
    call = f"import bench_data; print(bench_data.{function}(*{tuple(map(str, arguments))}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=True
    )
    return float(run.stdout.splitlines()[-1])


def memory_of_worker(root: str, folder: str) -> float:
    """Private MiB of a worker that has read a while."""
    with closing(open_data(config_of(Path(root), Path(folder), workers=1))) as data:
        for _ in itertools.islice(data, 16):
            pass
        return private_mib(data.worker_ids[0])


def memory_of_peer(name: str, folder: str) -> float:
    """Private MiB of a spawned DataLoader worker of the peer that has read a while."""
    (dataset,) = (peer.dataset(Path(folder)) for peer in installed_peers()[0] if peer.name == name)
    assert dataset is not None
    loader: Any = iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    for _ in itertools.islice(loader, 3000):
        pass
    used = private_mib(loader._workers[0].pid)
    loader._shutdown_workers()
    return used


def memory_over_epochs(config: RunConfig) -> list[float]:
    """Private MiB of this process after the first and after the tenth epoch."""
    found = []
    with closing(open_data(config)) as data:
        for epochs in (1, 10):
            while data.epochs()["text"] < epochs:
                next(data)
            found.append(private_mib(os.getpid()))
    return found


def private_mib(process: int) -> float:
    """Memory that only this process has, in MiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


if __name__ == "__main__":
    sys.exit(run_tool(main))
