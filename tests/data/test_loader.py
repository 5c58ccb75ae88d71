"""The rows of a step depend on the seed, the config and the step alone, and a run goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.steps import data_of, global_rows, opened, with_data
from metalm.config.schema import RunConfig
from metalm.data.lane_workers import WorkerError
from metalm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def config(
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
    pair_source: Callable[..., Path],
) -> RunConfig:
    return make_config(
        {
            "prose": {"path": text_source([17, 40, 3]), "readers": {"text": "text"}, "weight": 2},
            "scenes": {"path": pair_source([20, 11]), "readers": {"image": "vision", "text": "vision"}},
        }
    )


STEPS = 200


@pytest.fixture(scope="module")
def reference(config: RunConfig) -> list[list[str]]:
    rows, _ = global_rows(config, STEPS, dp_size=1)
    assert len({digest for step in rows for digest in step}) > 0.99 * STEPS * 8
    return rows


@pytest.mark.parametrize(("dp_size", "tp_size"), [(2, 1), (4, 2), (1, 4)])
def test_rows_do_not_depend_on_the_ranks(
    config: RunConfig, reference: list[list[str]], dp_size: int, tp_size: int
) -> None:
    rows, _ = global_rows(config, STEPS, dp_size=dp_size, tp_size=tp_size)
    assert rows == reference


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_do_not_depend_on_the_workers(
    config: RunConfig, reference: list[list[str]], workers: int
) -> None:
    rows, _ = global_rows(with_data(config, workers=workers), STEPS, dp_size=1)
    assert rows == reference


def test_a_run_goes_on_on_other_ranks_and_workers(config: RunConfig, reference: list[list[str]]) -> None:
    states: dict[int, Any] | None = None
    done = 0
    for steps, dp_size, workers in [(1, 2, 0), (36, 1, 0), (30, 1, 2), (33, 4, 0), (50, 2, 1), (50, 1, 0)]:
        rows, states = global_rows(with_data(config, workers=workers), steps, dp_size=dp_size, states=states)
        assert rows == reference[done : done + steps]
        done += steps
    assert done == STEPS


def test_states_speak_of_the_last_step_returned_however_far_workers_are(config: RunConfig) -> None:
    with opened(config) as alone, opened(with_data(config, workers=2)) as prefetched:
        for _ in range(5):
            next(alone)
            next(prefetched)
            assert prefetched.lane_states() == alone.lane_states()
        time.sleep(0.3)
        assert prefetched.lane_states() == alone.lane_states()
        assert prefetched.counters() == alone.counters()


def test_states_before_the_first_step_begin_the_data(config: RunConfig, reference: list[list[str]]) -> None:
    with opened(config) as data:
        states = data.lane_states()
    assert global_rows(config, 2, dp_size=1, states=states)[0] == reference[:2]


def test_sources_are_drawn_by_weight(config: RunConfig) -> None:
    with opened(config) as data:
        ids = [int(i) for _ in range(150) for batch in next(data) for i in batch.source_ids]
    share, expected = np.mean(np.array(ids) == 0), 2 / 3
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(ids))


def test_weights_can_be_shares_of_tokens(
    make_config: Callable[..., RunConfig], text_source: Callable[..., Path], pair_source: Callable[..., Path]
) -> None:
    sources = {
        "prose": {"path": text_source([50]), "weight": 1},
        "scenes": {"path": pair_source([30]), "readers": {"image": "vision", "text": "vision"}, "weight": 1},
    }
    # An image of 4 patches fills little more than half of a row of 18.
    config = make_config(sources, data={"mixture_unit": "tokens", "sequence_length": 18})
    with opened(config) as data:
        for _ in range(300):
            next(data)
        counts = data.counters()
    assert counts["prose/rows"] < 0.9 * counts["scenes/rows"]
    assert counts["prose/tokens"] == pytest.approx(counts["scenes/tokens"], rel=0.1)


def test_counters_run_on_over_a_resume_and_add_up(config: RunConfig) -> None:
    with opened(config) as data:
        for _ in range(4):
            next(data)
        states = data.lane_states()
    with opened(config, lane_states=states) as data:
        batches = [batch for _ in range(4) for batch in next(data)]
        counts = data.counters()
    rows = counts["prose/rows"] + counts["scenes/rows"]
    assert rows == 8 * 8
    tokens = counts["prose/tokens"] + counts["scenes/tokens"]
    padding = counts["prose/padding_tokens"] + counts["scenes/padding_tokens"]
    assert tokens + padding == rows * 64
    assert counts["prose/padding_tokens"] == 0
    seen = sum(int((batch.attention_end == 0).sum()) for batch in batches)
    assert 0 < seen < padding


def test_a_source_may_come_go_and_change_its_weight(
    config: RunConfig, text_source: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(config) as data:
        for _ in range(5):
            next(data)
        states = data.lane_states()
    sources = dict(config.data.sources)
    del sources["scenes"]
    sources["prose"] = sources["prose"].model_copy(update={"weight": 5.0})
    sources["poems"] = sources["prose"].model_copy(update={"path": text_source([9]), "weight": 1.0})
    with caplog.at_level("INFO"), opened(with_data(config, sources=sources), lane_states=states) as data:
        before = data.counters()
        next(data)
        after = data.counters()
    for part in ("poems is new", "scenes was removed", "weight 2 is now 5"):
        assert part in caplog.text
    assert after["prose/samples"] >= before["prose/samples"] > 0


def test_shards_that_were_prepared_anew_are_told_and_the_same_ones_elsewhere_are_not(
    config: RunConfig, text_source: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(config) as data:
        next(data)
        states = data.lane_states()
    counts = [17, 40, 3]
    for path, is_told in ((text_source(counts), False), (text_source(counts, (3, 110)), True)):
        sources = {**config.data.sources}
        sources["prose"] = sources["prose"].model_copy(update={"path": path})
        caplog.clear()
        with opened(with_data(config, sources=sources), lane_states=states):
            told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [message.partition(":")[0] for message in told] == ["source prose"] * is_told


def test_a_state_of_another_order_is_refused(config: RunConfig) -> None:
    with opened(config) as data:
        states = data.lane_states()
    with pytest.raises(ConfigError, match=r"chunks of 3.*but is now.*chunks of 2"):
        data_of(with_data(config, chunk_samples=2), dp_rank=0, dp_size=1, tp_size=1, lane_states=states)
    with pytest.raises(ConfigError, match="not lane 3"):
        del states[3]
        data_of(config, dp_rank=0, dp_size=1, tp_size=1, lane_states=states)


@pytest.mark.parametrize(
    ("changes", "training", "dp_size", "message"),
    [
        ({}, {}, 3, "data.lanes is 4"),
        ({"lanes": 3}, {}, 1, "global_batch_size is 8"),
        ({}, {"micro_batch_size": 3}, 1, "micro_batch_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    config: RunConfig, changes: dict[str, Any], training: dict[str, Any], dp_size: int, message: str
) -> None:
    bad = with_data(config, **changes)
    bad = bad.model_copy(update={"training": bad.training.model_copy(update=training)})
    with pytest.raises(ConfigError, match=message):
        data_of(bad, dp_rank=0, dp_size=dp_size, tp_size=1)


def test_a_killed_worker_is_an_error_with_its_cause(config: RunConfig) -> None:
    with opened(with_data(config, workers=2)) as data:
        next(data)
        victim = data.worker_ids[1]
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(WorkerError, match=rf"process {victim}, lanes \[1, 3\].*SIGKILL"):
            for _ in range(100):
                next(data)
        with pytest.raises(WorkerError):
            next(data)


def test_signals_to_the_whole_group_leave_the_workers_to_their_parent(config: RunConfig) -> None:
    with opened(with_data(config, workers=2)) as data:
        next(data)
        for worker in data.worker_ids:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(worker, number)
        for _ in range(20):
            next(data)


def test_workers_do_not_pay_for_torch() -> None:
    program = "import sys, metalm.data.lane_workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_an_error_in_a_worker_is_the_error_of_the_step(
    config: RunConfig, text_source: Callable[..., Path]
) -> None:
    folder = text_source([30])
    source = config.data.sources["prose"].model_copy(update={"path": folder})
    changed = with_data(config, workers=1, sources={"prose": source})
    with opened(changed) as data:
        next(data)
    shard = next(folder.glob("*.tar"))
    damaged = bytearray(shard.read_bytes())
    for position in range(124, len(damaged), 512):
        damaged[position] ^= 1
    shard.write_bytes(damaged)
    with opened(changed) as data, pytest.raises(DataError, match=f"{shard.name} holds no member"):
        next(data)


PARENT = """
import os, signal, sys
from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.loader import TrainingData
from metalm.objectives.semi_causal import SemiCausal
if __name__ == "__main__":
    corpus = Corpus(RunConfig.model_validate_json(sys.stdin.read()))
    data = TrainingData(corpus, SemiCausal(), dp_rank=0, dp_size=1, tp_size=1)
    next(data)
    print(*data.worker_ids, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "failed":
        raise RuntimeError("the run failed")
"""


@pytest.mark.parametrize(("end", "code"), [("killed", -signal.SIGKILL), ("failed", 1)])
def test_no_worker_outlives_its_parent(config: RunConfig, tmp_path: Path, end: str, code: int) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    run = subprocess.run(
        [sys.executable, str(script), end],
        input=with_data(config, workers=2).model_dump_json(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == code, run.stderr
    workers = [int(word) for word in run.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker is alive 10 s after its parent ended"
        time.sleep(0.1)


def _runs(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
