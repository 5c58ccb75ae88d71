"""What training iterates over: the micro-batches of one optimizer step at a time, for one rank.

Row j of a global batch comes from lane j mod L, and a rank owns consecutive lanes, so the rows of step t
are the same on any number of ranks and workers; which of a rank's rows share a micro-batch follows from
their encoder work. With workers, a thread of the training process receives
their rows and collates them ahead of the step; the lanes' states travel with the steps, so
`lane_states()` speaks of the last step returned, however far ahead the workers are.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from metalm.batch import EncoderBatch, SemiCausalBatch, in_one_piece
from metalm.data.balance import group_rows, row_costs
from metalm.data.corpus import Corpus
from metalm.data.lane_growth import grown, growth
from metalm.data.lane_workers import LaneGroup, WorkerPool
from metalm.data.lanes import Lane, LaneState, Mixture, owned_lanes, saved_state
from metalm.data.micro_batch import RowObjective, make_micro_batch
from metalm.errors import ConfigError

logger = logging.getLogger(__name__)

PREFETCH_STEPS = 2
_STOP_CHECK_S = 0.1


class _Step(NamedTuple):
    batches: list[SemiCausalBatch]
    states: dict[int, LaneState]
    costs: np.ndarray  # [2, micro-batches, encoders]


class TrainingData:
    """Endless iterator over the steps of one data-parallel rank; `next` gives a step's micro-batches.

    All ranks that work on the same rows get the same batches when they are given the same `dp_rank`.

    Attributes:
        wait_s: seconds that the last `next` took.
        encoder_costs: [2, micro-batches, encoders], relative work of the last step; of micro-batches in the
            order of the lanes, and as they are.
    """

    def __init__(
        self,
        corpus: Corpus,
        objective: RowObjective,
        *,
        dp_rank: int,
        dp_size: int,
        tp_size: int,
        cp_size: int = 1,
        lane_states: dict[int, LaneState] | None = None,
    ) -> None:
        """Starts the workers.

        Args:
            corpus: of the run.
            objective: what is done to the rows.
            lane_states: what `lane_states()` returned, of all lanes of this rank or more, on any number
                of ranks and workers; None begins the data. Of fewer lanes than the config's, of all of
                them: they are split.

        Raises:
            ConfigError: lanes, batch sizes and ranks do not fit, or the states are of another order.
            DataError: a source cannot be used.
        """
        config = corpus.config
        data, training = config.data, config.training
        self._config, self._tp_size, self._cp_size = config, tp_size, cp_size
        self._corpus, self._objective = corpus, objective
        self._lanes = owned_lanes(data.lanes, dp_rank, dp_size)
        if training.global_batch_size % data.lanes:
            raise ConfigError(
                f"training.global_batch_size is {training.global_batch_size}, which data.lanes "
                f"({data.lanes}) does not divide"
            )
        self._rows_per_lane = training.global_batch_size // data.lanes
        rows_per_step = self._rows_per_lane * len(self._lanes)
        if rows_per_step % training.micro_batch_size:
            raise ConfigError(
                f"a rank has {rows_per_step} rows per step, which training.micro_batch_size "
                f"({training.micro_batch_size}) does not divide"
            )
        times, split = (1, 1) if lane_states is None else growth(lane_states, data.lanes)
        self._mixture = Mixture(corpus, split)
        if lane_states is not None and times > 1:
            lane_states = grown(lane_states, times, self._mixture)
            logger.info(
                "%d lanes are %d from here on: each is split in %d", data.lanes // times, data.lanes, times
            )
        if lane_states is not None:
            first = saved_state(lane_states, self._lanes[0])
            self._mixture.check_state(first)
            if dp_rank == 0:
                self._mixture.log_changes(first)
        self._states = self._first_states(lane_states)
        self._imbalance = {name: _Mean() for name in config.model.encoders}
        self.wait_s = 0.0
        self.encoder_costs = np.zeros((2, rows_per_step // training.micro_batch_size, len(self._imbalance)))
        self._group: LaneGroup | WorkerPool
        self._prefetcher: _Prefetcher | None = None
        if data.workers:
            self._group = WorkerPool(corpus, self._lanes, self._rows_per_lane, lane_states, split)
            self._prefetcher = _Prefetcher(self._make_step)
        else:
            self._group = LaneGroup(self._mixture, self._lanes, self._rows_per_lane, lane_states)

    def __iter__(self) -> TrainingData:
        return self

    def __next__(self) -> list[SemiCausalBatch]:
        """The micro-batches of the next step, each in one piece of pinned memory where there is CUDA.

        Raises:
            DataError: too many bad samples in a row, or a shard that cannot be read.
            WorkerError: a worker died.
        """
        began = time.perf_counter()
        step = self._prefetcher.get() if self._prefetcher is not None else self._make_step()
        self.wait_s = time.perf_counter() - began
        self._states, self.encoder_costs = step.states, step.costs
        for name, mean in self._imbalance.items():
            for batch in step.batches:
                mean.add(_share_imbalance(batch.encoders[name]))
        return step.batches

    @property
    def worker_ids(self) -> list[int]:
        """Process ids of the workers."""
        return self._group.process_ids

    def lane_states(self) -> dict[int, LaneState]:
        """The states of this rank's lanes after the last step returned, as JSON holds them."""
        return self._states

    def counters(self) -> dict[str, int]:
        """What this rank's lanes have read since the run began, over all resumes.

        Per source: `SOURCE/rows`, `/samples`, `/tokens` (without padding), `/padding_tokens`,
        `/span_tokens`, `/truncated_captions`, `/overflowed_tokens` and `/skipped/CAUSE`.
        """
        found: dict[str, int] = {}
        for state in self._states.values():
            for name, source in state["sources"].items():
                counts = dict(source["packer"]["counters"])
                skipped = {f"skipped/{cause}": count for cause, count in counts.pop("skipped").items()}
                for key, count in (counts | skipped).items():
                    found[f"{name}/{key}"] = found.get(f"{name}/{key}", 0) + count
        return found

    def skipped_samples(self) -> int:
        """How many bad samples this rank's lanes have skipped since the run began, of all causes."""
        packers = [
            source["packer"] for state in self._states.values() for source in state["sources"].values()
        ]
        return sum(sum(packer["counters"]["skipped"].values()) for packer in packers)

    def epochs(self) -> dict[str, int]:
        """By source: the epoch of this rank's lane that is furthest behind."""
        found: dict[str, int] = {}
        for lane, state in self._states.items():
            for name, source in state["sources"].items():
                epoch = self._mixture.orders[name].epoch(lane, source["packer"]["place"][0])
                found[name] = min(found.get(name, epoch), epoch)
        return found

    def tensor_imbalances(self) -> dict[str, float]:
        """By encoder: the largest share of a rank over the mean share, minus 1, averaged over this process's
        micro-batches.
        """
        return {name: mean.value for name, mean in self._imbalance.items()}

    def close(self) -> None:
        """Ends the workers and the thread."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
        self._group.close()
        if self._prefetcher is not None:
            self._prefetcher.join()

    def _first_states(self, saved: dict[int, LaneState] | None) -> dict[int, LaneState]:
        if saved is None:
            return {lane: Lane(self._mixture, lane).state() for lane in self._lanes}
        states = {lane: saved_state(saved, lane) for lane in self._lanes}
        return {lane: self._mixture.drop_removed_sources(state) for lane, state in states.items()}

    def _make_step(self) -> _Step:
        step = self._group.next_step()
        rows = self._objective.arrange(
            [step.rows[lane][turn] for turn in range(self._rows_per_lane) for lane in self._lanes]
        )
        size = self._config.training.micro_batch_size
        costs = row_costs(rows, self._config.model.encoders)
        in_lane_order = np.arange(len(rows)).reshape(-1, size)
        groups = np.array(group_rows(costs, size))
        sizes = self._tp_size, self._cp_size
        batches = [
            make_micro_batch([rows[number] for number in group], self._corpus, self._objective, *sizes)
            for group in groups
        ]
        if torch.cuda.is_available():
            batches = [in_one_piece(batch, pinned=True) for batch in batches]
        return _Step(batches, step.states, np.stack([costs[in_lane_order].sum(1), costs[groups].sum(1)]))


class _Prefetcher:
    """Makes steps ahead in a thread. What the thread raises, `get` raises, each time from then on."""

    def __init__(self, make_step: Callable[[], _Step]) -> None:
        self._make_step = make_step
        self._ready: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=PREFETCH_STEPS)
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metalm-data-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> _Step:
        """The next step."""
        if self._failure is None:
            item = self._ready.get()
            if isinstance(item, _Step):
                return item
            self._failure = item
        raise self._failure

    def stop(self) -> None:
        """Tells the thread to end; it does once the step that it is making is done or fails."""
        self._stopped.set()

    def join(self) -> None:
        """Waits for the thread."""
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            item: _Step | BaseException
            try:
                item = self._make_step()
            except BaseException as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._ready.put(item, timeout=_STOP_CHECK_S)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / max(1, self.count)


def _share_imbalance(encoder: EncoderBatch) -> float:
    if len(encoder.shares) == 1:
        return 0.0
    elements = [int((share.attention_end > 0).sum()) for share in encoder.shares]
    return max(elements) * len(elements) / sum(elements) - 1
