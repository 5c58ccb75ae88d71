"""How a run starts: fresh, from its own newest checkpoint, or from weights of other runs.

Decided once, under the run folder's lock and before the model is built, so that weights which a checkpoint
has are not drawn first. Until ranks, data, model and weights are there, nothing in the run's folder
changes: a start that is refused leaves no trace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalm.checkpoint.folders import remove_leftovers
from metalm.checkpoint.names import CHECKPOINTS_NAME, CONFIG_NAME
from metalm.checkpoint.reader import CheckpointReader
from metalm.checkpoint.state import RunState
from metalm.config import RunConfig, write_config
from metalm.data.corpus import Corpus
from metalm.data.lanes import owned_lanes
from metalm.data.loader import TrainingData
from metalm.objectives import Objective
from metalm.parallel.agreement import together
from metalm.parallel.topology import Topology
from metalm.progress import Phase
from metalm.run_folder import LOGS_NAME
from metalm.run_lock import RunLock
from metalm.training.average import begin_average
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import Engines, build_engines
from metalm.training.going_on import (
    check_initial_weights,
    initial_weights,
    refuse_another_model,
    require_steps,
)
from metalm.training.provenance import provenance
from metalm.training.session import Session
from metalm.training.watchdog import Watchdog
from metalm.training.weights import adopt, restore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    checkpoint: CheckpointReader | None = None
    """Its own newest whole checkpoint, or that of another run which it goes on from."""
    initial: Mapping[str, CheckpointReader] = field(default_factory=dict)
    """Of a new run: by component, the checkpoint of another run whose weights it takes."""

    @property
    def given(self) -> dict[str, frozenset[str]]:
        """By component, the parameters that these checkpoints hold: they need not be drawn."""
        readers = self.initial
        if self.checkpoint is not None:
            readers = dict.fromkeys(self.checkpoint.components(), self.checkpoint)
        return {component: frozenset(reader.parameters(component)) for component, reader in readers.items()}


@dataclass(frozen=True)
class StartedRun:
    """A run whose start has been accepted, on this rank."""

    engines: Engines
    store: CheckpointStore
    data: TrainingData | None
    """Of the rows of this rank, on the first rank that works on them."""
    state: RunState | None
    """That it goes on from; None: it is new."""
    lane_states: Mapping[int, Any] | None
    watchdog: Watchdog
    lock: RunLock | None
    """Of the run's folder, on the first rank."""


@contextmanager
def start_run(corpus: Corpus, objective: Objective, session: Session) -> Iterator[StartedRun]:
    """Take the run's folder, decide what the run starts from, build it, and begin to write.

    Raises:
        ConfigError: another run has the folder, or the checkpoint is of another model or tokenizer.
        BusyError: the folder's last holder may still live.
        CheckpointError, DataError: checkpoints or data cannot be used.

    Collective: all ranks.
    """
    config, topology, folder = corpus.config, session.topology, session.run_folder
    with ExitStack() as stack:
        with together():
            lock = RunLock(folder) if session.is_first else None
        if lock is not None:
            stack.callback(lock.release)
        store = CheckpointStore(folder, config, topology)
        stack.callback(store.close)
        if session.is_first:
            tell_readers(config)
        with Phase("looking for a checkpoint", told=True):
            start = decide_start(corpus, store)
        with Phase("building the model and its engines", told=True):
            engines = build_engines(config, topology, start.given)
        watchdog = Watchdog(folder / LOGS_NAME, topology.rank, config.guards.hang_minutes)
        stack.callback(watchdog.close)
        state = load_start(start, config, topology, engines)
        lane_states = None
        if start.checkpoint is not None:
            with together():
                lane_states = _own_lane_states(start.checkpoint, config, topology)
        with Phase("starting the data workers", told=True):
            data = _open_data(corpus, objective, topology, lane_states)
        if data is not None:
            stack.callback(data.close)
        if lock is not None:
            lock.accept()
            _clear(folder / CHECKPOINTS_NAME)
            store.set_aside_damaged()
            write_config(config, folder / CONFIG_NAME, provenance())
        session.log.open()
        yield StartedRun(engines, store, data, state, lane_states, watchdog, lock)


def tell_readers(config: RunConfig) -> None:
    """Tell of texts whose encoder the model does not have; where it has others, that may be a mistake."""
    level = logging.WARNING if config.model.encoders else logging.INFO
    for name, source in config.data.sources.items():
        for modality, reader in source.readers.items():
            if reader not in config.model.encoders:
                words = "source %s: the model has no encoder %s, so the decoder reads the %s itself"
                logger.log(level, words, name, reader, modality)


def _clear(checkpoints: Path) -> None:
    """Make the folder, or rid it of what a kill has left: behind the last save there is none to do it."""
    checkpoints.mkdir(exist_ok=True)
    try:
        remove_leftovers(checkpoints)
    except OSError as error:
        logger.warning("what a killed save has left could not be removed: %s", error)


def decide_start(corpus: Corpus, store: CheckpointStore) -> Start:
    """What a run starts from; the checkpoints are hashed.

    Raises:
        ConfigError: the checkpoint to go on from is of another model or tokenizer, or `training.steps` is
            not beyond it.
        CheckpointError: a checkpoint is missing or damaged.

    Collective: all ranks.
    """
    config = corpus.config
    folder = store.newest_whole()
    if folder is not None:
        return go_on_from(folder, corpus, store)
    if config.initialize.run is not None:
        start = go_on_from(store.find_whole(config.initialize.run), corpus, store)
        if start.checkpoint is not None:
            require_steps(config, start.checkpoint.folder, start.checkpoint.state)
        return start
    initial = {}
    for component, path in initial_weights(config).items():
        reader = store.open(store.find_whole(path))
        with together():
            if store.is_first:
                check_initial_weights(corpus, component, reader.folder, reader.files, reader.state)
        initial[component] = reader
    return Start(initial=initial)


def go_on_from(folder: Path, corpus: Corpus, store: CheckpointStore) -> Start:
    """A start that goes on from a checkpoint, which is compared with the config.

    Raises:
        ConfigError: it is of another model or tokenizer.
        CheckpointError: it cannot be read.

    Collective: all ranks.
    """
    reader = store.open(folder)
    with together():
        if store.is_first:
            refuse_another_model(corpus, reader.folder, reader.files, reader.state)
    return Start(checkpoint=reader)


def load_start(start: Start, config: RunConfig, topology: Topology, engines: Engines) -> RunState | None:
    """Read what the engines of a run start from; answer its state if it goes on.

    Raises:
        CheckpointError: a checkpoint does not fit the model.

    Collective: all ranks.
    """
    for component, reader in start.initial.items():
        with Phase(f"reading the {component} of {reader.folder}", told=True):
            adopt(reader, component, engines, config.initialize.new, topology)
        logger.info("the %s start(s) from %s", component, reader.folder)
    if start.checkpoint is None:
        begin_average(engines)
        return None
    with Phase(f"reading the checkpoint {start.checkpoint.folder}", told=True):
        restore(start.checkpoint, engines, topology)
    logger.info("resumed from %s", start.checkpoint.folder)
    return start.checkpoint.state


def _own_lane_states(
    reader: CheckpointReader, config: RunConfig, topology: Topology
) -> Mapping[int, Any] | None:
    """The states of the lanes that this rank reads; None: it reads none, or the checkpoint has none."""
    if topology.rows_rank:
        return None
    lanes = config.data.lanes
    states = reader.lane_states(owned_lanes(lanes, topology.data_rank, topology.data_size), lanes)
    if any(state.get("lanes") != lanes for state in states.values()):  # all of them are needed to split them
        states = reader.lane_states()
    return states or None  # one that was made of weights alone has no lanes


def _open_data(
    corpus: Corpus, objective: Objective, topology: Topology, lane_states: Mapping[int, Any] | None
) -> TrainingData | None:
    data = None
    with together():
        if topology.rows_rank == 0:
            data = TrainingData(
                corpus,
                objective,
                dp_rank=topology.data_rank,
                dp_size=topology.data_size,
                tp_size=topology.tensor_size,
                cp_size=topology.context_size,
                lane_states=None if lane_states is None else dict(lane_states),
            )
    return data
