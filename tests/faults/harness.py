"""Break the ranks of a real run on schedule, and read what the run has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed.ranks import Ranks
from metalm.checkpoint.manifest import read_manifest
from metalm.checkpoint.names import list_checkpoints
from metalm.run_metrics import read_metrics

Fault = tuple[str, dict[str, Any]]
"""Name of a function in `injected`, and its arguments."""


def start_ranks(arguments: list[str], num_ranks: int, fault: Fault | None = None) -> Ranks:
    """Start `metalm ARGUMENTS` on ranks, with a fault injected into them."""
    if fault is None:
        return Ranks(["-m", "metalm", *arguments], num_ranks)
    return Ranks(["-m", "faults.injected", json.dumps(fault), *arguments], num_ranks)


def figures(run: Path, name: str) -> dict[int, float]:
    """A figure of `metrics.jsonl` by step; every step only once."""
    entries = [entry for entry in read_metrics(run) if name in entry]
    found = {entry["step"]: entry[name] for entry in entries}
    assert len(found) == len(entries), f"{name} was written twice for a step"
    return found


def content_of_newest(run: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint's tensors and lane states."""
    records = read_manifest(list_checkpoints(run / "checkpoints")[-1])
    return {name: record.sha256 for name, record in records.items() if "/" in name}


def state_of_newest(run: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint."""
    return json.loads((list_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
