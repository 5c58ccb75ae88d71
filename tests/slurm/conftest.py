"""The virtual cluster, and a run that is small enough for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from built_once import built_once
from slurm.virtual_cluster import VirtualCluster, why_not
from tiny_pipeline import prepare_tiny


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Three nodes for all tests; each test leaves them idle."""
    if reason := why_not():
        pytest.skip(reason)
    running = VirtualCluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline, longer, split over two tensor ranks and without evaluation; of all workers."""
    return built_once(tmp_path_factory, "slurm", prepare_pipeline) / "tiny.yaml"


def prepare_pipeline(folder: Path) -> None:
    prepare_tiny(folder)
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    config["parallel"]["tensor"] = 2
    config["data"] |= {"workers": 0, "evaluation": {}}
    config["training"]["steps"] = 16
    config["checkpoint"]["every_steps"] = 8
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
