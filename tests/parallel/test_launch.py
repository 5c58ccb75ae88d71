from __future__ import annotations

import pytest

from metalm.errors import TopologyError
from metalm.parallel.launch import find_launch, first_host

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41007"}


def test_torchrun() -> None:
    launch = find_launch(TORCHRUN)
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 8, 1)
    assert (launch.master_address, launch.master_port, launch.launcher) == ("n1", 29500, "torchrun")


def test_slurm_tasks_meet_on_the_first_node_at_a_port_of_the_job() -> None:
    launch = find_launch({**SLURM, "SLURM_STEP_NODELIST": "gpu[003-007,9],other"})
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 16, 1)
    assert (launch.master_address, launch.launcher) == ("gpu003", "slurm")
    assert (
        launch.master_port
        != find_launch({**SLURM, "SLURM_STEP_NODELIST": "a", "SLURM_JOB_ID": "41008"}).master_port
    )


def test_torchrun_inside_a_slurm_job_wins() -> None:
    assert find_launch({**SLURM, **TORCHRUN}).launcher == "torchrun"


def test_alone_also_inside_a_single_slurm_task() -> None:
    for environment in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}):
        launch = find_launch(environment)
        assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "alone")


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_refused(missing: str) -> None:
    with pytest.raises(TopologyError, match=missing):
        find_launch({name: value for name, value in TORCHRUN.items() if name != missing})


def test_words_for_numbers_are_refused() -> None:
    with pytest.raises(TopologyError, match="not numbers"):
        find_launch({**TORCHRUN, "RANK": "first"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node7", "node7"), ("a-1.example,b", "a-1.example"), ("n[05,7-9]", "n05"), ("r[1-2]-x", "r1-x")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_no_host_is_refused() -> None:
    with pytest.raises(TopologyError):
        first_host("")
