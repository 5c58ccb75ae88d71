"""The training loop: steps, and between them logging, evaluation, saving and stopping."""

from __future__ import annotations

import logging
from typing import Any

import torch
import yaml

from metalm.checkpoint.reader import CONFIG_NAME
from metalm.config import RunConfig, write_config
from metalm.data.loader import TrainingData
from metalm.errors import EXIT_DONE, EXIT_RESTART
from metalm.parallel.regions import broadcast_batches
from metalm.training.checkpoint import CheckpointStore
from metalm.training.evaluate import generate_samples, held_out_losses
from metalm.training.monitor import Monitor
from metalm.training.plan import describe_plan
from metalm.training.schedule import learning_rate
from metalm.training.session import Session, open_session, provenance
from metalm.training.step import StepResult, TrainStep
from metalm.training.stopping import StopRequest

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train a run to its last step, from its newest whole checkpoint if it has one.

    Returns:
        EXIT_DONE, or EXIT_RESTART when it was asked to stop and has saved.

    Collective: all ranks of the job.
    """
    with open_session(config) as session:
        run = _Run(config, session)
        try:
            return run.train()
        finally:
            run.close()


class _Run:
    """A run in progress on this rank."""

    def __init__(self, config: RunConfig, session: Session) -> None:
        self._config, self._session = config, session
        topology = session.topology
        self._stop = StopRequest(session.run_folder)
        if session.is_first:
            (session.run_folder / "checkpoints").mkdir(exist_ok=True)
            write_config(config, session.run_folder / CONFIG_NAME, provenance())
        self._store = CheckpointStore(session.run_folder, config, topology)
        self._train_step = TrainStep(session.engines, topology, len(config.data.sources))
        self._step, lane_states = 0, None
        self._trained_tokens = torch.zeros((), dtype=torch.float64)
        self._saved_step: int | None = None
        folder = self._store.newest_whole()
        if folder is not None:
            state = self._store.load(folder, session.engines)
            lane_states = self._store.lane_states(folder)
            self._step = int(state["step"])
            self._trained_tokens.fill_(state["progress"]["trained_tokens"])
            self._saved_step = self._step
            logger.info("resumed from %s", folder)
        self._monitor = Monitor(config, topology, session.run_folder, self._step + 1 if folder else 0)
        self._data: TrainingData | None = None
        if topology.tensor_rank == 0:
            self._data = TrainingData(
                config,
                dp_rank=topology.data_rank,
                dp_size=topology.data_size,
                tp_size=topology.tensor_size,
                lane_states=lane_states,
            )

    def train(self) -> int:
        config, monitor = self._config, self._monitor.write_texts
        total = config.training.steps
        if self._session.is_first:
            print(f"run {self._session.run_folder}, {self._session.topology.describe()}", flush=True)
            print(f"step {self._step} of {total}" + (" (resumed)" if self._saved_step else ""), flush=True)
            monitor({"config": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)})
            monitor({"plan": describe_plan(config, self._session.topology.world_size)})
        if self._step == 0:
            self._evaluate()
        while self._step < total:
            self._advance()
            if self._step % config.checkpoint.every_steps == 0 and self._step < total:
                self._save()
            if self._step < total and self._stop.agreed():
                return self._stop_early()
        if self._saved_step != total:
            self._save()
        return EXIT_DONE

    def close(self) -> None:
        if self._data is not None:
            self._data.close()
        self._monitor.close()

    def _advance(self) -> None:
        config, topology = self._config, self._session.topology
        batches = broadcast_batches(next(self._data) if self._data else None, topology)
        self._monitor.count(batches, self._data.wait_s if self._data else 0.0)
        self._step += 1
        training = config.training
        rate = learning_rate(self._step, training.optimizer.learning_rate, training.steps, training.schedule)
        result = self._train_step.run(batches, rate)
        self._log(result, rate)
        self._evaluate()

    def _log(self, result: StepResult, rate: float) -> None:
        self._trained_tokens += result.loss_counts.sum().cpu()
        if self._is_due(self._config.monitor.log_every_steps) or self._step == 1:
            counters = self._data.counters() if self._data else None
            self._monitor.log_step(self._step, result, rate, counters)

    def _evaluate(self) -> None:
        config, session, monitor = self._config, self._session, self._config.monitor
        engines, topology = session.engines, session.topology
        if config.data.evaluation and (self._is_due(monitor.evaluate_every_steps) or self._step == 0):
            losses = held_out_losses(engines, topology, config)
            if session.is_first:
                self._monitor.write_evaluation(self._step, losses)
            self._monitor.restart_window()
        if self._is_due(monitor.sample_every_steps) and self._step:
            for name in config.data.evaluation:
                samples = generate_samples(
                    engines, topology, config, name, monitor.num_samples, monitor.sample_new_tokens
                )
                if session.is_first:
                    self._monitor.write_samples(self._step, samples)
            self._monitor.restart_window()

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 or self._step == self._config.training.steps

    def _save(self) -> None:
        progress: dict[str, Any] = {"trained_tokens": float(self._trained_tokens)}
        lane_states = self._data.lane_states() if self._data else None
        folder = self._store.save(self._session.engines, self._step, lane_states, progress)
        self._saved_step = self._step
        logger.info("saved %s", folder)
        self._monitor.restart_window()

    def _stop_early(self) -> int:
        if self._saved_step != self._step:
            self._save()
        if self._session.is_first:
            self._stop.clear()
            print(
                f"stopped as asked after step {self._step}; the same command goes on from there", flush=True
            )
        return EXIT_RESTART
