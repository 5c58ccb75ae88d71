"""The step that comes next: its micro-batches, and what the ranks agree on before it.

It is fetched while the step before it runs on the device. What a run saves, shows and counts is of the steps
that are done, so everything that is known of the fetched step stays with it until it is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch.profiler import record_function

from metalm.batch import SemiCausalBatch
from metalm.config.model_schema import ModelConfig
from metalm.data.lanes import LaneState
from metalm.data.loader import TrainingData
from metalm.errors import MetaLMError
from metalm.parallel.agreement import Verdict, agree
from metalm.parallel.regions import broadcast_batches
from metalm.parallel.topology import Topology
from metalm.training.fingerprint import fingerprint
from metalm.training.monitor.figures import BatchCounts, Figure, count_batches, data_figures


@dataclass(frozen=True)
class Upcoming:
    """One step before it is run."""

    verdict: Verdict
    """What the ranks have agreed on: only GO_ON has micro-batches."""
    error: MetaLMError | None
    """Of this rank, where they have agreed on FAIL or LOST."""
    save_failed: bool
    """Whether any rank could not write what it had to save."""
    batches: list[SemiCausalBatch]
    """In host memory."""
    lane_states: Mapping[int, LaneState] | None
    """After this step; None where another rank with the same rows reads them."""
    wait_s: float
    """For data."""
    agreeing_s: float
    counts: Future[BatchCounts] | None = None
    """Of the micro-batches, by the rank that reads them."""
    fingerprint: Future[int] | None = None
    """Of a step that is logged, the same."""
    figures: Mapping[str, Figure] | None = None
    """Of a step that is logged: what the data tell of themselves after it."""


class Feed:
    """Fetches one step after another, and counts what is in them in a thread of its own."""

    def __init__(
        self,
        data: TrainingData | None,
        topology: Topology,
        model_config: ModelConfig,
        own_verdict: Callable[[MetaLMError | None], tuple[Verdict, MetaLMError | None]],
        has_failed: Callable[[], bool],
    ) -> None:
        """Stand by.

        Args:
            data: of this data-parallel rank; None but on the first rank that works on its rows.
            own_verdict: what this rank asks for, and why, given what came of reading its data.
            has_failed: whether a save of this rank has failed.
        """
        self._data, self._topology, self._model_config = data, topology, model_config
        self._own_verdict, self._has_failed = own_verdict, has_failed
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metalm-counts")

    def fetch(self, *, is_logged: bool) -> Upcoming:
        """The step after the one fetched last.

        Args:
            is_logged: whether its figures will be shown.

        Collective: all ranks, over gloo.
        """
        batches, wait_s = None, 0.0
        error: MetaLMError | None = None
        if self._data is not None:
            try:
                with record_function("data wait"):
                    batches = next(self._data)
                wait_s = self._data.wait_s
            except MetaLMError as found:
                error = found
        own, error = self._own_verdict(error)
        began = time.perf_counter()
        with record_function("agreement"):
            verdict, save_failed = agree(own, self._has_failed(), self._topology)
        agreeing_s = time.perf_counter() - began
        if verdict is not Verdict.GO_ON:
            return Upcoming(verdict, error, save_failed, [], None, wait_s, agreeing_s)
        with record_function("broadcast"):
            received = broadcast_batches(batches, self._topology)
        states = None if self._data is None else self._data.lane_states()
        upcoming = Upcoming(verdict, None, save_failed, received, states, wait_s, agreeing_s)
        if self._data is not None:
            counts = self._aside.submit(count_batches, received, self._model_config)
            upcoming = replace(upcoming, counts=counts)
        return self.described(upcoming) if is_logged else upcoming

    def described(self, upcoming: Upcoming) -> Upcoming:
        """The step fetched last, with what is shown of it."""
        if self._data is None:
            return upcoming
        found = self._aside.submit(fingerprint, upcoming.batches)
        return replace(upcoming, fingerprint=found, figures=data_figures(self._data))

    def close(self) -> None:
        """End the thread."""
        self._aside.shutdown(cancel_futures=True)
