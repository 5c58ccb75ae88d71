"""Tables of READMEs, made of a committed JSON of `tools/measured/`: `check_gpu.py --table FILE` prints them.

A file holds several calls of `check_gpu.py`; of each section the last call that has figures counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MASKS = ("causal", "packed documents", "semi-causal packed", "encoder")
PEERS = {
    "triton": "triton",
    "flash4": "flash4",
    "flash4 direct": "FlashAttention 4 itself",
    "flash": "variable-length flash",
    "sdpa per document": "SDPA per document",
    "flex": "FlexAttention",
    "flex flash": "FlexAttention (FLASH)",
}
"""Of attention, with the heads of their columns."""

_TOLD = ("deepspeed.", "training.fp32_gradients")
"""Overrides by which settings of one name differ."""

Record = dict[str, Any]


def markdown_tables(path: Path) -> str:
    """All tables that a file has figures for, with a line before each."""
    content = json.loads(path.read_text())
    sections: dict[str, list[Record]] = {}
    for call in content.get("calls", [content]):
        found = {name: section["records"] for name, section in call["sections"].items()}
        sections |= {name: records for name, records in found.items() if records}
    parts = [content["hardware"]] if "hardware" in content else []
    attention = sections.get("attention", []) + sections.get("flex", [])
    if attention:
        parts += ["Attention, ms (TFLOP/s on visible pairs):", attention_table(attention)]
    steps = [record for records in sections.values() for record in records if "tokens_per_s" in record]
    if steps:
        parts += ["Steps:", step_table(steps)]
    if "loss" in sections:
        parts += ["Output layer and loss:", loss_table(sections["loss"])]
    if layouts := [record for record in sections.get("ranks", []) if "layout" in record]:
        parts += ["Two ranks on one GPU, and one:", rank_table(layouts)]
    return "\n\n".join(parts)


def attention_table(records: list[Record]) -> str:
    """A row for each mask, shape and pass, a column for each peer that ran."""
    found: dict[tuple[Any, ...], str] = {
        (
            r["num_heads"],
            r["head_size"],
            r["mask"],
            r["pass"],
            r["peer"],
        ): f"{r['ms']:.2f} ({r['tflops']:.0f})"
        for r in records
        if "ms" in r
    }
    measured = {key[-1] for key in found} - {"interval"}  # which is one of the others, as chosen by itself
    peers: list[str] = [peer for peer in PEERS if peer in measured] + sorted(measured - PEERS.keys())
    shapes = sorted({key[:2] for key in found}, key=lambda shape: -shape[1])
    rows = [
        [mask, f"{heads} x {size}", name, *(found.get((heads, size, mask, name, p), "-") for p in peers)]
        for heads, size in shapes
        for mask in MASKS
        for name in ("forward", "forward + backward")
        if any((heads, size, mask, name, peer) in found for peer in peers)
    ]
    return table(["mask", "heads x size", "pass", *(PEERS.get(peer, peer) for peer in peers)], rows)


def step_table(records: list[Record]) -> str:
    """A row for each setting; the peer's operations are counted as 6 for a parameter and token."""
    rows = [
        [
            r.get("setting", "peer: transformers' GPT-2"),
            ", ".join(word for word in r.get("overrides", []) if word.startswith(_TOLD)) or "-",
            f"{r['tokens_per_s']:,.0f}",
            f"{r.get('tflops', r.get('tflops_by_6n', 0)):.0f}",
            f"{r['utilisation_of_matmul']:.0%}" if "utilisation_of_matmul" in r else "-",
            f"{r['idle_share']:.1%}" if "idle_share" in r else "-",
            f"{r['peak_gib']:.0f}",
        ]
        for r in records
    ]
    heads = ["setting", "with", "tokens/s", "TFLOP/s", "share of a large product", "idle", "peak GiB"]
    return table(heads, rows)


def loss_table(records: list[Record]) -> str:
    """A row for each way of computing it."""
    rows = [[r["loss"], f"{r['ms']:.1f}", f"{r['peak_mib'] / 1024:.1f}"] for r in records]
    return table(["loss", "ms", "peak GiB"], rows)


def rank_table(records: list[Record]) -> str:
    """A row for each layout."""
    rows = [
        [
            r["layout"].replace("_", " "),
            f"{r['last_loss']:.6f}" if "last_loss" in r else "-",
            f"{r['largest_difference']:.1e}" if "largest_difference" in r else r.get("not_run", "failed"),
        ]
        for r in records
    ]
    return table(["layout", "last loss", "largest difference to one rank"], rows)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines
    )
