"""Lanes in processes of their own: each worker serves some of a rank's lanes, and sends rows with states.

A worker is spawned, never forked (the training process holds CUDA, MPI or gloo threads), and does not
import torch, unless the mel frames of audio need it. It runs ahead as far as its pipe and the reader's queue
allow. It ends when its parent is gone, however that ended, and a worker that dies is an error at once, with
its cause.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.lanes import Lane, LaneState, Mixture, saved_state
from metalm.data.row import Row
from metalm.errors import MetaLMError

_PARENT_CHECK_S = 1.0


class WorkerError(MetaLMError):
    """A loader process ended that should not have."""


class StepRows(NamedTuple):
    """The rows of one step, by lane in the order of the lane, and the lanes' states after them."""

    rows: dict[int, list[Row]]
    states: dict[int, LaneState]


class LaneGroup:
    """Some lanes of a rank, advanced together step by step."""

    def __init__(
        self, mixture: Mixture, lanes: range, rows_per_lane: int, states: dict[int, LaneState] | None
    ) -> None:
        self._lanes = {
            lane: Lane(mixture, lane, None if states is None else saved_state(states, lane)) for lane in lanes
        }
        self._rows_per_lane = rows_per_lane

    @property
    def process_ids(self) -> list[int]:
        """Of worker processes: there are none."""
        return []

    def next_step(self) -> StepRows:
        """The rows of the next step.

        Raises:
            DataError: as `Lane.next_row`.
        """
        rows = {
            number: [lane.next_row() for _ in range(self._rows_per_lane)]
            for number, lane in self._lanes.items()
        }
        return StepRows(rows, {number: lane.state() for number, lane in self._lanes.items()})

    def close(self) -> None:
        """Closes shards."""
        for lane in self._lanes.values():
            lane.close()


class WorkerPool:
    """The lanes of a rank, dealt to worker processes. Has the methods of a LaneGroup."""

    def __init__(
        self,
        corpus: Corpus,
        lanes: range,
        rows_per_lane: int,
        states: dict[int, LaneState] | None,
        split: int,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[range, SpawnProcess, Connection]] = []
        num_workers = min(corpus.config.data.workers, len(lanes))
        read = (corpus.config, corpus.tokenizer.definition)
        for number in range(num_workers):
            share = lanes[number::num_workers]
            share_states = None if states is None else {k: v for k, v in states.items() if k in share}
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve,
                args=(sender, os.getpid(), *read, share, rows_per_lane, share_states, split),
                name=f"metalm-data-{number}",
                daemon=True,
            )
            process.start()
            sender.close()
            self._workers.append((share, process, receiver))
        # At exit multiprocessing sends its processes a SIGTERM, which ours ignore, and waits for them.
        atexit.register(self.close)

    @property
    def process_ids(self) -> list[int]:
        """Of the worker processes."""
        return [process.pid for _, process, _ in self._workers if process.pid is not None]

    def next_step(self) -> StepRows:
        """The rows of the next step, from all workers.

        Raises:
            MetaLMError: what a worker raised; WorkerError if one failed otherwise or died.
        """
        rows: dict[int, list[Row]] = {}
        states: dict[int, LaneState] = {}
        for share, process, receiver in self._workers:
            step = _receive(share, process, receiver)
            rows |= step.rows
            states |= step.states
        return StepRows(rows, states)

    def close(self) -> None:
        """Ends all workers."""
        atexit.unregister(self.close)
        for _, process, receiver in self._workers:
            process.kill()
            process.join()
            receiver.close()


def _receive(share: range, process: SpawnProcess, receiver: Connection) -> StepRows:
    wait([receiver, process.sentinel])
    try:
        # Once the process has ended, what it sent before is still in the pipe.
        message = receiver.recv() if receiver.poll() else None
    except (EOFError, OSError):
        message = None
    if message is None:
        process.join()
        raise WorkerError(_death_message(share, process))
    if isinstance(message, MetaLMError):
        raise message
    if isinstance(message, str):
        raise WorkerError(f"data worker {process.name} failed:\n{message}")
    return message


def _death_message(share: range, process: SpawnProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        cause = f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += " (often because memory ran out)"
    else:
        cause = f"ended with exit code {code}"
    return f"data worker {process.name} (process {process.pid}, lanes {list(share)}) {cause}"


def _serve(
    sender: Connection,
    parent: int,
    config: RunConfig,
    definition: bytes,
    lanes: range,
    rows_per_lane: int,
    states: dict[int, LaneState] | None,
    split: int,
) -> None:
    """A worker's whole life: sends StepRows for ever; at a failure the error (or a traceback), once."""
    # A terminal or a scheduler signals the whole group. What that means is for the parent to decide: it
    # may want to save, and a worker that ended now would look like a fault.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        corpus = Corpus(config, check_sizes=False, tokenizer_definition=definition)
        group = LaneGroup(Mixture(corpus, split), lanes, rows_per_lane, states)
        while True:
            sender.send(group.next_step())
    except (BrokenPipeError, ConnectionResetError):
        return
    except MetaLMError as error:
        sender.send(error)
    except Exception:
        sender.send(traceback.format_exc())


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
