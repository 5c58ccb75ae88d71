"""Pictures of the report: scores with their intervals, learning curves, and scores by number of examples."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalm.errors import ConfigError
from metalm.reproduction.claim import Series
from metalm.reproduction.results import ClaimResults

_COLOURS = (
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d"),
    *("#72b7b2", "#b0b0b0", "#eeca3b", "#17324f", "#ff9da6", "#5a7d2a"),
)
"""Of arms, the same in all parts of a picture."""
_ACROSS = 2
"""Claims beside each other."""
_LETTERS = 46
"""Of a line that says what an arm is."""


def draw_claim(results: ClaimResults, path: Path) -> None:
    """One picture of a claim.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    parts = [_draw_scores]
    parts += [_draw_examples] if results.claim.curves else []
    parts += [_draw_losses] if results.figures.curves else []
    figure = _figure(6.4 * len(parts), 4.4)
    for axes, draw in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        draw(axes, results)
    figure.suptitle(f"{results.claim.letter}: {results.claim.title} - {results.verdict}", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_all(results: Sequence[ClaimResults], path: Path) -> None:
    """The scores of all claims.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    across = min(_ACROSS, len(results))
    down = -(-len(results) // across)
    figure = _figure(7.2 * across, 4.2 * down)
    places = figure.subplots(down, across, squeeze=False).flat
    for axes, one in zip(places, results, strict=False):
        _draw_scores(axes, one)
        axes.set_title(f"{one.claim.letter}: {one.claim.title} - {one.verdict}", fontsize=9)
    for axes in places[len(results) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=90)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('the pictures need matplotlib: pip install "metalm[plot]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def _colours(results: ClaimResults) -> dict[str, str]:
    return {arm.name: _COLOURS[n % len(_COLOURS)] for n, arm in enumerate(results.claim.arms)}


def _draw_scores(axes: Any, results: ClaimResults) -> None:
    series = [one for one in results.claim.series() if one in results.measured]
    colours = _colours(results)
    for place, one in enumerate(series):
        scores = results.measured[one].scores
        reach = 100 * scores.half_width if scores.count > 1 else 0.0
        axes.errorbar(
            [100 * scores.mean],
            [place],
            xerr=[reach],
            fmt="o",
            color=colours[one.arm.name],
            capsize=3,
        )
    axes.set_yticks(range(len(series)), [_label(one) for one in series], fontsize=7)
    axes.set_ylim(len(series) - 0.5, -0.5)
    for check in results.claim.chance:
        axes.axvline(100 * check.chance, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel(f"{results.claim.metric}, %: mean and 95% interval over seeds", fontsize=8)


def _label(series: Series) -> str:
    arm = series.arm
    asked = f" ({series.scoring})" if len(arm.scorings) > 1 else ""
    return textwrap.fill(arm.about + asked, _LETTERS)


def _draw_examples(axes: Any, results: ClaimResults) -> None:
    colours = _colours(results)
    for curve in results.claim.curves:
        points = [
            (count, results.measured[one].scores) for count, one in curve.points if one in results.measured
        ]
        reach = [100 * scores.half_width if scores.count > 1 else 0.0 for _, scores in points]
        axes.errorbar(
            [count for count, _ in points],
            [100 * scores.mean for _, scores in points],
            yerr=reach,
            marker="o",
            capsize=3,
            label=curve.about,
            color=colours[curve.points[-1][1].arm.name],
        )
    axes.set_xscale("log")
    axes.set_xlabel("examples of training", fontsize=8)
    axes.set_ylabel(f"{results.claim.metric}, %", fontsize=8)
    axes.legend(fontsize=7)


def _draw_losses(axes: Any, results: ClaimResults) -> None:
    colours = _colours(results)
    for curve in results.figures.curves:
        axes.plot(curve.steps, curve.losses, label=curve.arm, color=colours[curve.arm])
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("held-out loss of the answers", fontsize=8)
    axes.legend(fontsize=6)
