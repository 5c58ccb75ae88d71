"""`metalm preflight RUN`: whether the nodes of a job are fit for a run, checked before its first step.

A rank for each GPU, started like those of the run. They meet at a store alone at first, so that a node
which cannot join a process group is still named: by its absence. Only when all nodes are fit by their own
account do the ranks join and measure the links between them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from metalm.errors import EXIT_DONE, EXIT_NODE
from metalm.operations.node_report import Gpu, NodeReport, node_name, report_node
from metalm.operations.preflight_limits import Limits, draw_table, find_problems
from metalm.parallel.bandwidth import LinkSpeeds, measure_links
from metalm.parallel.launch import Launch, find_launch, raise_open_files
from metalm.planning.calibration import write_links
from metalm.progress import Phase

NODES_VARIABLE = "METALM_NODES"
"""The job's nodes in the order of their ranks, separated by blanks: names those that do not report."""
_FAREWELL_S = 5.0
_PAUSE_S = 0.05


def preflight(
    run_folder: Path,
    limits: Limits,
    *,
    deadline_s: float,
    mebibytes: int,
    bad_nodes: Path | None,
    calibration: Path | None = None,
) -> int:
    """Look at all nodes; rank 0 prints a table and writes the nodes that are not fit to a file.

    Args:
        run_folder: where the run will write.
        deadline_s: how long ranks may take to report, and again to measure their links.
        mebibytes: size of the tensor that is summed.
        bad_nodes: a line of node, tab and reason for each.
        calibration: file for what the links reach, which plans of runs read.

    Returns:
        EXIT_DONE, or EXIT_NODE when a node is not fit; alike on all ranks that still meet.

    Collective: all ranks of the job, but none waits for ever for one that does not come.
    """
    launch = find_launch(os.environ)
    own = NodeReport(node_name()) if launch.local_rank else _add_what_torch_knows(report_node(run_folder))
    links: threading.Thread | None = None
    try:
        meeting = _Meeting(launch, deadline_s)
        meeting.tell("report", own.to_json())
        if launch.rank:
            if meeting.receive("links are measured") == "yes":
                links = _measure(meeting, mebibytes)
            code = int(meeting.receive("code"))
        else:
            reports, problems, links = _judge(meeting, limits, mebibytes, calibration)
            print(draw_table(reports, problems), flush=True)
            if bad_nodes is not None and problems:
                lines = (f"{node}\t{'; '.join(found)}\n" for node, found in problems.items())
                bad_nodes.write_text("".join(lines))
            code = EXIT_NODE if problems else EXIT_DONE
            meeting.say("code", str(code))
        meeting.tell("farewell", "")
        if launch.rank == 0:
            meeting.collect("farewell", _FAREWELL_S)  # the store goes with this process
    except dist.DistError as error:
        print(f"preflight: {own.node} does not meet the other nodes: {error}", file=sys.stderr, flush=True)
        code = EXIT_NODE
    if links is not None and links.is_alive():
        sys.stdout.flush()
        os._exit(code)  # a collective that hangs cannot be ended otherwise
    return code


def _add_what_torch_knows(report: NodeReport) -> NodeReport:
    """The versions of CUDA and NCCL, and the GPUs where nvidia-smi did not tell of them."""
    if not torch.cuda.is_available():
        return report
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    versions = report.versions | {"CUDA": str(torch.version.cuda), "NCCL": nccl}
    gpus = list(report.gpus)
    if not gpus:
        versions["GPU"] = torch.cuda.get_device_name(0)
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            gpus.append(Gpu(total / 2**30, (total - free) / 2**30, None))
    return dataclasses.replace(report, gpus=tuple(gpus), versions=versions)


class _Meeting:
    """The ranks at a store on rank 0, without a process group."""

    def __init__(self, launch: Launch, deadline_s: float) -> None:
        """
        Raises:
            DistError: rank 0 cannot be reached.
        """
        self.launch, self.deadline_s = launch, deadline_s
        self.store = self._connect(launch.master_port, hosts=launch.rank == 0)

    def connect(self) -> dist.TCPStore:
        """A connection of its own, for calls that may wait long."""
        return self._connect(self.store.port, hosts=False)

    def _connect(self, port: int, *, hosts: bool) -> dist.TCPStore:
        store = dist.TCPStore(
            self.launch.master_address,
            port,
            is_master=hosts,
            timeout=timedelta(seconds=self.deadline_s),
            wait_for_workers=False,
        )
        store.set_timeout(timedelta(seconds=3 * self.deadline_s))  # rank 0 may wait for reports, and links
        return store

    def say(self, name: str, value: str) -> None:
        """Rank 0 to all."""
        self.store.set(name, value)

    def receive(self, name: str) -> str:
        """What rank 0 says."""
        return self.store.get(name).decode()

    def tell(self, name: str, value: str) -> None:
        """A rank to rank 0."""
        self.store.set(f"{name}/{self.launch.rank}", value)

    def collect(self, name: str, timeout_s: float) -> list[str | None]:
        """The reports of the ranks, None for those that did not send one in time."""
        keys = [f"{name}/{rank}" for rank in range(self.launch.world_size)]
        missing, ends = set(keys), time.monotonic() + timeout_s
        while missing and time.monotonic() < ends:
            missing = {key for key in missing if not self.store.check([key])}
            time.sleep(_PAUSE_S if missing else 0.0)
        return [None if key in missing else self.store.get(key).decode() for key in keys]


Verdict = tuple[Sequence[NodeReport], dict[str, list[str]], threading.Thread | None]


def _judge(meeting: _Meeting, limits: Limits, mebibytes: int, calibration: Path | None) -> Verdict:
    """Rank 0: the nodes by their own account and, if that is good, by what they measure together."""
    with Phase(f"waiting for the reports of {meeting.launch.world_size} rank(s)"):
        told = meeting.collect("report", meeting.deadline_s)
    collected = [None if text is None else NodeReport.from_json(text) for text in told]
    names = _node_names(collected)
    reports = [_of_node(name, collected, names) for name in dict.fromkeys(names)]
    problems = find_problems(reports, limits)
    meeting.say("links are measured", "no" if problems else "yes")
    if problems:
        return reports, problems, None
    thread = _measure(meeting, mebibytes)
    with Phase("measuring the links between the ranks"):
        speeds = meeting.collect("links", meeting.deadline_s)
    if calibration is not None:
        measured = [LinkSpeeds(**json.loads(speed)) for speed in speeds if speed]
        write_links(calibration, measured, ranks_per_node=names.count(names[0]))
    reports = [_with_links(report, speeds, names) for report in reports]
    return reports, find_problems(reports, limits), thread


def _node_names(collected: Sequence[NodeReport | None]) -> list[str]:
    """The node of each rank. Those of ranks that did not report follow from the order of the job's nodes."""
    listed = os.environ.get(NODES_VARIABLE, "").split()
    share = max(1, len(collected) // len(listed)) if listed else 1
    expected = [
        listed[rank // share] if rank // share < len(listed) else f"rank {rank}"
        for rank in range(len(collected))
    ]
    return [expected[rank] if report is None else report.node for rank, report in enumerate(collected)]


def _of_node(name: str, collected: Sequence[NodeReport | None], names: Sequence[str]) -> NodeReport:
    """The report of a node's first rank, with a fault if some rank of it has not come.

    Where nobody came but the first node, that one is at fault: the others cannot have gone at once.
    """
    ranks = [rank for rank, node in enumerate(names) if node == name]
    absent = [rank for rank in ranks if collected[rank] is None]
    first = collected[ranks[0]] or NodeReport(name)
    others_came = any(report is not None and report.node != names[0] for report in collected)
    several_others = len(set(names)) > 2
    if several_others and not others_came:
        return dataclasses.replace(first, faults=("no other node reaches it",)) if name == names[0] else first
    if absent:
        return dataclasses.replace(first, faults=(*first.faults, f"{len(absent)} of its ranks do not report"))
    return first


def _with_links(report: NodeReport, speeds: Sequence[str | None], names: Sequence[str]) -> NodeReport:
    """Add what a node's ranks measured; of a speed, the least."""
    own = [
        LinkSpeeds(**json.loads(s))
        for s, node in zip(speeds, names, strict=True)
        if node == report.node and s
    ]
    silent = sum(node == report.node for node in names) - len(own)
    if silent:
        fault = f"{silent} of its ranks do not finish an all-reduce"
        return dataclasses.replace(report, faults=(*report.faults, fault))
    return dataclasses.replace(
        report,
        clock_s=own[0].clock_s,
        within_gib_s=min((s.within_gib_s for s in own if s.within_gib_s is not None), default=None),
        across_gib_s=min((s.across_gib_s for s in own if s.across_gib_s is not None), default=None),
    )


def _measure(meeting: _Meeting, mebibytes: int) -> threading.Thread:
    """Join the process group and measure the links; given up, but still running, after the deadline."""
    thread = threading.Thread(target=_measure_links, args=(meeting, mebibytes), daemon=True)
    thread.start()
    if meeting.launch.rank:
        thread.join(meeting.deadline_s)
    return thread


def _measure_links(meeting: _Meeting, mebibytes: int) -> None:
    launch, on_cuda = meeting.launch, torch.cuda.is_available()
    device = torch.device("cuda", launch.local_rank) if on_cuda else torch.device("cpu")
    raise_open_files()
    try:
        store = meeting.connect()
        if on_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=dist.PrefixStore("links", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=2 * meeting.deadline_s),
        )
        collected: list[str] = [""] * launch.world_size
        dist.all_gather_object(collected, node_name())
        nodes = [
            [rank for rank, node in enumerate(collected) if node == name] for name in dict.fromkeys(collected)
        ]
        speeds = measure_links(nodes, device, mebibytes)
        store.set(f"links/{launch.rank}", json.dumps(dataclasses.asdict(speeds)))
        dist.destroy_process_group()
    except RuntimeError as error:
        print(f"preflight: {node_name()}, rank {launch.rank}: {error}", file=sys.stderr, flush=True)
