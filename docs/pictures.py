"""The pictures of the concepts, drawn when the site is built."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from metalm.data.lanes import owned_lanes

TEXT, IMAGE, PLAIN, TRAINED = "#7aa6c2", "#c2a37a", "#e4e4e4", "#8fbf8f"
matplotlib.rcParams["svg.hashsalt"] = "metalm"  # so that the same picture is the same bytes


def draw_all() -> dict[str, bytes]:
    """All pictures as SVG, by their names."""
    pictures: dict[str, Callable[[], Figure]] = {
        "docking": _docking,
        "documents": _documents,
        "semi_causal": _semi_causal,
        "lanes": _lanes,
        "engines": _engines,
    }
    return {f"{name}.svg": _svg(draw()) for name, draw in pictures.items()}


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, width: float, height: float, colour: str, words: str) -> None:
    shape = FancyBboxPatch(
        (x + 0.04, y + 0.04),
        width - 0.08,
        height - 0.08,
        boxstyle="round,pad=0,rounding_size=0.06",
        fc=colour,
        ec="#555",
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=9)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#555"))


def _docking() -> Figure:
    figure, axes = _canvas(9.2, 3.6)
    _box(axes, 0.4, 1.0, 8.4, 0.7, PLAIN, "causal decoder")
    for x, colour, words in ((1.4, IMAGE, "image encoder"), (5.4, TEXT, "text encoder")):
        _box(axes, x - 0.2, 2.7, 2.0, 0.6, colour, words)
        _box(axes, x, 2.1, 1.6, 0.4, colour, "connector")
        _arrow(axes, (x + 0.8, 2.7), (x + 0.8, 2.5))
        _arrow(axes, (x + 0.8, 2.1), (x + 0.8, 1.7))
    inputs = [PLAIN, IMAGE, IMAGE, IMAGE, IMAGE, PLAIN, PLAIN, TEXT, TEXT, TEXT, PLAIN, PLAIN]
    for number, colour in enumerate(inputs):
        x = 0.4 + 0.7 * number
        _box(axes, x, 0.3, 0.7, 0.4, colour, "token" if colour == PLAIN else "vector")
        _arrow(axes, (x + 0.35, 0.7), (x + 0.35, 1.0))
    return figure


def _documents() -> Figure:
    uses: Sequence[tuple[str, Sequence[tuple[float, str, str]]]] = (
        (
            "pretraining on text",
            (
                (2, TRAINED, "text"),
                (1.4, TEXT, "span"),
                (2, TRAINED, "text"),
                (1.2, TEXT, "span"),
                (1, TRAINED, "text"),
            ),
        ),
        (
            "pretraining on pairs",
            ((1.6, IMAGE, "image"), (1.4, IMAGE, "prefix"), (2, TRAINED, "rest of the caption")),
        ),
        ("finetuning", ((3.4, TEXT, "instruction and input"), (1.2, TRAINED, "answer"))),
        (
            "in context, two shots",
            (
                (1.4, TEXT, "input"),
                (0.8, PLAIN, "label"),
                (1.4, TEXT, "input"),
                (0.8, PLAIN, "label"),
                (1.4, TEXT, "input"),
                (1, TRAINED, "answer"),
            ),
        ),
        (
            "dialogue",
            (
                (1.2, IMAGE, "image"),
                (1.2, IMAGE, "question"),
                (1.2, TRAINED, "answer"),
                (1.6, TEXT, "question"),
                (1.2, TRAINED, "answer"),
            ),
        ),
    )
    figure, axes = _canvas(10, 0.6 * len(uses) + 0.5)
    for row, (use, parts) in enumerate(uses):
        y, x = 0.6 * (len(uses) - row) - 0.1, 2.2
        axes.text(0.1, y + 0.25, use, va="center", fontsize=9)
        for width, colour, words in parts:
            _box(axes, x, y, width, 0.5, colour, words)
            x += width
    legend = (
        (TEXT, "a text encoder reads it"),
        (IMAGE, "an image encoder reads it"),
        (PLAIN, "plain"),
        (TRAINED, "plain, trained on"),
    )
    for number, (colour, words) in enumerate(legend):
        _box(axes, 0.1 + 2.4 * number, 0.05, 0.3, 0.3, colour, "")
        axes.text(0.5 + 2.4 * number, 0.2, words, va="center", fontsize=8)
    return figure


def _semi_causal() -> Figure:
    """12 positions with the span [4, 8), as in the paper's check of the loss."""
    length, start, end = 12, 4, 8
    places = np.arange(length)
    causal = (places[None, :] <= places[:, None]).astype(float)
    encoder = np.zeros((length, length))
    encoder[start:end, start:end] = 1
    trained = (places < length - 1) & ~((places >= start) & (places < end - 1))
    figure = Figure(figsize=(8, 3.6))
    for number, (title, seen, colour) in enumerate(
        (("encoder", encoder, "Blues"), ("decoder", causal, "Greys"))
    ):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.imshow(seen, cmap=colour, vmin=0, vmax=1.6)
        axes.axhspan(start - 0.5, end - 0.5, fc=TEXT, alpha=0.25)
        axes.set_title(f"who sees whom in the {title}", fontsize=9)
        axes.set_xticks(places)
        labels = (
            [f"{place}{' loss' if trained[place] else ''}" for place in places]
            if number
            else [str(p) for p in places]
        )
        axes.set_yticks(places, labels)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("sees position (shaded rows: the span)", fontsize=8)
    figure.subplots_adjust(wspace=0.35)
    return figure


def _lanes() -> Figure:
    lanes, colours = 8, (TEXT, IMAGE, TRAINED, "#b49ac2")
    figure, axes = _canvas(8, 3.2)
    for column, ranks in enumerate((1, 2, 4)):
        axes.text(1.0 + 2.6 * column, 2.95, f"{ranks} data rank{'s' * (ranks > 1)}", ha="center", fontsize=9)
        for rank in range(ranks):
            for lane in owned_lanes(lanes, rank, ranks):
                _box(
                    axes,
                    0.3 + 2.6 * column,
                    2.5 - 0.33 * lane,
                    1.5,
                    0.33,
                    colours[rank],
                    f"lane {lane}: rank {rank}",
                )
    return figure


def _engines() -> Figure:
    figure, axes = _canvas(9, 3.4)
    for rank in range(4):
        x = 0.2 + 2.2 * rank
        axes.text(x + 1.0, 3.2, f"rank {rank}", ha="center", fontsize=9)
        _box(axes, x, 2.2, 2.0, 0.7, TEXT, f"encoders, ZeRO share {rank}")
        _box(axes, x, 0.5, 2.0, 0.7, PLAIN, f"decoder, tensor {rank % 2}, data {rank // 2}")
        _arrow(axes, (x + 0.7, 2.2), (x + 0.7, 1.2))
        _arrow(axes, (x + 1.3, 1.2), (x + 1.3, 2.2))
    axes.text(
        4.5,
        1.7,
        "vectors down, gradients up: exchanged among all ranks",
        ha="center",
        fontsize=9,
        backgroundcolor="white",
    )
    axes.text(
        4.5, 0.2, "the decoder's engine shards its optimizer over the data ranks", ha="center", fontsize=8
    )
    return figure
