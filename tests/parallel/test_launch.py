from __future__ import annotations

import resource

import pytest

from metalm.errors import TopologyError
from metalm.parallel.launch import find_launch, first_host, raise_open_files
from metalm.progress import rank_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41007",
}


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


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_ID": "4294967290",
        },
    ],
    ids=["no launcher", "single task", "batch script", "shell of salloc"],
)
def test_one_process_is_alone(environment: dict[str, str]) -> None:
    launch = find_launch(environment)
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "alone")
    assert launch.master_port == 0, "a port that was free a moment ago may be another run's by now"


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_refused(missing: str) -> None:
    with pytest.raises(TopologyError, match=missing):
        find_launch({name: value for name, value in TORCHRUN.items() if name != missing})


def test_the_rank_as_far_as_it_can_be_told() -> None:
    assert [rank_of(environment) for environment in (TORCHRUN, SLURM, {}, {"RANK": "2"})] == [3, 5, 0, 2]
    assert rank_of({"RANK": "first"}) == 0


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


def test_a_rank_may_open_as_many_files_as_the_node_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
