"""What all tests share. The variables are set before torch and Triton are imported, which read them once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from built_once import built_once
from tiny_pipeline import prepare_tiny

# Threads of small operations that wait for each other on busy cores take fifty times the processor's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

pytest_plugins = ["corpora"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


FOLDERS_OF_TIERS = {
    "conversion": "slow",
    "distributed": "ranks",
    "end_to_end": "ranks",
    "faults": "ranks",
    "slurm": "slurm",
}
"""The markers of whole folders, by which `make` chooses tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in FOLDERS_OF_TIERS:
            item.add_marker(FOLDERS_OF_TIERS[folder])


@pytest.fixture(scope="session")
def topology() -> Iterator[Any]:
    """One rank alone, in this process; programs that tests start do not see its launch variables."""
    from metalm.parallel.launch import find_launch, open_process_group
    from metalm.parallel.topology import build_topology, close_topology

    before = dict(os.environ)
    device = open_process_group(find_launch({}), timeout_minutes=3)
    os.environ.clear()
    os.environ.update(before)
    yield build_topology(1, device)
    close_topology()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data in small, with `tiny.yaml`; shared by all worker processes, which must not change it."""
    return built_once(tmp_path_factory, "tiny", prepare_tiny)
