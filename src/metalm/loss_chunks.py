"""How many positions' logits are in memory at once: the loss computes by it, and a plan counts it."""

from __future__ import annotations


def chunk_positions(num_rows: int, itemsize: int, *, on_cpu: bool) -> int:
    """Positions per chunk: their logits, of a weight of `num_rows`, take a gibibyte, on CPU a quarter."""
    return max(1, (2**28 if on_cpu else 2**30) // (num_rows * itemsize))
