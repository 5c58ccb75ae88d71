"""Start the ranks of a real run, break them on schedule, and start them again by the same command.

Ranks are forked from a server that has imported the product once, so that a start costs little and a
test can afford many; apart from that a rank is the process that a launcher would start.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metalm.checkpoint.folders import list_checkpoints
from metalm.checkpoint.manifest import read_manifest
from metalm.training.monitor.json_lines import read_metrics

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["metalm.training.loop", "faults.injected"])

Fault = tuple[str, dict[str, Any]]
"""Name of a function in `injected`, and its arguments."""


class Ranks:
    """The processes of one start of a run."""

    def __init__(
        self, arguments: Sequence[str], num_ranks: int, log: Path, fault: Fault | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log
        self.processes = [
            _CONTEXT.Process(target=_run_rank, args=(rank, num_ranks, port, list(arguments), log, fault))
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int) -> None:
        """SIGKILL, as the kernel's out-of-memory killer or a lost node would do it."""
        self.processes[rank].kill()

    def wait(self, timeout_s: float = 280.0, *, all_by_themselves: bool = False) -> list[int]:
        """Exit codes of the ranks; minus the signal's number where one was killed.

        Like a launcher, end all when one has failed, unless `all_by_themselves`.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.is_alive() for process in self.processes):
                failed = any(process.exitcode not in (None, 0) for process in self.processes)
                if failed and not all_by_themselves:
                    break
                assert time.monotonic() < deadline, f"hung for {timeout_s:.0f} s:\n{self.output()}"
                time.sleep(0.01)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        """What the ranks wrote to their terminals."""
        return self.log.read_text()


def wait_until(condition: Callable[[], bool], ranks: Ranks, timeout_s: float = 100.0) -> bool:
    """Wait for a condition while all ranks live; answer whether it came about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if not all(process.is_alive() for process in ranks.processes):
            return False
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.001)
    return True


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


def _run_rank(
    rank: int, num_ranks: int, port: int, arguments: list[str], log: Path, fault: Fault | None
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["metalm", *arguments]
    from faults import injected
    from metalm import cli

    if fault is not None:
        name, options = fault
        getattr(injected, name)(rank, **options)
    cli.main()
