"""The training loop: steps, and between them logging, evaluation, saving and stopping."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import yaml

from metalm.checkpoint.state import Progress, RunFacts, RunState
from metalm.config import RunConfig
from metalm.config.schema import TasksConfig
from metalm.config.secrets import without_secrets
from metalm.errors import FaultError, MetaLMError
from metalm.evaluation.generation import generate_samples
from metalm.objectives import Objective, build_objective
from metalm.parallel.agreement import Verdict, raise_together
from metalm.progress import Phase
from metalm.run_metrics import read_metrics
from metalm.training.average import average_decay, update_average
from metalm.training.best import BestCheckpoint
from metalm.training.drift import find_drift
from metalm.training.dry_run import describe_plan
from metalm.training.ending import Ending, told_end
from metalm.training.evaluate_tasks import score_in_training
from metalm.training.guards import FINE, StepGuard
from metalm.training.held_out import measure_held_out
from metalm.training.joining import Joined
from metalm.training.monitor.figures import Figure
from metalm.training.monitor.monitor import Monitor
from metalm.training.monitor.profiling import StepProfiler
from metalm.training.schedule import learning_rate
from metalm.training.session import Session, open_session
from metalm.training.slow_ranks import SlowRanks
from metalm.training.start import StartedRun, start_run
from metalm.training.step import StepResult, TrainStep
from metalm.training.stopping import StopRequest
from metalm.training.upcoming import Feed, Upcoming
from metalm.training.verdicts import Verdicts

logger = logging.getLogger(__name__)


def train(joined: Joined) -> int:
    """Train a run to its last step, from its newest whole checkpoint if it has one.

    Args:
        joined: from `join`, with what `check_start` has checked.

    Returns:
        EXIT_DONE, or EXIT_RESTART when it was asked to stop and has saved.

    Raises:
        MetaLMError: ranks, data or checkpoints do not fit the run; alike on all ranks.

    Collective: all ranks of the job.
    """
    corpus = joined.corpus
    config, objective = corpus.config, build_objective(corpus.config)
    with (
        open_session(joined) as session,
        start_run(corpus, objective, session) as started,
        told_end(session) as ending,
    ):
        run = _Run(config, session, objective, started, ending)
        try:
            return run.train()
        finally:
            run.close()


class _Run:
    """A run in progress on this rank."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        objective: Objective,
        started: StartedRun,
        ending: Ending,
    ) -> None:
        self._config, self._session, self._ending = config, session, ending
        self._engines, self._store, self._data = started.engines, started.store, started.data
        self._watchdog, self._lock = started.watchdog, started.lock
        self._lane_states = started.lane_states
        topology = session.topology
        self._stop = StopRequest(
            session.run_folder, config.training.time_limit_minutes, watches_file=session.is_first
        )
        self._guard = StepGuard(config.guards, config.data.sources, topology.device)
        self._objective = objective
        self._train_step = TrainStep(
            self._engines,
            topology,
            len(config.data.sources),
            self._guard,
            self._objective,
        )
        self._slow_ranks = SlowRanks(topology, config.guards.slow_rank_ratio)
        self._tokenizer_fingerprint = session.corpus.tokenizer.fingerprint
        self._step = 0
        self._saved_step: int | None = None
        self._settled_step = -1
        """Whatever was due up to here is done."""
        self._gone_back_to: int | None = None
        """The step of the checkpoint of the last rewind, until a step is taken."""
        self._failed_saves = self._rewinds = self._skipped_in_a_row = 0
        self._verdicts = Verdicts()
        self._trained_tokens = torch.zeros((), dtype=torch.float64, device=topology.device)
        self._upcoming: Upcoming | None = None
        """Fetched, and not yet run."""
        self._feed = Feed(
            self._data, topology, config.model, self._own_verdict, has_failed=self._store.has_failed
        )
        if started.state is not None:
            self._take_up(started.state)
            self._saved_step, self._settled_step = self._step, self._step - 1
            if started.state.guard is not None:
                self._guard.load(started.state.guard)
        self._best: BestCheckpoint | None = None
        if (best := config.checkpoint.keep_best) is not None:
            self._best = BestCheckpoint(
                session.run_folder, best, last_step=self._step, is_first=session.is_first
            )
        first_step = 0 if self._saved_step is None else self._step + 1
        self._profiler = StepProfiler(config.monitor, topology.rank, session.run_folder)
        self._monitor = Monitor(config, topology, session.run_folder, first_step, self._train_step.timer)

    def train(self) -> int:
        self._announce()
        if self._step == 0 or self._has_not_evaluated():
            self._measure()
            self._sample_and_score()
        self._settled_step = self._step
        is_first = True
        while self._step < self._config.training.steps:
            with Phase("the first step", told=True) if is_first else nullcontext():
                upcoming, self._upcoming = self._upcoming or self._fetch(), None
                if upcoming.verdict is Verdict.FAIL:
                    self._save_what_is_new()
                if upcoming.verdict in (Verdict.FAIL, Verdict.LOST):
                    raise_together(upcoming.error)
                if upcoming.verdict is Verdict.STOP:
                    return self._stop_early()
                self._advance(upcoming)
            is_first = False
            if self._step % self._config.guards.drift_every_steps == 0:
                self._refuse_drift()
            if problem := self._find_harm():
                self._rewind(problem)
            elif not self._skipped_in_a_row:
                self._do_what_is_due()
            # else what is due waits for a step that is taken: these weights may be why none is
        return self._ending.done()

    def _do_what_is_due(self) -> None:
        is_last = self._upcoming is None
        if self._is_due(self._config.checkpoint.every_steps):
            self._save(background=self._config.checkpoint.background and not is_last)
        if self._upcoming is None:  # it was measured before it was saved
            self._sample_and_score()
        elif self._upcoming.verdict is Verdict.GO_ON:
            self._measure()
            self._sample_and_score()
        # else the run ends now, and its next start evaluates what it goes on from
        self._settled_step = self._step

    def close(self) -> None:
        self._profiler.close()
        self._feed.close()
        self._monitor.close()

    def _take_up(self, state: RunState) -> None:
        """Everything but the place in the data, the guard and what the engines hold."""
        self._step = self._ending.step = state.step
        self._trained_tokens.fill_(state.progress.trained_tokens)

    def _announce(self) -> None:
        config, session = self._config, self._session
        if not session.is_first:
            return
        resumed = "" if self._saved_step is None else ", resumed from the checkpoint"
        self._monitor.say(f"run {session.run_folder}: {session.topology.describe()}")
        self._monitor.say(f"step {self._step} of {config.training.steps}{resumed}")
        self._monitor.write_text("config", yaml.safe_dump(without_secrets(config), sort_keys=False))
        self._monitor.write_text("plan", describe_plan(config, session.topology.world_size))

    def _fetch(self) -> Upcoming:
        """The next step, whose upload begins.

        Collective: all ranks, over gloo.
        """
        upcoming = self._feed.fetch(is_logged=self._is_logged(self._step + 1))
        if upcoming.save_failed:
            self._tell_failed_save(self._store.finish())
        if upcoming.batches:
            self._train_step.begin(upcoming.batches)
        return upcoming

    def _own_verdict(self, error: MetaLMError | None) -> tuple[Verdict, MetaLMError | None]:
        """What this rank asks for before a step, and why, given what came of reading its data."""
        if self._lock is not None and self._lock.is_lost():
            taken = FaultError(f"a later start of this job has taken the run {self._session.run_folder}")
            return Verdict.LOST, taken
        if error is not None:
            return Verdict.FAIL, error
        return (Verdict.STOP if self._stop.is_asked() else Verdict.GO_ON), None

    def _advance(self, upcoming: Upcoming) -> None:
        """A step, the fetching of the next one beside it, and what is shown of it."""
        self._step += 1
        is_logged = self._is_logged(self._step)
        with self._profiler.step(self._step):
            result, rate = self._run(upcoming)
            self._take_verdicts(everything=is_logged or self._is_anything_due())
        self._slow_ranks.count(upcoming.agreeing_s, upcoming.wait_s)
        self._monitor.show_masks(upcoming.batches[0])
        counts = None if upcoming.counts is None else upcoming.counts.result()
        self._monitor.count(counts, upcoming.wait_s)
        if is_logged:
            self._log(result, rate, upcoming)

    def _run(self, upcoming: Upcoming) -> tuple[StepResult, float]:
        """Queue a step on the device and fetch the next one while it runs; the learning rate as well."""
        training = self._config.training
        rate = learning_rate(self._step, training.optimizer.learning_rate, training.steps, training.schedule)
        result = self._train_step.run(upcoming.batches, rate)
        self._ending.step = self._step
        self._watchdog.beat(f"step {self._step + 1}")
        self._verdicts.add(self._step, result.verdict, self._guard.judged)
        is_taken = result.verdict == FINE
        self._trained_tokens += torch.where(is_taken, result.loss_counts.sum(), 0.0)
        if training.average is not None:
            update_average(self._engines, average_decay(self._step, training.average), is_taken)
        self._lane_states = upcoming.lane_states
        self._upcoming = self._fetch() if self._step < training.steps else None
        return result, rate

    def _take_verdicts(self, *, everything: bool) -> None:
        """Count steps that were refused: see `Verdicts.read`."""
        for found in self._verdicts.read(everything=everything):
            if found.is_refused:
                self._skipped_in_a_row += 1
                self._engines.count_skipped()
                logger.warning("step %d is skipped: %s", found.step, self._guard.explain(found.judged))
            else:
                self._skipped_in_a_row = 0
                self._gone_back_to = None

    def _log(self, result: StepResult, rate: float, upcoming: Upcoming) -> None:
        figures, lines = self._slow_ranks.report()
        for line in lines:
            logger.warning(line)
        _, not_finite, spikes = self._guard.skipped.tolist()
        guards = {
            "guards/skipped_not_finite": not_finite,
            "guards/skipped_spikes": spikes,
            "guards/rewinds": self._rewinds,
            "guards/failed_saves": self._failed_saves,
        }
        of_data = upcoming.figures
        if of_data is not None and upcoming.fingerprint is not None:
            of_data = {**of_data, "data/fingerprint": Figure(upcoming.fingerprint.result(), sum)}
        self._monitor.log_step(self._step, result, rate, of_data, {**guards, **figures})

    def _find_harm(self) -> str | None:
        """Why the run must go back, if it must; at the last step the held-out losses are measured for it."""
        skipped = self._skipped_in_a_row
        if skipped > self._config.guards.max_skipped_steps:
            return f"{skipped} steps in a row were skipped up to step {self._step}"
        if self._step < self._config.training.steps:
            return None
        if skipped:
            return f"the last step, {self._step}, was skipped"
        found = [self._measure()]
        dist.broadcast_object_list(found)
        return found[0]

    def _rewind(self, problem: str) -> None:
        """Go back to a checkpoint, but not in the data: what could not be trained on is skipped.

        It is the newest from before the harm was seen. Where no step was taken after that, its weights may be
        harmed, too: then it is one before it, if there is one.

        Raises:
            FaultError: there is no checkpoint, or this has been done too often.
        """
        guards = self._config.guards
        self._tell_failed_save(self._store.finish())
        if self._rewinds == guards.max_rewinds:
            raise FaultError(f"{problem}, after {self._rewinds} rewind(s); see the loss and gradient norms")
        folder = self._store.newest_whole(before=self._gone_back_to) if self._gone_back_to else None
        folder = folder or self._store.newest_whole(before=self._step - self._skipped_in_a_row + 1)
        if folder is None:
            raise FaultError(
                f"{problem}, and there is no checkpoint to go back to: see the loss and gradient norms, and "
                "save more often (checkpoint.every_steps)"
            )
        state = self._store.load(folder, self._engines)
        self._store.remove_later(state.step)
        self._take_up(state)
        self._guard.go_back(state.guard)
        self._saved_step = None  # the place in the data is another
        self._gone_back_to = self._settled_step = self._step
        self._verdicts.forget()
        if self._upcoming is not None and self._is_logged(self._step + 1):
            self._upcoming = self._feed.described(self._upcoming)
        self._rewinds += 1
        self._skipped_in_a_row = 0
        self._monitor.begin(self._step + 1)
        if self._best is not None:
            self._best.go_back(self._step)
        logger.error("%s: back to step %d with the weights, on with the data", problem, self._step)

    def _refuse_drift(self) -> None:
        """End the run where replicas differ, before it is saved.

        Raises:
            FaultError: on all ranks alike.
        """
        problems = find_drift(self._engines, self._session.topology)
        if problems:
            shown = [f"  {problem}" for problem in problems[:10]]
            raise FaultError(
                "\n".join(
                    [f"{len(problems)} parameter(s) differ between replicas at step {self._step}:", *shown]
                )
            )

    def _measure(self) -> str | None:
        """The held-out losses, where they are due; answer which are not finite, if any."""
        session = self._session
        if not self._is_due(self._config.monitor.evaluate_every_steps):
            return None
        self._watchdog.beat("evaluating")
        with self._monitor.apart("evaluate", self._step):
            parts = (self._engines, session.topology, session.corpus, self._objective)
            losses = measure_held_out(*parts, partial(self._watchdog.beat, "evaluating"))
        if session.is_first and losses:
            self._monitor.write_evaluation(self._step, losses)
        if self._best is not None:
            self._best.measured(self._step, losses)
        self._watchdog.beat(f"step {self._step + 1}")
        bad = ", ".join(f"{name} {loss}" for name, loss in losses.items() if not math.isfinite(loss))
        return f"held-out losses at step {self._step} are not finite: {bad}" if bad else None

    def _sample_and_score(self) -> None:
        """Samples and scores on tasks, where they are due."""
        monitor, session = self._config.monitor, self._session
        if self._objective.generates and self._step and self._is_due(monitor.sample_every_steps):
            parts = (self._engines, session.topology, session.corpus)
            with self._monitor.apart("sample", self._step):
                for name, source in session.corpus.held_out.items():
                    self._watchdog.beat(f"generating samples of {name}")
                    samples = generate_samples(*parts, source, monitor.num_samples, monitor.sample_new_tokens)
                    if session.is_first:
                        self._monitor.write_samples(self._step, samples)
            self._watchdog.beat(f"step {self._step + 1}")

        if monitor.tasks is not None and self._step and self._is_due(monitor.tasks.every_steps):
            self._watchdog.beat("scoring tasks")
            self._score(monitor.tasks)
            self._watchdog.beat(f"step {self._step + 1}")

    def _score(self, tasks: TasksConfig) -> None:
        """Score the run on its tasks; where they cannot be, that is told, and the training goes on."""
        session = self._session
        out = session.run_folder / "tasks" / f"step_{self._step:08d}"
        beat = partial(self._watchdog.beat, "scoring tasks")
        try:
            with self._monitor.apart("tasks", self._step):
                parts = (self._engines, session.topology, session.corpus)
                scores = score_in_training(*parts, tasks, out, beat)
        except MetaLMError as error:  # all ranks meet the same one
            logger.error("tasks are not scored at step %d: %s; the training goes on", self._step, error)
            return
        if session.is_first:
            self._monitor.write_scores(self._step, scores)

    def _has_not_evaluated(self) -> bool:
        """Whether the checkpoint that the run resumed from was saved, but its evaluation not written."""
        data, monitor = self._config.data, self._config.monitor
        wanted = ["held_out/"] if data.evaluation and self._is_due(monitor.evaluate_every_steps) else []
        if data.evaluation and self._objective.generates and self._is_due(monitor.sample_every_steps):
            wanted.append("time/apart/sample")
        wanted += ["tasks/"] if monitor.tasks and self._is_due(monitor.tasks.every_steps) else []
        if not wanted:
            return False
        is_missing = [False]
        if self._session.is_first:
            entries = read_metrics(self._session.run_folder)
            names = [name for entry in entries if entry["step"] == self._step for name in entry]
            is_missing = [not all(any(name.startswith(kind) for name in names) for kind in wanted)]
        dist.broadcast_object_list(is_missing)
        return is_missing[0]

    def _is_logged(self, step: int) -> bool:
        return (
            step == 1
            or step % self._config.monitor.log_every_steps == 0
            or step == self._config.training.steps
        )

    def _is_due(self, every: int) -> bool:
        """Whether something is to be done now, or has waited since a step that was refused."""
        waits = self._step // every > self._settled_step // every
        return waits or self._step == self._config.training.steps

    def _is_anything_due(self) -> bool:
        monitor = self._config.monitor
        every = [
            self._config.checkpoint.every_steps,
            monitor.evaluate_every_steps,
            monitor.sample_every_steps,
        ]
        if monitor.tasks is not None:
            every.append(monitor.tasks.every_steps)
        return any(map(self._is_due, every))

    def _save(self, *, background: bool) -> None:
        """Save what the steps have reached, the last of which was taken: its verdict is known."""
        facts = RunFacts(
            progress=Progress(trained_tokens=float(self._trained_tokens)),
            tokenizer=self._tokenizer_fingerprint,
            guard=self._guard.state(),
        )
        lane_states = self._lane_states if self._data is not None else None
        self._watchdog.beat("saving")
        with self._monitor.apart("save", self._step):
            if self._best is not None:
                self._tell_failed_save(self._store.finish())
                self._best.settle()  # before old checkpoints go
            problem = self._store.save(self._engines, self._step, lane_states, facts, background=background)
            if self._best is not None and not background:
                self._best.settle()
        self._tell_failed_save(problem)
        self._saved_step = self._step
        self._watchdog.beat(f"step {self._step + 1}")

    def _tell_failed_save(self, problem: str | None) -> None:
        if problem is not None:
            self._failed_saves += 1
            self._saved_step = None
            logger.error("%s; the training goes on", problem)

    def _save_what_is_new(self) -> None:
        """Before the run ends: what was trained since the last checkpoint, if anything.

        While steps are refused nothing is: the weights may be why, and would be what the run goes on from.
        """
        self._tell_failed_save(self._store.finish())
        self._take_verdicts(everything=True)
        if not self._skipped_in_a_row and self._saved_step != self._step and self._step:
            self._save(background=False)

    def _stop_early(self) -> int:
        self._save_what_is_new()
        reason = self._stop.reason()
        if self._session.is_first:
            self._stop.clear()
        return self._ending.stopped(reason, skipped=self._skipped_in_a_row)
