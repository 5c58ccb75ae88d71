"""What a rank reads at its start does not grow with the ranks: counted for simulated ranks of 8 and of 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.many_ranks import jobs_of, write_checkpoint
from distributed.ranks import run_ranks
from metalm.config import config_content, load_config
from metalm.data.corpus import Corpus
from metalm.data.loader import TrainingData
from metalm.model.decoder import Decoder
from metalm.model.encoder import EncoderBank
from metalm.objectives import build_objective

LANES, PER_NODE = 64, 8
OVERRIDES = (
    *(f"data.lanes={LANES}", f"training.global_batch_size={LANES}", "data.workers=0"),
    # As the checkpoint was written: a rank finds all that it keeps in the files of one.
    *(f"deepspeed.{name}=deepspeed_configs/{name}_zero3.json" for name in ("decoder", "encoders")),
)


@pytest.fixture(scope="module")
def counted(topology: Any, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """By number of ranks and rank, what it opens and looks at; the run was written by as many ranks."""
    pipeline, found = tiny_data / "tiny.yaml", {}
    for ranks in (8, 64):
        runs = tmp_path_factory.mktemp(f"runs_of_{ranks}")
        write_run(pipeline, runs, ranks, topology)
        for rank in (0, 3):
            words = (f"{tiny_data}:{runs}", str(pipeline), str(ranks), str(PER_NODE), str(rank))
            (found[ranks, rank],) = run_ranks("count_start", 1, *words, *OVERRIDES, f"run.folder={runs}")
    return found


def write_run(pipeline: Path, runs: Path, ranks: int, topology: Any) -> None:
    config = load_config(pipeline, [*OVERRIDES, f"run.folder={runs}"])
    data = TrainingData(Corpus(config), build_objective(config), dp_rank=0, dp_size=1, tp_size=1)
    with torch.device("meta"):
        modules = {
            "decoder": Decoder(config.model, config.data.sequence_length, topology),
            "encoders": EncoderBank(config.model),
        }
    shapes = {
        component: {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for component, module in modules.items()
    }
    checkpoints = runs / config.run.name / "checkpoints"
    write_checkpoint(jobs_of(checkpoints, 2, ranks, shapes, data.lane_states(), config_content(config, {})))


def test_a_rank_opens_and_looks_at_no_more_files_among_more_ranks(counted: dict[Any, Any]) -> None:
    for rank in (0, 3):
        few, many = counted[8, rank], counted[64, rank]
        for part, counts in few.items():
            assert many[part]["opens"] <= counts["opens"], (rank, part)
            assert many[part]["stats"] <= counts["stats"], (rank, part)
    assert counted[64, 3]["weights"]["bytes"] < counted[8, 3]["weights"]["bytes"] / 4


def test_config_tokenizer_and_shards_are_read_once_a_node(counted: dict[Any, Any]) -> None:
    for ranks in (8, 64):
        assert counted[ranks, 0]["config, tokenizer and shards"]["stats"] > 0
        assert counted[ranks, 3]["config, tokenizer and shards"] == {"opens": 0, "stats": 0}
