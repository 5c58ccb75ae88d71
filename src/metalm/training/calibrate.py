"""Measures what a plan's times are made of, on one device: products, attention, memory, the host's time.

Rates come from kernels by themselves. The host's times come from steps of the trainer on models so small that
the device has next to nothing to do, in pairs that differ in one thing: layers, micro-batches, ZeRO's stage;
the gradients' and the optimizer's from one of many weights and few positions.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional

from metalm.config import RunConfig
from metalm.kernels import interval_attention
from metalm.kernels.benchmark import Case
from metalm.objectives import build_objective
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.planning.calibration import Calibration, overlay
from metalm.planning.devices import DEVICES, device_by_driver_name
from metalm.planning.plan import plan_run
from metalm.planning.shipped_calibration import shipped_calibration
from metalm.progress import say
from metalm.regular_files import replace_file
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep
from metalm.training.step_benchmark import made_up_batches

Clock = Callable[[], float]
Record = dict[str, Any]
Measured = TypeVar("Measured")

_MASKS = {"causal": "causal", "packed documents": "packed", "encoder": "encoder"}
_ELEMENTS_MOVED = 17
"""Read and written per element by a norm, an activation and a sum, forward and backward, as plans count."""
_TINY, _WIDE = 32, 512
_LENGTH = 16
_BATCH = 4


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    length: int
    heads: tuple[tuple[int, int], ...]
    """Number and size."""
    documents: int


SIZES = {
    "cuda": Sizes((256, 2048, 8192), (1024, 4096, 8192), 4096, ((32, 64), (16, 128)), 8),
    "cpu": Sizes((64, 256, 1024), (64, 256, 1024), 256, ((4, 64),), 4),
}


def calibrate(device: torch.device, clock: Clock, jsons: Path, path: Path, source: str) -> None:
    """Measure one device and write the calibration.

    Args:
        device: of this process, which runs alone or beside copies of itself.
        clock: seconds.
        jsons: the folder of DeepSpeed files.
        path: of the JSON file, which is written when all is measured.
        source: what was measured, where and when.

    Collective: a process group is opened and closed.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = SIZES[device.type]
    known = device_by_driver_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    listed = known or DEVICES["cpu"]
    content: Record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else listed.name,
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "source": source,
        "products": _told("matrix products", partial(measure_products, device, dtype, sizes, clock)),
        "attention": _told("attention", partial(measure_attention, device, dtype, sizes, clock)),
        "figures": _told("memory", partial(measure_memory, device, dtype, clock)),
    }
    # How far a shape or a mask lies off what is between the measured ones.
    content["figures"] |= {"products": _about(1.0, 0.08), "attention": _about(1.0, 0.15)}
    steps = _told("steps", partial(measure_steps, device, clock, jsons))
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels.json"
        kernels.write_text(json.dumps(content))
        content["figures"] |= solve_steps(steps, overlay(shipped_calibration(listed), kernels))
    replace_file(path, json.dumps(content, indent=1))


def _told(what: str, measure: Callable[[], Measured]) -> Measured:
    """Said before and behind, and not meanwhile: nothing else is to run beside what is timed."""
    began = time.monotonic()
    say(f"measuring {what}, which may take minutes")
    measured = measure()
    say(f"measured {what} in {time.monotonic() - began:.0f} s")
    return measured


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, clock: Clock
) -> dict[str, float]:
    """Median seconds of each, taking turns, after two rounds that do not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            _wait(device)
            began = clock()
            run()
            _wait(device)
            if number >= 2:
                found[name].append(clock() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure_products(device: torch.device, dtype: torch.dtype, sizes: Sizes, clock: Clock) -> list[Record]:
    """The rate of each shape, over the three forms that a linear layer multiplies in."""
    found = []
    shapes = {(m, k, n) for m in sizes.rows for k in sizes.widths for n in sizes.widths}
    shapes |= {(k, m, n) for m, k, n in shapes}  # of weights' gradients
    for rows, inner, columns in sorted(shapes):
        one = torch.randn(rows, inner, device=device).to(dtype)
        other = torch.randn(inner, columns, device=device).to(dtype)
        forms = {"forward": (one, other.T.contiguous().T), "input": (one, other)}
        forms["weight"] = (one.T.contiguous().T, other)
        runs = {name: partial(torch.matmul, *pair) for name, pair in forms.items()}
        operations = 2 * rows * inner * columns
        rounds = max(5, min(40, int(4e9 / operations))) if device.type == "cpu" else 10
        seconds = sum(interleaved(runs, rounds, device, clock).values()) / 3
        found.append(
            {"rows": rows, "inner": inner, "columns": columns, "tflops": operations / seconds / 1e12}
        )
    return found


def measure_attention(device: torch.device, dtype: torch.dtype, sizes: Sizes, clock: Clock) -> list[Record]:
    """The rates of our attention by kind of mask and head size."""
    found = []
    for kind, name in _MASKS.items():
        for heads, size in sizes.heads:
            case = Case(kind, sizes.length, sizes.documents, _BATCH, heads, size)
            mask = case.mask(device)
            shape = (_BATCH, sizes.length, heads, size)
            drawn = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(4)]
            inputs, gradient = [x.requires_grad_() for x in drawn[:3]], drawn[3]

            def both(inputs: Any = inputs, mask: Any = mask, gradient: Any = gradient) -> object:
                query, key, value = inputs
                attended = interval_attention(query, key, value, mask)
                return torch.autograd.grad(attended, inputs, gradient)

            def forward(inputs: Any = inputs, mask: Any = mask) -> object:
                with torch.no_grad():
                    query, key, value = inputs
                    return interval_attention(query, key, value, mask)

            seconds = interleaved({"forward": forward, "both": both}, 10, device, clock)
            elements = int(mask.visible_pairs().sum()) * _BATCH * heads * size / 1e12
            rates = {"forward_tflops": 4 * elements / seconds["forward"]}
            rates["both_tflops"] = 14 * elements / seconds["both"]
            found.append({"mask": name, "head_size": size, **rates})
    return found


def measure_memory(device: torch.device, dtype: torch.dtype, clock: Clock) -> Record:
    """Bytes per second of elementwise work, and seconds of the smallest product."""
    shape = (8192, 4096) if device.type == "cuda" else (512, 512)
    value = torch.randn(shape, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(shape, device=device).to(dtype)

    def elementwise() -> object:
        out = value + functional.gelu(functional.layer_norm(value, shape[1:]))
        return torch.autograd.grad(out, value, gradient)

    small = torch.randn(8, 8, device=device).to(dtype)

    def products() -> object:
        return [small @ small for _ in range(100)]

    seconds = interleaved({"elementwise": elementwise, "products": products}, 20, device, clock)
    rate = _ELEMENTS_MOVED * value.numel() * value.element_size() / seconds["elementwise"]
    return {"memory": _about(rate, 0.15), "kernel": _about(seconds["products"] / 100, 0.3)}


@dataclass(frozen=True)
class Steps:
    """Median seconds of steps, by case; each with one micro-batch and with `COUNT`."""

    seconds: dict[tuple[str, int], float]
    configs: dict[str, RunConfig]

    COUNT = 4

    def per_micro_batch(self, case: str) -> float:
        """Seconds that one micro-batch more takes."""
        return (self.seconds[case, self.COUNT] - self.seconds[case, 1]) / (self.COUNT - 1)

    def per_step(self, case: str) -> float:
        """Seconds of a step without its micro-batches."""
        return self.seconds[case, 1] - self.per_micro_batch(case)


_CASES: dict[str, dict[str, Any]] = {
    "few layers": {"layers": 2},
    "more layers": {"layers": 6},
    "few encoder layers": {"layers": 2, "encoder_layers": 2},
    "more encoder layers": {"layers": 2, "encoder_layers": 6},
    "gathered encoder": {"layers": 2, "encoder_layers": 6, "stage": 3},
    "many weights": {"layers": 2, "width": _WIDE},
}
_GRAPH_CASES: dict[str, dict[str, Any]] = {
    "few layers from graphs": {"layers": 2, "from_graphs": True},
    "more layers from graphs": {"layers": 6, "from_graphs": True},
}
"""Where there are graphs."""


def measure_steps(device: torch.device, clock: Clock, jsons: Path) -> Steps:
    """Time steps of the trainer on small models, in turns.

    Collective: a process group is opened and closed.
    """
    open_process_group(find_launch(os.environ), 3)
    topology = build_topology(1, device)
    try:
        runs: dict[str, Callable[[], object]] = {}
        configs: dict[str, RunConfig] = {}
        for name, case in (_CASES | (_GRAPH_CASES if device.type == "cuda" else {})).items():
            for count in (1, Steps.COUNT):
                configs[name] = config = _config(jsons, count, device, **case)
                runs[f"{name}/{count}"] = _step(config, topology)
        found = interleaved(runs, 15, device, clock)
        seconds = {(name.split("/")[0], int(name.split("/")[1])): s for name, s in found.items()}
        return Steps(seconds, configs)
    finally:
        close_topology()


def solve_steps(steps: Steps, calibration: Calibration) -> Record:
    """The host's times, the gradients' and the optimizer's, from pairs of cases."""
    layers = (steps.per_micro_batch("more layers") - steps.per_micro_batch("few layers")) / 4
    encoder = (steps.per_micro_batch("more encoder layers") - steps.per_micro_batch("few encoder layers")) / 4
    gathered = steps.per_micro_batch("gathered encoder") - steps.per_micro_batch("more encoder layers")
    micro_step = steps.per_micro_batch("few layers") - 2 * layers
    step = steps.per_step("few layers")
    wide = plan_run(steps.configs["many weights"], 1, DEVICES["cpu"], calibration)
    trained = wide.engines["decoder"].count.trained_per_rank
    products = (wide.parts_s["products"] + wide.parts_s["output layer"]) / wide.accumulation
    gradients = (
        steps.per_micro_batch("many weights") - steps.per_micro_batch("few layers") - products
    ) / trained
    update = (steps.per_step("many weights") - step) / trained - gradients
    floor = 1e-12
    of_graphs: Record = {}
    if _GRAPH_CASES.keys() <= steps.configs.keys():
        few, more = map(steps.per_micro_batch, _GRAPH_CASES)
        of_graphs["host, layer from a graph"] = _about(max((more - few) / 4, floor), 0.3)
    return of_graphs | {
        "host, decoder layer": _about(max(layers, floor), 0.15),
        "host, encoder layer": _about(max(encoder, floor), 0.15),
        "host, ZeRO 3 gather": _about(max(gathered / 12, floor), 0.2),
        "host, micro-step": _about(max(micro_step, floor), 0.2),
        "host, step": _about(max(step, floor), 0.2),
        "gradients": _about(max(gradients, floor), 0.2),
        "update": _about(max(update, floor), 0.2),
    }


def _step(config: RunConfig, topology: Topology) -> Callable[[], object]:
    with contextlib.redirect_stdout(io.StringIO()):
        engines = build_engines(config, topology)
    guard = StepGuard(config.guards, config.data.sources, topology.device)
    step = TrainStep(engines, topology, len(config.data.sources), guard, build_objective(config))
    batches = made_up_batches(config, one_document=True)
    return lambda: step.run(batches, 1e-5)


def _config(
    jsons: Path,
    micro_batches: int,
    device: torch.device,
    *,
    layers: int,
    width: int = _TINY,
    encoder_layers: int = 0,
    stage: int = 1,
    from_graphs: bool = False,
) -> RunConfig:
    readers = {"text": "text"} if encoder_layers else {}
    encoders = {
        "text": {"num_layers": encoder_layers, "hidden_size": _TINY, "num_heads": 2, "max_text_positions": 8}
    }
    return RunConfig.model_validate(
        {
            "run": {"name": "calibration"},
            "deepspeed": {
                "decoder": jsons / "decoder_zero1.json",
                "encoders": jsons / f"encoders_zero{stage}.json",
            },
            "model": {
                "vocab_size": 64,
                "decoder": {"num_layers": layers, "hidden_size": width, "num_heads": 2},
                "encoders": encoders if encoder_layers else {},
            },
            "data": {
                "tokenizer": "unused",
                "sequence_length": _LENGTH,
                "lanes": 1,
                "spans": {"fraction": 0.5, "min_length": 7, "max_length": 8},
                "sources": {"text": {"path": "unused", "readers": readers}},
            },
            "training": {
                "steps": 100,
                "global_batch_size": micro_batches,
                "micro_batch_size": 1,
                "precision": "bf16" if device.type == "cuda" else "fp32",
                "cuda_graphs": from_graphs,
                "schedule": {"warmup_steps": 1},
            },
        }
    )


def process_or_wall_clock(*, own: bool) -> Clock:
    """Seconds of the clock on the wall, or of the processor's own work for this process."""
    return time.process_time if own else time.perf_counter


def _about(value: float, share: float) -> Record:
    return {"value": value, "low": (1 - share) * value, "high": (1 + share) * value}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
