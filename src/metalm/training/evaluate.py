"""`metalm evaluate`: the held-out losses of a run's newest checkpoint, and captions and continuations."""

from __future__ import annotations

import json

from metalm.checkpoint.reader import CheckpointReader
from metalm.data.corpus import Corpus
from metalm.errors import CheckpointError, ConfigError
from metalm.evaluation.generation import generate_samples
from metalm.objectives import build_objective
from metalm.outputs import require_folder_place
from metalm.parallel.agreement import together
from metalm.progress import Phase
from metalm.regular_files import replace_file
from metalm.run_folder import LOGS_NAME
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import Engines, build_engines
from metalm.training.held_out import measure_held_out
from metalm.training.joining import Joined
from metalm.training.session import Session, open_session
from metalm.training.start import Start, go_on_from, load_start


def evaluate(joined: Joined, num_samples: int) -> int:
    """Evaluate a run's newest whole checkpoint; writes `evaluation.json` and `samples_SOURCE.jsonl`.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        ConfigError: the run has no held-out source, or its folder cannot be written.

    Collective: all ranks.
    """
    corpus, config = joined.corpus, joined.corpus.config
    if not config.data.evaluation:
        raise ConfigError("data.evaluation has no source to evaluate on")
    objective = build_objective(config)
    with open_session(joined) as session:
        with together():
            if session.is_first:
                require_folder_place(session.run_folder / LOGS_NAME, "evaluate as a user who may write there")
        engines, checkpoint = load_newest(corpus, session)
        step = checkpoint.step
        session.log.open()
        losses = measure_held_out(engines, session.topology, corpus, objective)
        for name, source in corpus.held_out.items() if objective.generates else ():
            samples = generate_samples(
                engines,
                session.topology,
                corpus,
                source,
                num_samples,
                config.monitor.sample_new_tokens,
            )
            if session.is_first:
                lines = (json.dumps({"reference": s.reference, "generated": s.generated}) for s in samples)
                replace_file(session.run_folder / f"samples_{name}.jsonl", "\n".join(lines) + "\n")
        if session.is_first:
            result = {"step": step, "losses": losses}
            replace_file(session.run_folder / "evaluation.json", json.dumps(result, indent=1) + "\n")
            for name, loss in losses.items():
                print(f"{name:<40} {loss:8.4f} {objective.loss_unit}".rstrip())
    return 0


def load_newest(corpus: Corpus, session: Session) -> tuple[Engines, CheckpointReader]:
    """The engines of a run's newest whole checkpoint, and that checkpoint.

    Raises:
        CheckpointError: the run has no whole checkpoint.

    Collective: all ranks.
    """
    config, topology = corpus.config, session.topology
    store = CheckpointStore(session.run_folder, config, topology)
    with Phase("looking for a checkpoint", told=True):
        folder = store.newest_whole()
    start = Start() if folder is None else go_on_from(folder, corpus, store)
    if start.checkpoint is None:
        raise CheckpointError(f"{session.run_folder} has no checkpoint to evaluate")
    with Phase("building the model and its engines", told=True):
        engines = build_engines(config, topology, start.given)
    load_start(start, config, topology, engines)
    return engines, start.checkpoint
