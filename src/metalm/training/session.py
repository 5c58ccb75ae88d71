"""What training and evaluation start with: ranks, topology, logs."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path

import torch

from metalm.data.corpus import Corpus
from metalm.errors import ConfigError, MetaLMError
from metalm.outputs import writing
from metalm.parallel.launch import Launch
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.run_folder import LOGS_NAME
from metalm.training.joining import Joined


@dataclass(frozen=True)
class Session:
    """The ranks of a job, joined; nothing is built or written yet."""

    launch: Launch
    topology: Topology
    corpus: Corpus
    run_folder: Path
    log: RunLog

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.topology.rank == 0


@contextmanager
def open_session(joined: Joined) -> Iterator[Session]:
    """Split the ranks that have joined.

    What is logged goes to the run's folder from `session.log.open` on; also when the block ends by a fault
    of ours before that, but not when it ends by a refusal, which changes nothing on disk.

    Args:
        joined: from `join`.

    Collective: all ranks.
    """
    launch, config = joined.launch, joined.corpus.config
    run_folder = config.run.folder / config.run.name
    log = RunLog(launch, run_folder)
    if config.training.deterministic:
        _make_deterministic()
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    topology = build_topology(
        config.parallel.tensor, joined.device, timeout, context_size=config.parallel.context
    )
    try:
        with _quiet_writers():
            yield Session(launch, topology, joined.corpus, run_folder, log)
    except MetaLMError:
        raise
    except Exception:
        with suppress(ConfigError):  # what there is to tell is the fault
            log.open()
        raise
    finally:
        close_topology()


class RunLog:
    """Everything that is logged: to `logs/rank_N.log` of the run, warnings of rank 0 to the terminal as well.

    Until the start is accepted, lines are kept in memory.
    """

    def __init__(self, launch: Launch, run_folder: Path) -> None:
        self._path = run_folder / LOGS_NAME / f"rank_{launch.rank:05d}.log"
        self._form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._kept: MemoryHandler | None = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        root.addHandler(self._kept)
        if launch.rank == 0:
            terminal = logging.StreamHandler()
            terminal.setLevel(logging.WARNING)
            terminal.setFormatter(self._form)
            terminal.addFilter(lambda record: record.name != "py.warnings")
            root.addHandler(terminal)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        logging.captureWarnings(True)
        deepspeed_logger = logging.getLogger("DeepSpeed")
        deepspeed_logger.handlers.clear()
        deepspeed_logger.propagate = True
        deepspeed_logger.setLevel(logging.INFO)
        # It calls each step that the guard refuses an overflow; the training loop says what it was.
        deepspeed_logger.addFilter(lambda record: "OVERFLOW!" not in record.getMessage())
        logging.getLogger("metalm").info(
            "rank %d of %d, started by %s", launch.rank, launch.world_size, launch.launcher
        )

    def open(self, elsewhere: Path | None = None) -> None:
        """Write what was kept, and all that follows, to the rank's file.

        Args:
            elsewhere: a folder that has it instead of the run's.

        Raises:
            ConfigError: it cannot be written.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            return
        path = self._path if elsewhere is None else elsewhere / LOGS_NAME / self._path.name
        with writing(path, "start this as a user who may write there, such as the run's owner"):
            path.parent.mkdir(parents=True, exist_ok=True)
            log_file = _LogFile(path)
        log_file.setFormatter(self._form)
        kept.setTarget(log_file)
        kept.flush()
        logging.getLogger().removeHandler(kept)
        logging.getLogger().addHandler(log_file)


class _LogFile(logging.FileHandler):
    """A rank's log, which may come to lie on a full disk: that is told once, and the training goes on."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            print(f"{self.baseFilename} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Let TensorBoard's writing threads end without a word on a full disk: our sinks tell it, once."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(failed.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _make_deterministic() -> None:
    """Refuse operations that may give other bits each time. Before CUDA starts."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # Nothing reads memory that nothing has written, and DeepSpeed's buckets of gigabytes would be filled at
    # every step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
