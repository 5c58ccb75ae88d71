"""Runs tasks in worker processes that report progress, and that neither hang nor outlive their parent.

Each worker has a pipe of its own. A dead worker closes it, which the parent sees at once; a dead parent
closes it too, and the worker stops at its next message. (A `ProcessPoolExecutor` leaves its workers
behind when the parent is killed, and shares nothing with them to report progress by.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from metalm.errors import MetaLMError
from metalm.outputs import is_no_room

Task = TypeVar("Task")
Advance = Callable[[float], None]
"""Called with the amount of work done since the last call."""


def run_tasks(
    tasks: Sequence[Task],
    run_task: Callable[[Task, Advance], None],
    *,
    processes: int,
    advance: Advance,
    preload: str,
) -> None:
    """Runs every task once, in up to `processes` processes, in no particular order.

    Args:
        run_task: picklable. With `processes` 1 it runs in this process.
        advance: called here with what `run_task` reports.
        preload: module to import once, before the workers are forked from a server process.

    Raises:
        MetaLMError: what a task raised; or a worker died.
        OSError: there is no room to write.
        RuntimeError: a task raised anything else; the message holds its stack trace.
    """
    if processes == 1 or len(tasks) == 1:
        for task in tasks:
            run_task(task, advance)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    workers: dict[Connection, BaseProcess] = {}
    waiting = list(reversed(tasks))
    try:
        for _ in range(min(processes, len(tasks))):
            connection, other_end = context.Pipe()
            worker: BaseProcess = context.Process(target=_serve, args=(other_end, run_task), daemon=True)
            worker.start()
            other_end.close()
            workers[connection] = worker
            _send(connection, worker, waiting.pop())
        while workers:
            ready = wait(list(workers))
            for connection in [connection for connection in workers if connection in ready]:
                message = _receive(connection, workers[connection])
                if isinstance(message, float):
                    advance(message)
                elif waiting:
                    _send(connection, workers[connection], waiting.pop())
                else:
                    connection.close()
                    workers.pop(connection).join()
    finally:
        for connection, process in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _send(connection: Connection, worker: BaseProcess, task: Task) -> None:
    try:
        connection.send(task)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(worker) from None


def _receive(connection: Connection, worker: BaseProcess) -> float | None:
    """Progress, or None for a finished task."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _death(worker) from None
    if isinstance(message, MetaLMError | OSError):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"a preparation process failed:\n{message}")
    return message


def _death(worker: BaseProcess) -> MetaLMError:
    worker.join()
    return MetaLMError(
        f"a preparation process ended unexpectedly (exit code {worker.exitcode}; -9 usually means out of "
        "memory). What it had finished is kept: start the same command again, with fewer processes if "
        "memory is short."
    )


def _serve(connection: Connection, run_task: Callable[[Task, Advance], None]) -> None:
    """The life of a worker: tasks come in, floats (progress) and one None per finished task go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    try:
        while True:
            task = connection.recv()
            try:
                run_task(task, lambda amount: connection.send(float(amount)))
                connection.send(None)
            except MetaLMError as error:
                connection.send(error)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                connection.send(error if is_no_room(error) else traceback.format_exc())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has no more work, or is gone
