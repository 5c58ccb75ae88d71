"""A stacked bar plot: bytes per rank by kind, one bar per layout, and the device's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalm.errors import ConfigError
from metalm.outputs import writing
from metalm.planning.memory import KINDS
from metalm.planning.plan import Plan
from metalm.planning.report import GIB

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b0b0b0", "#e45756")


def plot_memory(plans: Sequence[Plan], path: Path) -> None:
    """Write the picture of some layouts of one run.

    Raises:
        ConfigError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "metalm[plot]"') from None
    figure = Figure(figsize=(3 + 1.1 * len(plans), 5.5), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(plans)
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        heights = [plan.bytes_by_kind[kind] / GIB for plan in plans]
        axes.bar(range(len(plans)), heights, bottom=bottoms, label=kind, color=colour, width=0.7)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(plans[0].limit_bytes / GIB, color="black", linestyle="--", linewidth=1, label="usable")
    axes.set_xticks(range(len(plans)), [_label(plan) for plan in plans], fontsize=8)
    axes.set_ylabel("GiB per rank")
    run, device = plans[0].config.run.name, plans[0].device.name
    axes.set_title(f"{run} on {plans[0].world_size} x {device}", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        with writing(path, "name another file with --plot"):
            figure.savefig(path, dpi=120)
    except ValueError as error:  # matplotlib knows no such kind of picture
        raise ConfigError(f"--plot {path}: {error}") from None


def _label(plan: Plan) -> str:
    config = plan.config
    stages = ",".join(str(engine.zero.stage) for engine in plan.engines.values())
    recomputed = {True: "\nrecompute", "selective": "\nselective"}
    again = recomputed.get(config.model.decoder.recompute, "")
    return (
        f"TP {config.parallel.tensor} DP {plan.world_size // config.parallel.rows_size}\n"
        f"micro {config.training.micro_batch_size}\nZeRO {stages}{again}\n{plan.step_s:.2f} s"
    )
