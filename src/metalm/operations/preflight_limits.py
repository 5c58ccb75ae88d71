"""What a node must have before a run starts on it, and which nodes have not. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_high, median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line knows the limits, but must answer at once
    from metalm.operations.node_report import NodeReport


@dataclass(frozen=True)
class Limits:
    """What `metalm preflight` asks of each node. A limit of 0 asks for nothing."""

    gpus: int = field(default=0, metadata={"help": "GPUs of a node, at least"})
    gpu_gib: float = field(default=0.0, metadata={"help": "memory of each GPU, at least"})
    gpu_used_gib: float = field(
        default=4.0, metadata={"help": "memory of a GPU that others may hold, at most"}
    )
    gpu_celsius: float = field(default=90.0, metadata={"help": "temperature of a GPU, at most"})
    free_gib: float = field(default=1.0, metadata={"help": "free on the run folder's disk, at least"})
    write_mib_s: float = field(default=5.0, metadata={"help": "writing speed at the run folder, at least"})
    open_files: float = field(
        default=4096, metadata={"help": "files that a process may have open (ulimit -Hn), at least"}
    )
    clock_s: float = field(default=1.0, metadata={"help": "difference to most nodes' clocks, at most"})
    within_gib_s: float = field(default=0.0, metadata={"help": "all-reduce within a node, at least"})
    across_gib_s: float = field(default=0.0, metadata={"help": "all-reduce with a neighbour, at least"})


def find_problems(reports: Sequence[NodeReport], limits: Limits) -> dict[str, list[str]]:
    """What is wrong with each node, by name; nodes without a problem are left out.

    Where nodes differ in a version, those that differ from most are wrong; of two equal camps, the one that
    the first node is not in, since the job's batch script has run there.
    """
    usual_clock = _usual_clock(reports)
    problems = {report.node: _own_problems(report, limits, usual_clock) for report in reports}
    collected = [report for report in reports if report.versions]
    for name in sorted({name for report in collected for name in report.versions}):
        values = [report.versions.get(name, "absent") for report in collected]
        usual = Counter(values).most_common(1)[0][0]  # of equal counts, the value met first
        for report, value in zip(collected, values, strict=True):
            if value != usual:
                problems[report.node].append(f"{name} is {value}, elsewhere {usual}")
    return {node: found for node, found in problems.items() if found}


def _usual_clock(reports: Sequence[NodeReport]) -> float:
    """What most clocks are by that of the first node, seconds; of two, the first node's is taken as right."""
    clocks = [report.clock_s for report in reports if report.clock_s is not None]
    return min((median_low(clocks), median_high(clocks)), key=abs) if clocks else 0.0


def _own_problems(report: NodeReport, limits: Limits, usual_clock: float) -> list[str]:
    found = list(report.faults)
    if len(report.gpus) < limits.gpus:
        found.append(f"{len(report.gpus)} GPUs, expected {limits.gpus:g}")
    for number, gpu in enumerate(report.gpus):
        if gpu.total_gib is not None and gpu.total_gib < limits.gpu_gib:
            found.append(f"GPU {number} has {gpu.total_gib:.1f} GiB, expected {limits.gpu_gib:g}")
        if limits.gpu_used_gib and gpu.used_gib is not None and gpu.used_gib > limits.gpu_used_gib:
            found.append(f"{gpu.used_gib:.1f} GiB of GPU {number} are in use before the run")
        if limits.gpu_celsius and (gpu.celsius or 0.0) > limits.gpu_celsius:
            found.append(f"GPU {number} has {gpu.celsius:.0f} degrees, at most {limits.gpu_celsius:g}")
    for value, least, what in (
        (report.free_gib, limits.free_gib, "GiB are free at the run folder"),
        (report.write_mib_s, limits.write_mib_s, "MiB/s are written at the run folder"),
        (report.within_gib_s, limits.within_gib_s, "GiB/s all-reduce within the node"),
        (report.across_gib_s, limits.across_gib_s, "GiB/s all-reduce with its neighbours"),
    ):
        if value is not None and value < least:
            found.append(f"{value:.2f} {what}, expected {least:g}")
    if report.open_files is not None and report.open_files < limits.open_files:
        found.append(
            f"a process may have {report.open_files} files open (ulimit -Hn), expected {limits.open_files:g}"
        )
    if limits.clock_s and report.clock_s is not None:
        off = report.clock_s - usual_clock
        if abs(off) > limits.clock_s:
            found.append(f"its clock is {off:+.2f} s off, at most {limits.clock_s:g}")
    return found


def draw_table(reports: Sequence[NodeReport], problems: dict[str, list[str]]) -> str:
    """A line per node with its figures and what is wrong, then the versions that most nodes have."""
    heads = ("node", "GPUs", "GiB used/all", "max C", "free GiB", "MiB/s", "clock s", "within", "across", "")
    rows = [heads]
    for report in reports:
        sizes = [(g.used_gib, g.total_gib) for g in report.gpus if None not in (g.used_gib, g.total_gib)]
        hottest = max((gpu.celsius for gpu in report.gpus if gpu.celsius is not None), default=None)
        rows.append(
            (
                report.node,
                str(len(report.gpus)),
                "{:.1f}/{:.1f}".format(*max(sizes)) if sizes else "-",
                _shown(hottest, 0),
                _shown(report.free_gib, 1),
                _shown(report.write_mib_s, 0),
                _shown(report.clock_s, 3),
                _shown(report.within_gib_s, 2),
                _shown(report.across_gib_s, 2),
                "; ".join(problems.get(report.node, [])) or "ok",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads) - 1)]
    lines = ["  ".join([*map(str.rjust, row, widths), row[-1]]).rstrip() for row in rows]
    collected = [report.versions for report in reports if report.versions]
    usual = [
        f"{name} {Counter(versions.get(name, 'absent') for versions in collected).most_common(1)[0][0]}"
        for name in sorted(set().union(*collected))
    ]
    return "\n".join([*lines, "(within and across: all-reduce, GiB/s)", "versions: " + ", ".join(usual)])


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
