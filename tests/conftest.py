"""What all tests share. The variables are set before torch and Triton are imported, which read them once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Threads of small operations that wait for each other on busy cores take fifty times the processor's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

pytest_plugins = ["corpora"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
