from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from end_to_end.conftest import tiny_data  # noqa: F401
from faults.harness import Ranks
from tiny_pipeline import REPOSITORY

STEPS = 40


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def start(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranks]:  # noqa: F811
    """Start the tiny run in a folder; its checkpoints come every five steps."""

    terminals = tmp_path_factory.mktemp("terminals")

    def run(
        folder: Path, *overrides: str, num_ranks: int = 2, fault: tuple[str, dict] | None = None
    ) -> Ranks:
        arguments: Sequence[str] = (
            *(
                "train",
                str(tiny_data / "tiny.yaml"),
                f"run.folder={folder.parent}",
                f"run.name={folder.name}",
            ),
            *(f"training.steps={STEPS}", "checkpoint.every_steps=5", "data.workers=0"),
            *("training.micro_batch_size=2", "data.evaluation=null"),
            *overrides,
        )
        log = terminals / f"{len(list(terminals.iterdir()))}.txt"
        log.touch()
        return Ranks(arguments, num_ranks, log, fault)

    return run
