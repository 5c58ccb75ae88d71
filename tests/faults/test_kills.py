"""Ranks that are killed at any instant: the run goes on by the same command, and nothing shows."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.ranks import Ranks, wait_until
from faults.harness import content_of_newest, figures
from metalm.checkpoint.folders import is_whole
from metalm.checkpoint.names import PARTIAL_SUFFIX, list_checkpoints

RUNS = int(os.environ.get("KILLED_RUNS", "2"))
KILLS_PER_RUN = int(os.environ.get("KILLS_PER_RUN", "1"))
"""`make soak` sets more of both."""
LAYOUTS = (
    ("parallel.tensor=2", "deepspeed.encoders=deepspeed_configs/encoders_zero3.json"),
    ("deepspeed.decoder=deepspeed_configs/decoder_zero2.json", "training.deterministic=true"),
)


@pytest.fixture(scope="module", params=LAYOUTS, ids=["tp2_dp1", "tp1_dp2"])
def undisturbed(
    request: pytest.FixtureRequest, start: Callable[..., Ranks], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path, float]:
    """Layout, folder and seconds of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    began = time.monotonic()
    assert start(run, *request.param).wait() == [0, 0]
    return request.param, run, time.monotonic() - began


@pytest.mark.timeout(900 * KILLS_PER_RUN)
@pytest.mark.parametrize("number", range(max(1, RUNS // len(LAYOUTS))))
def test_a_killed_run_ends_as_the_undisturbed_one(
    number: int,
    undisturbed: tuple[tuple[str, ...], Path, float],
    start: Callable[..., Ranks],
    tmp_path: Path,
) -> None:
    layout, expected, whole_s = undisturbed
    chance = random.Random(f"{layout} {number}")
    run = tmp_path / "killed"
    for kill in range(KILLS_PER_RUN):
        ranks = start(run, *layout)
        if (number + kill + LAYOUTS.index(layout)) % 3 == 0:
            _wait_for_a_save(ranks, run / "checkpoints", chance.randrange(3))
            time.sleep(chance.uniform(0.0, 0.02))
        else:
            time.sleep(chance.uniform(0.0, 0.9 * whole_s))
        ranks.kill(victim := chance.randrange(2))
        assert ranks.wait()[victim] in (-signal.SIGKILL, 0)
        assert all(map(is_whole, list_checkpoints(run / "checkpoints")))
    published = list_checkpoints(run / "checkpoints")
    again = start(run, *layout)
    assert again.wait() == [0, 0], again.output()
    if published:
        assert f"step {int(published[-1].name[5:])} of 40, resumed" in again.output()
    for name in ("loss/all", "optimizer/gradient_norm", "data/fingerprint"):
        assert figures(run, name) == figures(expected, name), name
    assert content_of_newest(run) == content_of_newest(expected)
    assert not list((run / "checkpoints").glob(f"*{PARTIAL_SUFFIX}"))


def _wait_for_a_save(ranks: Ranks, checkpoints: Path, saves_before: int) -> None:
    """Until a checkpoint is being written, so many saves later than the newest one; or the run is over."""

    def newest() -> int:
        return max((int(folder.name[5:]) for folder in list_checkpoints(checkpoints)), default=0)

    first = newest() + 5 * saves_before
    wait_until(lambda: newest() >= first and any(checkpoints.glob(f"step_*{PARTIAL_SUFFIX}")), ranks)
