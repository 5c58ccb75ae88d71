from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from end_to_end.conftest import REPOSITORY, tiny_data  # noqa: F401
from faults.harness import Ranks

STEPS = 40


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def start(tiny_data: Path) -> Callable[..., Ranks]:  # noqa: F811
    """Start the tiny run in a folder; its checkpoints come every five steps."""

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
        folder.mkdir(parents=True, exist_ok=True)
        return Ranks(arguments, num_ranks, folder / "terminal.txt", fault)

    return run
