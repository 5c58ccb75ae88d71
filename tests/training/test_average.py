"""The moving average of the weights, on one rank; on several see `distributed/test_average.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metalm.checkpoint.reader import AverageReader, CheckpointReader
from metalm.checkpoint.state import RunFacts
from metalm.config import AverageConfig
from metalm.data.corpus import Corpus
from metalm.errors import CheckpointError
from metalm.training.average import average_decay, averaged, update_average
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import Engines, build_engines
from metalm.training.owned_ranges import kept_ranges, push_masters, set_state
from metalm.training.start import decide_start, load_start
from training.test_start import config_with, weights

NAME = "gpt.decoder.layers.0.mlp.linear_fc1.weight"


@pytest.fixture(autouse=True)
def _as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def add_to_masters(engines: Engines, change: float) -> None:
    for engine in engines.by_component().values():
        for _, parameter, kept in list(kept_ranges(engine)):
            set_state(engine, parameter, "master", kept.states["master"] + change)
        push_masters(engine)


def test_decay_grows_to_the_given_one() -> None:
    config = AverageConfig(decay=0.9)
    assert [average_decay(step, config) for step in (1, 2, 90, 1000)] == pytest.approx(
        [2 / 11, 3 / 12, 0.9, 0.9]
    )


def test_is_the_weighted_mean_of_the_weights_so_far(topology: Any, tmp_path: Path) -> None:
    """Against numpy, from what is saved; and within `averaged` the model computes with it, no longer."""
    config = config_with(tmp_path, training__average={"decay": 0.9})
    engines = build_engines(config, topology)
    store = CheckpointStore(tmp_path / "tiny", config, topology)
    store.save(engines, 0, None, RunFacts())
    reader = CheckpointReader(tmp_path / "tiny" / "checkpoints" / "step_00000000")
    start = reader.read("decoder", NAME)
    assert torch.equal(reader.read("decoder", NAME, "average"), start)
    expected = start.numpy().astype(np.float64)
    for number, decay in enumerate((0.5, 0.75), start=1):
        add_to_masters(engines, 1.0)
        update_average(engines, decay)
        expected = decay * expected + (1 - decay) * (start.numpy() + number)
    token = torch.tensor([[7]])

    def embedded() -> torch.Tensor:
        with torch.no_grad():
            return engines.decoder.module.gpt.embedding.word_embeddings(token)

    before = embedded()
    with averaged(engines):
        assert embedded() == pytest.approx(before - 2 + (0.5 * 0.75 + 2 * 0.25), abs=1e-5)
    assert torch.equal(embedded(), before)
    store.save(engines, 2, None, RunFacts())
    folder = tmp_path / "tiny" / "checkpoints" / "step_00000002"
    saved = CheckpointReader(folder)
    assert saved.read("decoder", NAME) == pytest.approx(start + 2, abs=1e-5)
    assert AverageReader(folder).read("decoder", NAME) == pytest.approx(expected, abs=1e-5)


def test_begins_at_the_weights_of_a_checkpoint_that_has_none(topology: Any, tmp_path: Path) -> None:
    """Whether the run goes on from it or takes its weights alone."""
    plain = config_with(tmp_path)
    engines = build_engines(plain, topology)
    add_to_masters(engines, 1.0)
    store = CheckpointStore(tmp_path / "tiny", plain, topology)
    store.save(engines, 3, None, RunFacts())
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step_00000003"
    with pytest.raises(CheckpointError, match=r"has no average of its weights: .*training\.average"):
        AverageReader(checkpoint)
    changes = {"training__average": {}, "run__seed": 9}
    sources = {component: str(checkpoint) for component in ("decoder", "encoders")}
    for name, more in (("tiny", {}), ("other", {"run__name": "other", "initialize": sources})):
        config = config_with(tmp_path, **changes, **more)
        store = CheckpointStore(tmp_path / name, config, topology)
        start = decide_start(Corpus(config), store)
        going_on = build_engines(config, topology, start.given)
        load_start(start, config, topology, going_on)
        expected = weights(engines)
        with averaged(going_on):
            found = weights(going_on)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_a_run_goes_on_from_a_checkpoint_of_another(topology: Any, tmp_path: Path) -> None:
    """With its step and place in the data; once it has checkpoints of its own, from those."""
    config = config_with(tmp_path)
    store = CheckpointStore(tmp_path / "tiny", config, topology)
    engines = build_engines(config, topology)
    store.save(engines, 3, {0: "there"}, RunFacts())
    branch = config_with(tmp_path, run__name="branch", initialize={"run": str(tmp_path / "tiny")})
    own = CheckpointStore(tmp_path / "branch", branch, topology)
    start = decide_start(Corpus(branch), own)
    assert start.checkpoint is not None
    assert start.checkpoint.folder == tmp_path / "tiny" / "checkpoints" / "step_00000003"
    going_on = build_engines(branch, topology, start.given)
    state = load_start(start, branch, topology, going_on)
    assert state is not None and state.step == 3 and start.checkpoint.lane_states() == {0: "there"}
    own.save(going_on, 5, None, RunFacts())
    start = decide_start(Corpus(branch), own)
    assert start.checkpoint is not None and start.checkpoint.step == 5
