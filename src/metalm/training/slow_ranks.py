"""Tell which rank holds the others up.

In synchronous training all ranks take equally long for a step, so the slow one shows elsewhere: it is
the one that the others wait for where they agree between steps, that waits for its data, or whose
device takes longer for a fixed piece of work. Ranks are compared in what they all do: of those that work on
the same rows the first alone reads data.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from metalm.parallel.topology import Topology

_MATRIX = {"cuda": 4096, "cpu": 256}
_LEAST_S = {"late": 0.05, "data_wait": 0.05, "probe": 0.005}
"""Differences below this, per step or probe, slow nothing down."""
_LEAST_SHARE = 0.05
"""Nor do differences below this share of a step."""
_REPORTS = 3
"""A rank is named when it has stood out so often in a row: any machine is disturbed now and then."""


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank over the steps since the last report."""

    host: str
    agreeing: float
    """In the agreements between steps: of the rank that comes last, next to none."""
    data_wait: float | None
    """None: it reads no data."""
    probe: float
    """For a fixed piece of work on its device."""


class Comparison:
    """Names the ranks that stand out in several reports in a row."""

    def __init__(self, ratio: float) -> None:
        """Begin; `ratio` times the median over ranks is slow."""
        self._ratio = ratio
        self._standing_out: dict[str, tuple[int, int]] = {}  # by kind: rank, reports in a row

    def compare(
        self, ranks: Sequence[RankTimes], steps: int, seconds: float
    ) -> tuple[dict[str, float], list[str]]:
        """Figures for TensorBoard and a line for each rank that stands out.

        Args:
            ranks: times of all ranks, by rank.
            steps: that they are of.
            seconds: that these steps took, from the first one's start to now.
        """
        longest = max(times.agreeing for times in ranks)
        # Who waited for data came later for it: that is told as such.
        late = {
            rank: max(0.0, longest - times.agreeing - (times.data_wait or 0.0)) / steps
            for rank, times in enumerate(ranks)
        }
        waits = {
            rank: times.data_wait / steps for rank, times in enumerate(ranks) if times.data_wait is not None
        }
        probes = {rank: times.probe for rank, times in enumerate(ranks)}
        figures, lines = {}, []
        for kind, values in (("late", late), ("data_wait", waits), ("probe", probes)):
            usual, rank = statistics.median_low(values.values()), max(values, key=values.__getitem__)
            figures[f"ranks/{kind}_seconds_worst"] = worst = values[rank]
            figures[f"ranks/{kind}_seconds_median"] = usual
            least = _LEAST_S[kind] if kind == "probe" else max(_LEAST_S[kind], _LEAST_SHARE * seconds / steps)
            if self._stands_out_again(kind, rank, worst > self._ratio * usual and worst - usual > least):
                lines.append(
                    f"rank {rank} on {ranks[rank].host} is slow: {_WHAT[kind]} {1000 * worst:.0f} ms, "
                    f"the median rank {1000 * usual:.0f} ms"
                )
        return figures, lines

    def _stands_out_again(self, kind: str, rank: int, stands_out: bool) -> bool:
        if not stands_out:
            self._standing_out.pop(kind, None)
            return False
        before, reports = self._standing_out.get(kind, (rank, 0))
        self._standing_out[kind] = (rank, reports + 1 if before == rank else 1)
        return self._standing_out[kind][1] % _REPORTS == 0


class SlowRanks:
    """Gathers the ranks' times at each report and names those that stand out."""

    def __init__(self, topology: Topology, ratio: float) -> None:
        """Stand by.

        Args:
            topology: of the job.
            ratio: how many times the median over ranks is slow.
        """
        self._topology = topology
        self._comparison = Comparison(ratio)
        self._host = socket.gethostname()
        size = _MATRIX[topology.device.type]
        self._matrix = torch.eye(size, device=topology.device)
        self._agreeing_s = self._data_wait_s = 0.0
        self._steps = 0
        self._began = time.perf_counter()

    def count(self, agreeing_s: float, data_wait_s: float) -> None:
        """Add a step: seconds spent in the agreement before it, and waiting for its data."""
        self._steps += 1
        self._agreeing_s += agreeing_s
        self._data_wait_s += data_wait_s

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Figures for TensorBoard and a line for each rank that stands out, on the first rank.

        Collective: all ranks.
        """
        wait_s = self._data_wait_s if self._topology.rows_rank == 0 else None
        own = RankTimes(self._host, self._agreeing_s, wait_s, self._probe())
        now, steps = time.perf_counter(), max(self._steps, 1)
        seconds, self._began = now - self._began, now
        self._steps, self._agreeing_s, self._data_wait_s = 0, 0.0, 0.0
        gathered: list[Any] = [None] * self._topology.world_size
        dist.gather_object(own, gathered if self._topology.rank == 0 else None)
        return self._comparison.compare(gathered, steps, seconds) if self._topology.rank == 0 else ({}, [])

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
