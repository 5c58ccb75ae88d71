"""The training loop: steps, and between them logging, evaluation, saving and stopping."""

from __future__ import annotations

import logging
from typing import Any

import torch
import yaml

from metalm.batch import SemiCausalBatch
from metalm.checkpoint.reader import CONFIG_NAME
from metalm.config import RunConfig, write_config
from metalm.data.loader import TrainingData
from metalm.data.tokenizer import load_tokenizer
from metalm.errors import EXIT_DONE, EXIT_RESTART, MetaLMError
from metalm.parallel.agreement import Verdict, agree, raise_together
from metalm.parallel.regions import broadcast_batches
from metalm.training.checkpoint import CheckpointStore
from metalm.training.evaluate import generate_samples, held_out_losses
from metalm.training.monitor import Monitor
from metalm.training.plan import describe_plan
from metalm.training.schedule import learning_rate
from metalm.training.session import Session, open_session, provenance
from metalm.training.step import TrainStep
from metalm.training.stopping import StopRequest

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train a run to its last step, from its newest whole checkpoint if it has one.

    Returns:
        EXIT_DONE, or EXIT_RESTART when it was asked to stop and has saved.

    Raises:
        MetaLMError: ranks, data or checkpoints do not fit the run; alike on all ranks.

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
        self._tokenizer_fingerprint = load_tokenizer(config.data.tokenizer).fingerprint
        self._step = 0
        self._saved_step: int | None = None
        self._trained_tokens = torch.zeros((), dtype=torch.float64)
        self._lane_states: dict[int, Any] | None = None
        self._restore()
        self._data = self._open_data()
        first_step = 0 if self._saved_step is None else self._step + 1
        self._monitor = Monitor(config, topology, session.run_folder, first_step)

    def train(self) -> int:
        self._announce()
        if self._step == 0:
            self._evaluate()
        while self._step < self._config.training.steps:
            batches = self._next_batches()
            if batches is None:
                return self._stop_early()
            self._advance(batches)
            if self._is_due(self._config.checkpoint.every_steps):
                self._save()
            self._evaluate()
        return EXIT_DONE

    def close(self) -> None:
        if self._data is not None:
            self._data.close()
        self._monitor.close()

    def _restore(self) -> None:
        folder = self._store.newest_whole()
        if folder is None:
            return
        state = self._store.load(folder, self._session.engines)
        self._lane_states = (
            self._store.lane_states(folder) or None
        )  # none in one made from a Hugging Face folder
        self._step = self._saved_step = int(state["step"])
        self._trained_tokens.fill_(state["progress"]["trained_tokens"])
        logger.info("resumed from %s", folder)

    def _open_data(self) -> TrainingData | None:
        """The data of this rank's TP group, on its first rank."""
        topology, data, error = self._session.topology, None, None
        if topology.tensor_rank == 0:
            try:
                data = TrainingData(
                    self._config,
                    dp_rank=topology.data_rank,
                    dp_size=topology.data_size,
                    tp_size=topology.tensor_size,
                    lane_states=self._lane_states,
                )
            except MetaLMError as found:
                error = found
        raise_together(error)
        return data

    def _announce(self) -> None:
        config, session = self._config, self._session
        if not session.is_first:
            return
        resumed = "" if self._saved_step is None else ", resumed from the checkpoint"
        print(f"run {session.run_folder}: {session.topology.describe()}", flush=True)
        print(f"step {self._step} of {config.training.steps}{resumed}", flush=True)
        self._monitor.write_text("config", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        self._monitor.write_text("plan", describe_plan(config, session.topology.world_size))

    def _next_batches(self) -> list[SemiCausalBatch] | None:
        """The micro-batches of the next step, None if the run is to stop before it.

        Data that is fetched but not trained on does not count: lane states follow the steps done.
        """
        batches, error, wait_s = None, None, 0.0
        if self._data is not None:
            try:
                batches = next(self._data)
                wait_s = self._data.wait_s
            except MetaLMError as found:
                error = found
        own = Verdict.FAIL if error else Verdict.STOP if self._stop.is_asked() else Verdict.GO_ON
        verdict = agree(own)
        if verdict is Verdict.FAIL:
            raise_together(error)
        if verdict is Verdict.STOP:
            return None
        batches = broadcast_batches(batches, self._session.topology)
        self._monitor.count(batches, wait_s)
        return batches

    def _advance(self, batches: list[SemiCausalBatch]) -> None:
        training = self._config.training
        self._step += 1
        rate = learning_rate(self._step, training.optimizer.learning_rate, training.steps, training.schedule)
        result = self._train_step.run(batches, rate)
        self._trained_tokens += result.loss_counts.sum().cpu()
        if self._data is not None:
            self._lane_states = self._data.lane_states()
        if self._is_due(self._config.monitor.log_every_steps) or self._step == 1:
            self._monitor.log_step(self._step, result, rate, self._data)

    def _evaluate(self) -> None:
        config, session = self._config, self._session
        monitor, parts = config.monitor, (session.engines, session.topology, config)
        if self._step == 0 or self._is_due(monitor.evaluate_every_steps):
            losses = held_out_losses(*parts)
            if session.is_first and losses:
                self._monitor.write_evaluation(self._step, losses)
            self._monitor.restart_window()
        if self._step and self._is_due(monitor.sample_every_steps):
            for name in config.data.evaluation:
                samples = generate_samples(*parts, name, monitor.num_samples, monitor.sample_new_tokens)
                if session.is_first:
                    self._monitor.write_samples(self._step, samples)
            self._monitor.restart_window()

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 or self._step == self._config.training.steps

    def _save(self) -> None:
        facts = {
            "progress": {"trained_tokens": float(self._trained_tokens)},
            "tokenizer": self._tokenizer_fingerprint,
        }
        lane_states = self._lane_states if self._data is not None else None
        folder = self._store.save(self._session.engines, self._step, lane_states, facts)
        self._saved_step = self._step
        logger.info("saved %s", folder)
        self._monitor.restart_window()

    def _stop_early(self) -> int:
        if self._saved_step != self._step and self._step:
            self._save()
        if self._session.is_first:
            self._stop.clear()
            print(
                f"stopped as asked after step {self._step}; the same command goes on from there", flush=True
            )
        return EXIT_RESTART
