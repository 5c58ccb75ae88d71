"""Checks and measures this system on one GPU, from a bare machine: a JSON file and a short table.

python tools/check_gpu.py --out gpu_check                            everything
python tools/check_gpu.py --out gpu_check --sections device tests    parts, by name
python tools/check_gpu.py --table tools/measured/FILE.json           the tables of READMEs, of figures kept

Each section is a process of its own with a limit of time, and writes its figures as it goes: one that fails
or hangs loses nothing of the others. Run it from the repository's root, with `src` on PYTHONPATH.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = {"decoder": "pretrain_language", "language": "pretrain_language"}
PIPELINES |= {"vision_language": "pretrain_vision_language"}
ROWS_AT_ONCE = "training.micro_batch_size=16"
"""Of the vision-language setting, whose rows are short: the share of one of 16 GPUs, in one micro-batch."""
ENCODERS_AT_1 = "deepspeed.encoders=deepspeed_configs/encoders_zero1.json"
LENGTH, BATCH_SIZE, DOCUMENTS = 8192, 4, 8
HEADS = ((32, 64), (16, 128))
KINDS = ("causal", "semi-causal packed", "encoder", "packed documents", "images")
"""Masks, the most telling first: what compiling leaves no time for is then the least."""

LONG = ("kernels", "gaps", "overrides", "steps_s")
"""Figures that the table leaves out, or shows in lines of their own."""

Record = dict[str, Any]
Keep = Callable[[Record], None]
"""Adds a record to a section's figures, on disk at once."""


def device(keep: Keep, arguments: argparse.Namespace) -> None:
    """Versions, and the two ceilings: a large product, a large copy."""
    import deepspeed
    import megatron.core
    import torch
    import transformers
    import triton

    from metalm.kernels.benchmark import interleaved_times, matmul_tflops

    modules = (torch, triton, transformers, deepspeed, megatron.core)
    gpu = torch.device("cuda", 0)
    source = torch.empty(2**31, dtype=torch.uint8, device=gpu).random_()
    target = torch.empty_like(source)
    seconds = interleaved_times({"copy": lambda: target.copy_(source)}, 5, gpu)["copy"]
    properties = torch.cuda.get_device_properties(gpu)
    keep(
        {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "python": sys.version.split()[0],
            "versions": {module.__name__: module.__version__ for module in modules},
            "matmul_tflops": matmul_tflops(gpu, torch.bfloat16),
            "copy_tb_per_s": 2 * source.numel() / seconds / 1e12,
        }
    )


def attention(keep: Keep, arguments: argparse.Namespace) -> None:
    """Our backends beside SDPA, at shapes that fill the chip."""
    from metalm.kernels.benchmark import BACKENDS

    _attention(keep, ("interval", *BACKENDS, "flash4 direct", "sdpa per document"))


def flex(keep: Keep, arguments: argparse.Namespace) -> None:
    """FlexAttention with both of its kernels beside ours, which takes most of its time to compile."""
    _attention(keep, ("interval", "flex", "flex flash"))


def _attention(keep: Keep, peers: tuple[str, ...]) -> None:
    import torch

    from metalm.kernels.benchmark import Case, measure

    for heads, size in reversed(HEADS):
        for kind in KINDS:
            case = Case(kind, LENGTH, DOCUMENTS, BATCH_SIZE, heads, size)
            for backward in (False, True):
                for record in measure(
                    case,
                    device=torch.device("cuda", 0),
                    dtype=torch.bfloat16,
                    backward=backward,
                    peers=peers,
                    repetitions=10,
                    max_dense_length=0,
                ):
                    keep(record)


def host(keep: Keep, arguments: argparse.Namespace) -> None:
    """Microseconds of the host for one call of attention, forward and backward, too short to fill the GPU."""
    import torch

    from metalm.kernels import IntervalMask, interval_attention
    from metalm.kernels.benchmark import BACKENDS

    gpu = torch.device("cuda", 0)
    shape = (1, 256, 16, 64)
    q, k, v, grad = (torch.randn(shape, device=gpu).bfloat16().transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = IntervalMask.causal(256, device=gpu)
    for backend in BACKENDS:
        try:
            interval_attention(q, k, v, mask, backend=backend)
        except ValueError as error:
            keep({"backend": backend, "not_run": str(error)})
            continue
        for count in (20, 200):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(count):
                out = interval_attention(q, k, v, mask, backend=backend)
                torch.autograd.grad(out, inputs, grad)
            seconds = time.perf_counter() - began
            torch.cuda.synchronize()
        keep({"backend": backend, "host_us": seconds / count * 1e6})


def calibration(keep: Keep, arguments: argparse.Namespace) -> None:
    """What plans' times are made of: `calibration.json`, for tools/plan_run.py --calibration."""
    import torch

    from metalm.training.calibrate import calibrate, process_or_wall_clock

    gpu = torch.device("cuda", 0)
    path = arguments.out / "calibration.json"
    source = (
        f"measured {datetime.date.today()} on {torch.cuda.get_device_name(gpu)}, torch {torch.__version__}"
    )
    calibrate(gpu, process_or_wall_clock(own=False), ROOT / "deepspeed_configs", path, source)
    keep({name: figure["value"] for name, figure in json.loads(path.read_text())["figures"].items()})


def tuning(keep: Keep, arguments: argparse.Namespace) -> None:
    """All candidates of the Triton kernels' block sizes."""
    sys.path.insert(0, str(ROOT / "tools"))
    import tune_attention

    sys.argv = ["tune_attention.py", "--out", str(arguments.out / "tuning_attention.json")]
    tune_attention.main()
    for record in json.loads((arguments.out / "tuning_attention.json").read_text()):
        keep(record)


def loss(keep: Keep, arguments: argparse.Namespace) -> None:
    """The output layer with its loss: one micro-batch of the language setting, forward and backward."""
    import torch

    from metalm.kernels import linear_cross_entropy
    from metalm.kernels.benchmark import interleaved_times, peak_memory

    gpu = torch.device("cuda", 0)
    positions, width, vocabulary = 4 * 2048, 2048, 64128
    hidden = torch.randn(positions, width, device=gpu).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=gpu) * width**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (positions,), device=gpu)

    def chunked(chunk_size: int) -> Callable[[], object]:
        def run() -> object:
            losses = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
            return torch.autograd.grad(losses.sum(), (hidden, weight))

        return run

    def plain() -> object:
        logits = torch.nn.functional.linear(hidden, weight)
        return torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), (hidden, weight)
        )

    operations = 6 * positions * width * vocabulary
    runs = {f"ours, chunks of {size}": chunked(size) for size in (1024, 2048, 4096)} | {"plain": plain}
    for name, run in runs.items():
        seconds = interleaved_times({name: run}, 5, gpu)[name]
        record = {"loss": name, "ms": seconds * 1e3, "tflops_of_three_products": operations / seconds / 1e12}
        keep(record | {"peak_mib": peak_memory(run, gpu)})


def fused(keep: Keep, arguments: argparse.Namespace) -> None:
    """The elementwise work of a layer of the language setting, beside PyTorch's operations."""
    import torch

    from metalm.kernels.elementwise_benchmark import measure_elementwise

    for record in measure_elementwise(4 * 2048, 2048, 32, device=torch.device("cuda", 0), repetitions=20):
        keep(record)


def step_section(name: str, *more: str) -> Callable[[Keep, argparse.Namespace], None]:
    """Steps of a pipeline on made-up rows, with more overrides."""

    def section(keep: Keep, arguments: argparse.Namespace) -> None:
        import torch

        from metalm.config.load import load_config
        from metalm.kernels.benchmark import matmul_tflops
        from metalm.training.step_benchmark import measure_steps

        os.chdir(ROOT)
        overrides = ["parallel.tensor=1", "training.global_batch_size=16", "data.lanes=16"]
        overrides += ["training.micro_batch_size=4", *more, *arguments.overrides]
        if name == "decoder":
            overrides += ["model.encoders=null", "data.evaluation=null"]
            overrides += ["data.sources={pile: {path: data/pile/shards/train, readers: {}}}"]
        config = load_config(Path("pipelines") / f"{PIPELINES[name]}.yaml", overrides)
        limit = matmul_tflops(torch.device("cuda", 0), torch.bfloat16)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        figures = measure_steps(config, num_steps=6, matmul_tflops=limit, one_document=name == "decoder")
        keep({"setting": name, "overrides": overrides, **figures})

    section.__doc__ = f"Steps of the setting `{name}`."
    return section


def peer(keep: Keep, arguments: argparse.Namespace) -> None:
    """Transformers' GPT-2 of the decoder's size."""
    out = arguments.out / "peer_gpt2.json"
    subprocess.run([sys.executable, str(ROOT / "tools" / "bench_gpt2.py"), "--out", str(out)], check=True)
    keep(json.loads(out.read_text()))


def tests(keep: Keep, arguments: argparse.Namespace) -> None:
    """The tests that need a GPU."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "12", "-p", "no:cacheprovider"]
    # Other files need packages that a bare machine lacks.
    needing = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    command += map(str, needing)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout[-20000:], result.stderr[-4000:], flush=True)
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    seconds = time.perf_counter() - began
    keep({"rc": result.returncode, "summary": lines[-1:], "failed": failed, "seconds": seconds})


def ranks(keep: Keep, arguments: argparse.Namespace) -> None:
    """Two ranks on this GPU over NCCL, on every layout, against one rank."""
    sys.path.insert(0, str(ROOT / "tools"))
    from check_ranks import check_ranks

    check_ranks(arguments.out / "ranks", keep, nccl=arguments.nccl, on_cpu=False, seconds=85)


SECTIONS: dict[str, tuple[Callable[[Keep, argparse.Namespace], None], int]] = {
    "device": (device, 60),
    "attention": (attention, 90),
    "host": (host, 40),
    "calibration": (calibration, 90),
    "decoder": (step_section("decoder"), 75),
    "peer": (peer, 60),
    "language": (step_section("language"), 90),
    "vision_language": (step_section("vision_language", ROWS_AT_ONCE), 90),
    "language_zero1": (step_section("language", ENCODERS_AT_1), 90),
    "vision_language_zero1": (step_section("vision_language", ROWS_AT_ONCE, ENCODERS_AT_1), 90),
    "language_fp32_gradients": (step_section("language", "training.fp32_gradients=true"), 90),
    "loss": (loss, 30),
    "ranks": (ranks, 110),
    "fused": (fused, 30),
    "tests": (tests, 170),
    "tuning": (tuning, 120),
    "flex": (flex, 150),
}
"""By name, and seconds after which it is ended."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for figures and logs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=480, help="start no section after so long")
    parser.add_argument("--table", type=Path, help="print the tables of a JSON of tools/measured, and stop")
    parser.add_argument("--nccl", type=Path, help="for two ranks on this GPU: see tools/check_ranks.py")
    parser.add_argument("--overrides", nargs="*", default=[], help="`section.key=value` of the steps")
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        sys.path.insert(0, str(ROOT / "tools"))
        from measured_tables import markdown_tables

        print(markdown_tables(arguments.table))
        return
    arguments.out = arguments.out.resolve()  # sections change the folder
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        run_section(arguments.run, arguments)
        return
    began = time.perf_counter()
    for name in arguments.sections:
        left = arguments.seconds - (time.perf_counter() - began)
        told = "not started: no time left" if left <= 0 else start(name, arguments, left)
        print(f"{time.perf_counter() - began:6.0f} s  {name}: {told}", flush=True)
    table = merge(arguments)
    print(table)


def start(name: str, arguments: argparse.Namespace, left: float) -> str:
    """Run a section in a process of its own, and say how it ended."""
    command = [sys.executable, __file__, "--run", name, "--out", str(arguments.out)]
    command += ["--nccl", str(arguments.nccl)] if arguments.nccl else []
    command += ["--overrides", *arguments.overrides]
    began = time.perf_counter()
    with (arguments.out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            rc = process.wait(min(SECTIONS[name][1], left))
            ended = "done" if rc == 0 else f"failed with {rc}, see {name}.log"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            ended = "ended at its limit"
    path = arguments.out / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"records": []}
    content |= {"ended": ended, "seconds": time.perf_counter() - began}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return f"{ended}, {content['seconds']:.0f} s"


def run_section(name: str, arguments: argparse.Namespace) -> None:
    """The section itself; figures are written as each is there."""
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        (arguments.out / f"{name}.json").write_text(json.dumps({"records": records}, indent=1) + "\n")
        print(json.dumps(record), flush=True)

    SECTIONS[name][0](keep, arguments)


def merge(arguments: argparse.Namespace) -> str:
    """All figures in one file, and the table of them."""
    found = {}
    for name in SECTIONS:
        path = arguments.out / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    run = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "sections": found}
    (arguments.out / "check_gpu.json").write_text(json.dumps(run, indent=1) + "\n")
    lines = [line for name, content in found.items() for line in _lines(name, content["records"])]
    return "\n".join(lines)


def _lines(name: str, records: list[Record]) -> list[str]:
    if name in ("attention", "flex"):
        return [_attention_line(record) for record in records]
    if name == "tuning":
        return []
    short = [{key: _round(value) for key, value in record.items() if key not in LONG} for record in records]
    lines = [f"{name}: {json.dumps(record)}" for record in short]
    for record in records:
        for kernel in record.get("kernels", ())[:10]:
            lines.append(f"    {kernel['ms']:8.2f} ms {kernel['calls']:6} x {kernel['name'][:80]}")
    return lines


def _attention_line(record: Record) -> str:
    shape = f"{record['mask']:18} {record['num_heads']:3} x {record['head_size']:3} {record['pass']:19}"
    if "not_run" in record:
        return f"{shape} {record['peer']:18} not run: {record['not_run'][:60]}"
    return f"{shape} {record['peer']:18} {record['ms']:8.2f} ms {record['tflops']:6.0f} TFLOP/s"


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
