"""The curves of a run as pictures, from the figures that it has logged."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from metalm.errors import ConfigError

PANELS: Mapping[str, tuple[str, str | None]] = {
    "Loss": ("loss/", None),
    "Held out": ("held_out/", None),
    "Tasks": ("tasks/", "score"),
    "Learning rate": ("optimizer/learning_rate", ""),
    "Gradient norm": ("optimizer/gradient_norm", ""),
    "Speed": ("speed/tokens_per_second", "tokens a second"),
    "Memory": ("memory/", "GiB"),
}
"""Each with the beginning of its figures' names, and their unit; None: that of the objective's loss."""
MOST_POINTS = 2000


def draw_curves(metrics: Iterable[Mapping[str, Any]], loss_unit: str) -> dict[str, str]:
    """An SVG for each panel that has figures, by its title.

    Args:
        metrics: the lines of a run's metrics file, in order.
        loss_unit: of the run's objective.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for line in metrics:
        for title, (prefix, _) in PANELS.items():
            for name, value in line.items():
                if name.startswith(prefix) and isinstance(value, int | float):
                    label = name.removeprefix(prefix).strip("_/") or title.lower()
                    steps, values = curves.setdefault(title, {}).setdefault(label, ([], []))
                    steps.append(line["step"])
                    values.append(value)
    return {
        title: _draw(title, loss_unit if unit is None else unit, curves[title])
        for title, (_, unit) in PANELS.items()
        if title in curves
    }


def _draw(title: str, unit: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('a report needs matplotlib: pip install "metalm[plot]"') from None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, (steps, values) in curves.items():
        every = -(-len(steps) // MOST_POINTS)
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps[::every], values[::every], label=label, linewidth=1.2, marker=marker, markersize=3)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=7)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
