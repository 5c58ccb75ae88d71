"""Fork programs from a server that has imported the product once, so that a start costs no imports.

Apart from that a program is what `python -m MODULE` or `python SCRIPT` starts: a new process and session with
its own arguments, environment, working directory and output. The server has one thread and runs no program
itself, so no state passes from one program to the next. It exits with the process that started it, and the
programs exit with the server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": str(TESTS),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    # CUDA cannot be used in a process whose parent has looked for devices.
    "CUDA_VISIBLE_DEVICES": "",
    # pyarrow, which some versions of transformers import, would start a thread in the server.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""What every program gets in addition to this process's environment."""
PRELOADED = (
    "metalm.cli",
    "metalm.training.loop",
    "metalm.conversion.export",
    "metalm.conversion.generate",
    "metalm.conversion.restore",
    "deepspeed.module_inject.auto_ep_layer",
)
_PR_SET_PDEATHSIG = 1
_MAX_REQUEST_BYTES = 1 << 18


class Program:
    """A running program; the counterpart of `subprocess.Popen`."""

    def __init__(self, words: Sequence[str], output: int, *, server: int = 0, **environment: str) -> None:
        """Start `-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS`.

        Args:
            output: file descriptor for stdout and stderr.
            server: which server to fork from. Each has its own hash seed, as separate processes have; the
                programs of one server share theirs.
        """
        request = {
            "words": list(words),
            "environment": {**os.environ, **ENVIRONMENT, **environment},
            "folder": str(Path.cwd()),
        }
        self.returncode: int | None = None
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps(request).encode()
            socket.send_fds(_server(server), [message], [theirs.fileno(), output])
        self.pid = self._receive()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code, minus the signal's number where one ended it; None if the program still runs."""
        if self.returncode is None and select.select([self._status], [], [], timeout_s)[0]:
            self.returncode = os.waitstatus_to_exitcode(self._receive())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal the program alone."""
        if self.wait(0.0) is None:
            os.kill(self.pid, number)

    def _receive(self) -> int:
        number = self._status.recv(64)
        assert number, "the fork server is gone"
        return int(number)


@functools.cache
def _server(number: int) -> socket.socket:
    """Start a server and return the socket that takes requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # the first to run: the server ends
    return ours


def _serve(control: socket.socket) -> dict[str, Any]:
    """Fork a process per request and report its exit status; returns in each child, with its request.

    Exits when the other end of `control` is closed.
    """
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process id, where to report
    while True:
        ready, _, _ = select.select([control, *running], [], [])
        for source in ready:
            if source is not control:
                pid, report = running.pop(source)
                _, exit_status = os.waitpid(pid, 0)
                os.close(source)
                with report, contextlib.suppress(BrokenPipeError):
                    report.send(str(exit_status).encode())
                continue
            message, descriptors, *_ = socket.recv_fds(control, _MAX_REQUEST_BYTES, 2)
            if not message:
                os._exit(0)
            status, output = descriptors
            pid = os.fork()
            if pid == 0:
                for pidfd, (_, report) in running.items():
                    os.close(pidfd)
                    report.close()
                os.close(status)
                control.close()
                for standard in (1, 2):
                    os.dup2(output, standard)
                os.close(output)
                return json.loads(message)
            os.close(output)
            report = socket.socket(fileno=status)
            report.send(str(pid).encode())
            running[os.pidfd_open(pid)] = (pid, report)


def _run(request: dict[str, Any]) -> NoReturn:
    """Run the requested program in this process and exit with its code."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    code: Any = 0
    try:
        _run_main(*request["words"])
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # What the interpreter does at exit, except tearing down the modules that the server has loaded.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _run_main(program: str, *arguments: str) -> None:
    np.random.seed()
    if program == "-m":
        module, *arguments = arguments
        sys.argv[:] = [module, *arguments]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [program, *arguments]
        sys.path[0] = str(Path(program).parent.resolve())
        runpy.run_path(program, run_name="__main__")


def _main() -> NoReturn:
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a server with threads cannot be forked from"
    gc.collect()
    gc.freeze()
    _run(_serve(control))


if __name__ == "__main__":
    _main()
