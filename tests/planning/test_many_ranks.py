"""Groups and shards of 1,024 ranks, on a simulated process group with shapes on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from metalm.config import load_config
from metalm.planning.devices import find_device
from metalm.planning.plan import plan_run

RANKS, TENSOR = 1024, 8
PIPELINE = """
run: {name: paper_language}
parallel: {tensor: 8}
model:
  vocab_size: 64001
  decoder: {num_layers: 24, hidden_size: 2048, num_heads: 32}
  encoders:
    text: {num_layers: 24, hidden_size: 1024, num_heads: 16, max_text_positions: 512}
data:
  tokenizer: unused
  sequence_length: 2048
  lanes: 128
  sources: {text: {path: unused, readers: {text: text}}}
training: {steps: 300000, global_batch_size: 1024, micro_batch_size: 4}
"""


@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_a_simulated_rank_holds_what_the_plan_says(rank: int, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE)
    (found,) = run_ranks("simulate_ranks", 1, str(path), str(rank), str(RANKS))
    first = rank // TENSOR * TENSOR
    assert found["tensor_ranks"] == list(range(first, first + TENSOR))
    assert found["data_ranks"] == list(range(rank % TENSOR, RANKS, TENSOR))
    plan = plan_run(load_config(path), RANKS, find_device("h100"))
    for name, engine in plan.engines.items():
        assert found[name] == engine.count.per_rank
        assert found[f"{name}_shards"] == engine.shards
        assert engine.held.optimizer == 12 * -(-engine.count.per_rank // engine.shards)


def test_the_70b_pipeline_is_what_its_plan_says_and_fits_256_h100() -> None:
    """Shapes of a simulated rank of 1,024; the plan's range at both sizes."""
    (found,) = run_ranks("simulate_ranks", 1, "pipelines/pretrain_70b.yaml", "1023", str(RANKS))
    assert found["tensor_ranks"] == list(range(1016, 1024))
    config = load_config(Path("pipelines/pretrain_70b.yaml"))
    plan = plan_run(config, RANKS, find_device("h100"))
    for name, engine in plan.engines.items():
        assert found[name] == engine.count.per_rank
        assert found[f"{name}_shards"] == engine.shards
    assert 69e9 < plan.engines["decoder"].count.total < 71e9
    assert 2e9 < plan.engines["encoders"].count.total < 5e9
    for ranks in (256, RANKS):
        plan = plan_run(config, ranks, find_device("h100"))
        assert plan.fits
        least, most, causes = plan.range_s
        assert least < plan.step_s < most and causes


def test_pretraining_starts_on_1024_ranks() -> None:
    """With the lanes that the pipelines ship, at their own width of tensor parallelism."""
    for name in ("7b", "70b"):
        config = load_config(Path(f"pipelines/pretrain_{name}.yaml"))
        plan = plan_run(config, RANKS, find_device("h100"))
        assert plan.fits and config.data.lanes % (RANKS // config.parallel.tensor) == 0
