"""Tell which rank holds the others up.

In synchronous training all ranks take equally long for a step, so the slow one shows elsewhere: it is
the one that the others wait for where they agree between steps, that waits for its data, or whose
device takes longer for a fixed piece of work.
"""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from metalm.parallel.topology import Topology

_MATRIX = {"cuda": 4096, "cpu": 256}
_LEAST_S = 0.02
"""Differences below this, per step, slow nothing down."""
_REPORTS = 3
"""A rank is named when it has stood out so often in a row: any machine is disturbed now and then."""


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank over the steps since the last report."""

    host: str
    late: float
    """How much later than the first rank it came to the agreements between steps."""
    data_wait: float
    probe: float
    """For a fixed piece of work on its device."""


class SlowRanks:
    """Gathers the ranks' times at each report and names those that stand out."""

    def __init__(self, topology: Topology, ratio: float) -> None:
        """Stand by.

        Args:
            topology: of the job.
            ratio: how many times the median over ranks is slow.
        """
        self._topology, self._ratio = topology, ratio
        self._host = socket.gethostname()
        size = _MATRIX[topology.device.type]
        self._matrix = torch.eye(size, device=topology.device)
        self._agreeing_s = self._data_wait_s = 0.0
        self._steps = 0
        self._standing_out: dict[str, tuple[int, int]] = {}  # by kind: rank, reports in a row

    def count(self, agreeing_s: float, data_wait_s: float) -> None:
        """Add a step: seconds spent in the agreement before it, and waiting for its data."""
        self._steps += 1
        self._agreeing_s += agreeing_s
        self._data_wait_s += data_wait_s

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Figures for TensorBoard and a line for each rank that stands out, on the first rank.

        Collective: all ranks.
        """
        own = (self._host, self._agreeing_s, self._data_wait_s, self._probe())
        steps, self._steps, self._agreeing_s, self._data_wait_s = max(self._steps, 1), 0, 0.0, 0.0
        gathered: list[Any] = [None] * self._topology.world_size
        dist.gather_object(own, gathered if self._topology.rank == 0 else None)
        if self._topology.rank != 0:
            return {}, []
        longest = max(agreeing for _, agreeing, _, _ in gathered)
        ranks = [RankTimes(host, longest - agreeing, wait, probe) for host, agreeing, wait, probe in gathered]
        figures, lines = {}, []
        for kind in ("late", "data_wait", "probe"):
            values = [getattr(times, kind) / (1 if kind == "probe" else steps) for times in ranks]
            usual, worst = statistics.median_low(values), max(values)
            figures[f"ranks/{kind}_seconds_worst"] = worst
            figures[f"ranks/{kind}_seconds_median"] = usual
            if self._stands_out_again(kind, values.index(worst), worst, usual):
                rank = values.index(worst)
                lines.append(
                    f"rank {rank} on {ranks[rank].host} is slow: {_WHAT[kind]} {1000 * worst:.0f} ms, "
                    f"the median rank {1000 * usual:.0f} ms"
                )
        return figures, lines

    def _stands_out_again(self, kind: str, rank: int, worst: float, usual: float) -> bool:
        if worst <= self._ratio * usual or worst - usual <= _LEAST_S:
            self._standing_out.pop(kind, None)
            return False
        before, reports = self._standing_out.get(kind, (rank, 0))
        self._standing_out[kind] = (rank, reports + 1 if before == rank else 1)
        return self._standing_out[kind][1] % _REPORTS == 0

    def _probe(self) -> float:
        """Seconds for a fixed number of products; the best of three, since the machine may be disturbed."""
        taken = []
        for _ in range(3):
            self._wait()
            began = time.perf_counter()
            for _ in range(4):
                self._matrix @ self._matrix
            self._wait()
            taken.append(time.perf_counter() - began)
        return min(taken)

    def _wait(self) -> None:
        if self._topology.device.type == "cuda":
            torch.cuda.synchronize(self._topology.device)


_WHAT = {
    "late": "it comes to a step late by",
    "data_wait": "it waits for data for",
    "probe": "its device takes for a fixed product",
}
