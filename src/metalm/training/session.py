"""What training and evaluation start with: ranks, topology, logs, engines."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metalm import __version__
from metalm.commit import git_commit
from metalm.data.corpus import Corpus
from metalm.parallel.launch import Launch, find_launch, open_process_group
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.training.engines import Engines, build_engines


@dataclass(frozen=True)
class Session:
    """The ranks of a job with the model built on them."""

    launch: Launch
    topology: Topology
    corpus: Corpus
    engines: Engines
    run_folder: Path

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.topology.rank == 0


@contextmanager
def open_session(corpus: Corpus) -> Iterator[Session]:
    """Join the ranks and build the model.

    Args:
        corpus: from `check_start`.

    Collective: all ranks.
    """
    launch = find_launch(os.environ)
    config = corpus.config
    run_folder = config.run.folder / config.run.name
    _open_log(run_folder, launch)
    if config.training.deterministic:
        _make_deterministic()
    device = open_process_group(launch, config.parallel.timeout_minutes)
    topology = build_topology(config.parallel.tensor, device)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the libraries greet on every rank
            engines = build_engines(config, topology)
        yield Session(launch, topology, corpus, engines, run_folder)
    finally:
        close_topology()


def provenance() -> dict[str, Any]:
    """Versions and code that a run was started with."""
    packages = ("torch", "deepspeed", "megatron-core", "transformers", "webdataset", "numpy")
    return {
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "versions": {"metalm": __version__, **{package: _version(package) for package in packages}},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a plain folder, by PYTHONPATH
        return "not installed"


def _make_deterministic() -> None:
    """Refuse operations that may give other bits each time. Before CUDA starts."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _open_log(run_folder: Path, launch: Launch) -> None:
    """Everything to `logs/rank_N.log`; warnings of rank 0 to the terminal as well."""
    folder = run_folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    log_file = logging.FileHandler(folder / f"rank_{launch.rank:05d}.log")
    log_file.setFormatter(form)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(log_file)
    if launch.rank == 0:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(form)
        terminal.addFilter(lambda record: record.name != "py.warnings")
        root.addHandler(terminal)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.captureWarnings(True)
    deepspeed_logger = logging.getLogger("DeepSpeed")
    deepspeed_logger.handlers.clear()
    deepspeed_logger.propagate = True
    deepspeed_logger.setLevel(logging.INFO)
    logging.getLogger("metalm").info(
        "rank %d of %d, started by %s", launch.rank, launch.world_size, launch.launcher
    )
