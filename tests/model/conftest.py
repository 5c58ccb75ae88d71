from __future__ import annotations

from collections.abc import Iterator

import pytest

from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import Topology, build_topology, close_topology


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    """One rank alone, in this process."""
    device = open_process_group(find_launch({}), timeout_minutes=3)
    yield build_topology(1, device)
    close_topology()
