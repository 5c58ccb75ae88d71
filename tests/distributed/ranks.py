"""Run programs on one or several real ranks and collect their output; a hang is a failure with stacks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from distributed.fork_server import ENVIRONMENT, Program
from held_port import hold_port, port_of

_POLL_S = 0.01


class Ranks:
    """The processes of a program on this machine, forked from the fork servers."""

    def __init__(self, words: Sequence[str], num_ranks: int = 1, **environment: str) -> None:
        """Start `-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS`; a single rank gets no launch variables."""
        self.words = list(words)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._held = hold_port()
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(self._held))} if num_ranks > 1 else {}
        self.processes = []
        for rank in range(num_ranks):
            own = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)} if job else {}
            variables = {**job, **own, **environment}
            self.processes.append(Program(words, self._output.fileno(), server=rank % 2, **variables))

    def kill(self, rank: int) -> None:
        """SIGKILL, as the kernel's out-of-memory killer or a lost node would do it."""
        self.processes[rank].send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float = 280.0, *, all_by_themselves: bool = False) -> list[int]:
        """Exit codes of the ranks; minus the signal's number where one was killed.

        Like a launcher, kill all when one has failed, unless `all_by_themselves`.

        Raises:
            AssertionError: the ranks hang; the message has their stacks.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while None in (codes := [process.wait(0.0) for process in self.processes]):
                if any(codes) and not all_by_themselves:
                    break
                if time.monotonic() > deadline:
                    self._write_stacks()
                    raise AssertionError(
                        f"{self.words} hung for {timeout_s:.0f} s:\n{self.output()[-60_000:]}"
                    )
                time.sleep(_POLL_S)
        finally:
            for rank in range(len(self.processes)):
                self.kill(rank)
            self._held.close()
        return [process.wait() for process in self.processes]

    def output(self) -> str:
        """What the ranks have written to stdout and stderr so far."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def _write_stacks(self) -> None:
        """Have every rank that still runs dump its stacks and abort: in turn, for they share a file."""
        for process in self.processes:
            process.send_signal(signal.SIGABRT)
            process.wait(timeout_s=30)


def wait_until(condition: Callable[[], bool], ranks: Ranks, timeout_s: float = 100.0) -> bool:
    """Wait for a condition while all ranks run; returns whether it came about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if any(process.wait(0.0) is not None for process in ranks.processes):
            return False
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.001)
    return True


def run_ranks(program: str, num_ranks: int, *arguments: str, timeout_s: float = 280) -> list[Any]:
    """Run `programs/PROGRAM.py ARGUMENTS` on ranks; answer the lines `RESULT {json}` of all."""
    ranks = Ranks(["-m", f"distributed.programs.{program}", *arguments], num_ranks)
    codes = ranks.wait(timeout_s)
    output = ranks.output()
    assert not any(codes), f"{program} on {num_ranks} rank(s) ended with {codes}:\n{output[-6000:]}"
    # Anywhere in a line: another rank may have written half a line before, or one behind it.
    decoder = json.JSONDecoder()
    results = [decoder.raw_decode(output, found.end())[0] for found in re.finditer(r"RESULT (?=\{)", output)]
    assert results, f"{program} wrote no result:\n{output[-6000:]}"
    return results


def run_program(
    words: Sequence[str], num_ranks: int = 1, timeout_s: float = 280, **environment: str
) -> tuple[int, str]:
    """Exit code and output of a program, see `Ranks`; of several ranks, the first code that is not 0."""
    ranks = Ranks(words, num_ranks, **environment)
    codes = ranks.wait(timeout_s)
    return next(filter(None, codes), 0), ranks.output()


def run_command(command: list[str], timeout_s: int, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command as typed, in a process group of its own, killed if it hangs."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **ENVIRONMENT, **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # the ranks' faulthandler writes their stacks
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"{' '.join(command)} hung for {timeout_s} s:\n{output[-6000:]}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output
