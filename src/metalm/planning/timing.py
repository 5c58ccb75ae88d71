"""Seconds of a step from what a rank executes and sends, by a calibration: parts that add up, and a range.

The model: the device's work of a micro-batch is products, attention, elementwise work and the tensor-parallel
sums between them; the host's is a time per layer; the longer of the two counts, and of the shorter what does
not overlap. What ZeRO sends beside the computation is hidden as far as there is computation, and of that as
far as is stated. The slowest rank is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

from metalm.config import RunConfig
from metalm.model.flops import Work
from metalm.planning.calibration import Calibration
from metalm.planning.communication import Traffic
from metalm.planning.devices import DEVICES, Device
from metalm.planning.memory import EnginePlan, element_size
from metalm.planning.work import Executed, MicroBatch, micro_batch_work
from metalm.planning.workload import scaled


@dataclass(frozen=True)
class Setting:
    """All that a time depends on but the calibration."""

    config: RunConfig
    device: Device
    accumulation: int
    data_ranks: int
    work: MicroBatch
    """Of one rank."""
    sources: Sequence[tuple[float, MicroBatch]]
    """Share of the rows, and the work of one row of each source."""
    engines: dict[str, EnginePlan]
    traffic: list[Traffic]


@dataclass(frozen=True)
class Cause:
    """What the range of a step's time hangs on."""

    figure: str
    fast_s: float
    """The step if the figure is at its better limit."""
    slow_s: float


def build_setting(
    config: RunConfig,
    world_size: int,
    device: Device,
    rows: Sequence[tuple[float, Work]],
    mean: Work,
    engines: dict[str, EnginePlan],
    traffic: list[Traffic],
) -> Setting:
    """What the times of a plan follow from.

    Args:
        config: fits on so many ranks.
        world_size: ranks, a device each.
        device: of a rank.
        rows: of each source, its share of the rows and the work of one.
        mean: the work of the mean row.
        engines: of the plan.
        traffic: of the plan.
    """
    data_ranks = world_size // config.parallel.rows_size
    size = config.training.micro_batch_size
    stages = {name: engine.zero.stage for name, engine in engines.items()}
    count = partial(micro_batch_work, config, stages=stages, on_cpu=device is DEVICES["cpu"])
    return Setting(
        config,
        device,
        config.training.global_batch_size // (data_ranks * size),
        data_ranks,
        count(scaled(mean, size), size),
        [(share, count(work, 1)) for share, work in rows],
        engines,
        traffic,
    )


def step_parts(setting: Setting, calibration: Calibration) -> dict[str, float]:
    """Seconds of a step, by part. The parts add up."""
    count = setting.accumulation
    parts = {name: count * s for name, s in _device_parts(setting, setting.work, calibration).items()}
    exposed: dict[str, float] = {}
    overlapped = 0.0
    for part in setting.traffic:
        seconds = _send(part, calibration)
        if part.hidden:
            overlapped += seconds
        else:
            exposed[part.kind] = exposed.get(part.kind, 0.0) + seconds
    in_stream = {kind: seconds for kind, seconds in exposed.items() if kind in IN_STREAM}
    device_s = sum(parts.values()) + sum(in_stream.values())
    host_s = count * _host(setting, calibration)
    parts |= in_stream
    waits = max(host_s - device_s, 0.0) + calibration["host not hidden"] * min(host_s, device_s)
    parts["host"] = waits + calibration["host, step"]
    computing = device_s + waits
    if overlapped:
        hidden = min(overlapped, computing) * calibration["traffic hidden"]
        parts["ZeRO beside the computation, not hidden"] = overlapped - hidden
    parts |= {kind: seconds for kind, seconds in exposed.items() if kind not in IN_STREAM}
    trained = sum(engine.count.trained_per_rank for engine in setting.engines.values())
    added = ADDED_IN_FP32 if setting.config.training.adds_up_in_fp32 else 1
    parts["gradients added up"] = (count + 1) * added * trained * calibration["gradients"]
    parts["optimizer"] = sum(
        engine.count.trained_per_rank
        / engine.shards
        * calibration["update in host memory" if engine.zero.offloads_optimizer else "update"]
        for engine in setting.engines.values()
    )
    parts["waiting for the slowest rank"] = _imbalance(setting, calibration)
    return parts


ADDED_IN_FP32 = 3
"""How much longer it takes to add a bf16 gradient up in fp32: 18 bytes cross the memory, not 6."""
IN_STREAM = ("decoder all-reduces", "gather_encoded", "context exchanges")
"""Traffic between the layers' own work, which the device does in turn with it."""


def step_range(setting: Setting, calibration: Calibration) -> tuple[float, float, list[Cause]]:
    """The least and the greatest seconds of a step, and what they hang on, what matters most first.

    Each figure is put to its limits alone; the deviations are taken to be independent of each other, so the
    ends are the roots of the sums of their squares away.
    """
    expected = sum(step_parts(setting, calibration).values())
    causes = []
    for name in calibration.uncertain():
        fast, slow = (
            sum(step_parts(setting, calibration.at(name, slow=slow)).values()) for slow in (False, True)
        )
        causes.append(Cause(name, fast, slow))
    causes.sort(key=lambda cause: cause.fast_s - cause.slow_s)
    below = math.sqrt(sum((expected - cause.fast_s) ** 2 for cause in causes))
    above = math.sqrt(sum((cause.slow_s - expected) ** 2 for cause in causes))
    return expected - min(below, 0.9 * expected), expected + above, causes


def _device_parts(setting: Setting, work: MicroBatch, calibration: Calibration) -> dict[str, float]:
    parts = {"products": 0.0, "attention": 0.0, "elementwise": 0.0, "output layer": 0.0}
    for name, part in work.parts():
        products = _products(setting, part, calibration)
        elementwise = part.num_bytes / calibration["memory"]
        if name == "output layer":
            parts[name] += products + elementwise
            continue
        parts["products"] += products
        parts["attention"] += _attention(setting, part, calibration)
        parts["elementwise"] += elementwise
    return parts


def _products(setting: Setting, part: Executed, calibration: Calibration) -> float:
    size, slower = element_size(setting.config), _slower(setting, calibration)
    total = 0.0
    for (rows, inner, columns), times in part.products.items():
        seconds = 2 * rows * inner * columns * slower / calibration.product_rate(rows, inner, columns)
        moved = size * (rows * inner + inner * columns + rows * columns) / calibration["memory"]
        total += times * (max(seconds, moved) + calibration["kernel"])
    return total


def _attention(setting: Setting, part: Executed, calibration: Calibration) -> float:
    slower, total = _slower(setting, calibration), 0.0
    for one in part.attention:
        forward, both = calibration.attention_rates(one.mask, one.head_size, one.keys)
        once = one.operations / forward
        backward = max(one.operations * 14 / 4 / both - once, once)
        dropping = calibration["attention, dropout"] if one.is_dropped else 1.0
        total += slower * dropping * (one.forwards * once + one.backwards * backward)
    return total


def _slower(setting: Setting, calibration: Calibration) -> float:
    """How much slower products are than in the precision that was measured."""
    own, measured = setting.config.training.precision, calibration.precision
    if own == measured:
        return 1.0
    ratio = setting.device.peak_tflops / setting.device.fp32_tflops
    return ratio if own == "fp32" else 1 / ratio


def _send(part: Traffic, calibration: Calibration) -> float:
    link = calibration.link(part.group_size, spans_nodes=part.spans_nodes)
    return part.calls * link.latency_s + part.num_bytes / link.bytes_per_s


def _host(setting: Setting, calibration: Calibration) -> float:
    """Seconds of the host per micro-batch."""
    total = calibration["host, micro-step"]
    for name, layers in setting.work.host_layers.items():
        total += layers * calibration[name]
    for name, engine in setting.engines.items():
        if engine.zero.stage == 3:
            total += setting.work.gathers[name] * calibration["host, ZeRO 3 gather"]
    return total


def _imbalance(setting: Setting, calibration: Calibration) -> float:
    """How much later the slowest rank is than the mean, from how rows of different sources differ.

    Ranks wait for each other once a step, or under ZeRO 3 in every micro-batch.
    """
    if setting.data_ranks == 1 or len(setting.sources) == 1:
        return 0.0
    times = [
        (share, sum(_device_parts(setting, work, calibration).values())) for share, work in setting.sources
    ]
    mean = sum(share * seconds for share, seconds in times)
    deviation = math.sqrt(sum(share * (seconds - mean) ** 2 for share, seconds in times))
    ranks = setting.data_ranks
    lead = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    rows, count = setting.config.training.micro_batch_size, setting.accumulation
    if any(engine.zero.stage == 3 for engine in setting.engines.values()):
        waited = count * deviation * math.sqrt(rows)
    else:
        waited = deviation * math.sqrt(rows * count)
    return calibration["imbalance"] * lead * waited
