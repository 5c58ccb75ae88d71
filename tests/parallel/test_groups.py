"""The groups that a rank of a large job opens, on a simulated process group: its own, and few on gloo."""

from __future__ import annotations

import pytest

from distributed.ranks import run_ranks

TENSOR = 8


@pytest.mark.parametrize(("ranks", "rank"), [(64, 0), (1024, 0), (1024, 517)])
def test_a_rank_opens_its_own_groups_alone(ranks: int, rank: int) -> None:
    (found,) = run_ranks("count_groups", 1, str(TENSOR), str(rank), str(ranks))
    data = ranks // TENSOR
    for stage in ("topology", "with engines"):  # DeepSpeed opens none of its own
        assert found[stage]["calls"] == 5
        # One each of tensor, data and all ranks on gloo; beside them tensor, data and the rank alone on NCCL.
        assert (found[stage]["groups"], found[stage]["gloo"]) == (6, sorted([TENSOR, data, ranks]))
        assert found[stage]["peers"] == TENSOR - 1 + data - 1 + ranks - 1
