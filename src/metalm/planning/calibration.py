"""What a plan's times are made of: rates, latencies and the host's own time, each with its source.

A file of them is written by `tools/calibrate.py` and `tools/check_gpu.py` (products, attention, memory,
host) and by `metalm preflight --calibration` (links), and read by `tools/plan_run.py --calibration`. A file
need not hold all: the rest stays as shipped for the device.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high, median_low
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from metalm.errors import ConfigError
from metalm.planning.devices import device_of_name

if TYPE_CHECKING:
    from metalm.parallel.bandwidth import LinkSpeeds

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Figure:
    """One number, and between which limits it may lie."""

    value: float
    low: float
    high: float
    source: str
    """A file of measurements, a data sheet, or that it is assumed."""


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] x [inner, columns] and its measured rate."""

    rows: int
    inner: int
    columns: int
    tflops: float


@dataclass(frozen=True)
class AttentionRate:
    """Attention of one kind of mask: operations over visible pairs, as `tools/bench_attention.py` counts."""

    mask: str
    """`causal`: rows of one document; `packed`: of several; `encoder`: spans that see themselves whole."""
    head_size: int
    forward_tflops: float
    """Of 4 operations a pair and element of the head."""
    both_tflops: float
    """Forward and backward: of 14, for the kernels' backward makes 5 products."""
    keys: float | None = None
    """That a query sees on average, where it was measured; None: the rate holds for any number."""


@dataclass(frozen=True)
class Link:
    """What collectives reach over a group."""

    ranks: int
    spans_nodes: bool
    latency_s: float
    bytes_per_s: float
    """That one rank sends."""


FIGURES = {
    "products": "factor on the rates of matrix products",
    "attention": "factor on the rates of attention",
    "attention, more keys": "keys by which a query costs more than it sees: tiles in part, starts and ends",
    "attention, dropout": "factor on the time of attention that drops weights",
    "links inside nodes": "factor on the bandwidth inside nodes",
    "links between nodes": "factor on the bandwidth between nodes",
    "memory": "bytes per second of elementwise work",
    "kernel": "seconds of a matrix product that the smallest takes",
    "update": "seconds of the optimizer per parameter of a rank's shard",
    "update in host memory": "the same where masters and moments lie there, with the way there and back",
    "gradients": "seconds per trained parameter of a rank to add or move its gradient once",
    "host, decoder layer": "seconds of the host for a layer's forward and backward, kernel by kernel",
    "host, encoder layer": "seconds of the host for a layer's forward and backward, kernel by kernel",
    "host, layer from a graph": "seconds of the host for a layer whose two passes are CUDA graphs",
    "host, ZeRO 3 gather": "seconds of the host for a layer that is gathered once",
    "host, micro-step": "seconds of the host per micro-batch besides the layers",
    "host, step": "seconds of the host per step besides the micro-batches",
    "host not hidden": "share of the lesser of host and device time that does not overlap with the other",
    "traffic hidden": "share of ZeRO's overlapped traffic that computation really hides",
    "imbalance": "factor on the expected lead of the slowest rank",
}
"""Single numbers by name, and what they are."""

_SLOWER_WHEN_HIGH = {
    *(
        "kernel",
        "update",
        "update in host memory",
        "gradients",
        "host, decoder layer",
        "host, encoder layer",
        "host, layer from a graph",
        "host, ZeRO 3 gather",
        "attention, more keys",
        "attention, dropout",
    ),
    *("host, micro-step", "host, step", "host not hidden", "imbalance"),
}


_RATES = ("products", "attention", "links inside nodes", "links between nodes", "memory")
"""What work is divided by."""


@dataclass(frozen=True)
class Calibration:
    """All that turns work into time, of one device."""

    device: str
    precision: str
    """That products were measured in; the other is scaled by the device's peaks."""
    products: tuple[Product, ...]
    attention: tuple[AttentionRate, ...]
    links: tuple[Link, ...]
    figures: dict[str, Figure]
    sources: dict[str, str]
    """Where the tables `products`, `attention` and `links` come from."""

    def __getitem__(self, name: str) -> float:
        """The value of a figure."""
        return self.figures[name].value

    def uncertain(self) -> list[str]:
        """The figures with limits."""
        return [name for name, figure in self.figures.items() if figure.low != figure.high]

    def at(self, name: str, *, slow: bool) -> Calibration:
        """With one figure at its slow or its fast limit."""
        figure = self.figures[name]
        limit = figure.high if slow is (name in _SLOWER_WHEN_HIGH) else figure.low
        return dataclasses.replace(
            self, figures=self.figures | {name: dataclasses.replace(figure, value=limit)}
        )

    def product_rate(self, rows: float, inner: float, columns: float) -> float:
        """Operations per second of a product, between the measured shapes by their sides' logarithms."""
        wanted = _logs(rows, inner, columns)
        rate = _between(
            self.products, lambda p: _distance(_logs(p.rows, p.inner, p.columns), wanted), lambda p: p.tflops
        )
        return rate * 1e12 * self["products"]

    def attention_rates(self, mask: str, head_size: int, keys: float) -> tuple[float, float]:
        """Operations per second of the forward pass, and of forward and backward together.

        Args:
            mask: as in `AttentionRate`.
            head_size: of the heads.
            keys: that a query sees on average.
        """
        of_mask = [rate for rate in self.attention if rate.mask == mask]
        distance, more = _attention_distance(head_size), self["attention, more keys"]

        def between(measured: Callable[[AttentionRate], float]) -> float:
            def here(rate: AttentionRate) -> float:
                alike = 1.0 if rate.keys is None else (1 + more / rate.keys) / (1 + more / keys)
                return measured(rate) * alike

            return _between(of_mask, distance, here) * 1e12 * self["attention"]

        return between(lambda rate: rate.forward_tflops), between(lambda rate: rate.both_tflops)

    def link(self, ranks: int, *, spans_nodes: bool) -> Link:
        """What a group reaches: of the measured group that is nearest in size."""
        alike = [link for link in self.links if link.spans_nodes is spans_nodes] or list(self.links)
        nearest = min(alike, key=lambda link: abs(math.log(link.ranks / ranks)))
        factor = self["links between nodes" if spans_nodes else "links inside nodes"]
        return dataclasses.replace(nearest, bytes_per_s=nearest.bytes_per_s * factor)


def overlay(calibration: Calibration, path: Path) -> Calibration:
    """A calibration with what a file holds in place of its own.

    Raises:
        ConfigError: the file cannot be read, is of another device, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("expected an object")
        known = {"device", "precision", "products", "attention", "links", "figures", "source"}
        if unknown := sorted(content.keys() - known) + sorted(content.get("figures", {}).keys() - FIGURES):
            raise ValueError(f"unknown: {', '.join(unknown)}")
        device = content.get("device", calibration.device)
        precision = content.get("precision", calibration.precision)
        if not isinstance(device, str) or precision not in ("bf16", "fp32"):
            raise ValueError(f"device is {device!r}, precision {precision!r}")
        measured_on = device_of_name(device)
        if measured_on is not None and measured_on != device_of_name(calibration.device):
            raise ValueError(f"measured on {device}, and the plan is of {calibration.device} (--gpu)")
        source = f"{path.name}: {content.get('source', 'measured')}"
        tables: dict[str, Any] = {
            "products": tuple(Product(**entry) for entry in content.get("products", ())),
            "attention": tuple(AttentionRate(**entry) for entry in content.get("attention", ())),
            "links": tuple(Link(**entry) for entry in content.get("links", ())),
        }
        figures = {
            name: Figure(**{"source": source} | entry) for name, entry in content.get("figures", {}).items()
        }
        _check_positive([*tables["products"], *tables["attention"], *tables["links"], *figures.values()])
        for name, figure in figures.items():
            if not figure.low <= figure.value <= figure.high:
                raise ValueError(f"{name} is {figure.value}, not between its low and high")
            if name in _RATES and not figure.low:
                raise ValueError(f"{name} is 0")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no calibration for this: {error}; write one with tools/calibrate.py, "
            "tools/check_gpu.py (its calibration.json) or metalm preflight --calibration"
        ) from None
    changed = {name: table for name, table in tables.items() if table}
    if "attention" in changed:  # masks that were not measured keep their rates
        measured = {rate.mask for rate in changed["attention"]}
        others = tuple(rate for rate in calibration.attention if rate.mask not in measured)
        changed["attention"] = changed["attention"] + others
    if "links" in changed:
        kinds = {link.spans_nodes for link in changed["links"]}
        others_links = tuple(link for link in calibration.links if link.spans_nodes not in kinds)
        changed["links"] = changed["links"] + others_links
    if "products" in changed:
        changed["precision"] = precision
    return dataclasses.replace(
        calibration,
        **changed,
        figures=calibration.figures | figures,
        sources=calibration.sources | {name: source for name, table in tables.items() if table},
    )


def write_links(path: Path, speeds: Sequence[LinkSpeeds], *, ranks_per_node: int) -> None:
    """A calibration of what `metalm preflight` measured of the links: of a node, and of two together."""
    links: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float]] = {}
    for spans_nodes in (False, True):
        bandwidths = [one.across_gib_s if spans_nodes else one.within_gib_s for one in speeds]
        latencies = [one.across_latency_s if spans_nodes else one.within_latency_s for one in speeds]
        known = [speed for speed in bandwidths if speed is not None]
        waits = [latency for latency in latencies if latency is not None]
        if known and waits:
            ranks = ranks_per_node * (2 if spans_nodes else 1)
            link = Link(ranks, spans_nodes, median_high(waits), median_low(known) * 2**30)
            links.append(dataclasses.asdict(link))
            # As large groups fall behind small ones, and large tensors go ahead of small ones.
            name = "links between nodes" if spans_nodes else "links inside nodes"
            figures[name] = {"value": 1.0, "low": 0.75 if spans_nodes else 0.9, "high": 1.1}
    source = f"metalm preflight, {len(speeds)} ranks, medians"
    content = {"source": source, "links": links, "figures": figures}
    path.write_text(json.dumps(content, indent=1) + "\n")


_NEVER_ZERO = ("head_size", "keys", "tflops", "forward_tflops", "both_tflops", "bytes_per_s", "ranks")


def _check_positive(entries: Sequence[Any]) -> None:
    """
    Raises:
        ValueError: a value is of another type than its field, or no number that can be.
    """
    for entry in entries:
        kinds = get_type_hints(type(entry))
        for name, value in dataclasses.asdict(entry).items():
            kind = kinds[name] | int if isinstance(0.0, kinds[name]) else kinds[name]
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{name} is {value!r}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}")
            if name in _NEVER_ZERO and value is not None and not value:
                raise ValueError(f"{name} is 0")


def _logs(*sides: float) -> tuple[float, ...]:
    return tuple(math.log(max(side, 1)) for side in sides)


def _distance(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def _attention_distance(head_size: int) -> Callable[[AttentionRate], float]:
    return lambda rate: math.log(rate.head_size / head_size) ** 2


def _between(
    entries: Sequence[Entry], distance: Callable[[Entry], float], rate: Callable[[Entry], float]
) -> float:
    """The geometric mean of the rates, weighted by the inverse of the fourth power of the distance."""
    total = weights = 0.0
    for entry in entries:
        weight = 1 / (distance(entry) + 1e-6) ** 2
        total += weight * math.log(rate(entry))
        weights += weight
    return math.exp(total / weights)
