from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.ranks import Ranks
from faults.harness import Fault, start_ranks
from tiny_pipeline import REPOSITORY

STEPS = 40


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def start(tiny_data: Path) -> Callable[..., Ranks]:
    """Start the tiny run in a folder; its checkpoints come every five steps."""

    def run(folder: Path, *overrides: str, num_ranks: int = 2, fault: Fault | None = None) -> Ranks:
        arguments = [
            *(
                "train",
                str(tiny_data / "tiny.yaml"),
                f"run.folder={folder.parent}",
                f"run.name={folder.name}",
            ),
            *(f"training.steps={STEPS}", "checkpoint.every_steps=5", "data.workers=0"),
            *("training.micro_batch_size=2", "data.evaluation=null"),
            *overrides,
        ]
        return start_ranks(arguments, num_ranks, fault)

    return run
