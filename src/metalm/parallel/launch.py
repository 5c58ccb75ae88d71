"""Find out how the ranks were started (torchrun, Slurm, or alone) and open the process group.

torch is imported where the group is opened: a plan or a refused start needs the launch alone.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from metalm.errors import TopologyError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Launch:
    """This process among the processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int
    """0: one that is free, which only a process alone may leave open."""
    launcher: str

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Read the launcher's environment: torchrun first, then a task of `srun`, else one process alone.

    Slurm gives a batch script and the shell of `salloc` the variables of the whole job, although they are one
    process: only the tasks of a step are counted.

    Raises:
        TopologyError: a launcher's variables are there in part only.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from(environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        if "MASTER_ADDR" not in environment:
            first = first_host(
                environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
            )
            port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 12000
            environment = {**environment, "MASTER_ADDR": first, "MASTER_PORT": str(port)}
        return _from(environment, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Launch(0, 1, 0, "127.0.0.1", 0, "alone")  # port 0: torch listens on one that is free


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list such as `gpu[003-007,9],login1`.

    Raises:
        TopologyError: the list is empty or not of that form.
    """
    match = re.match(r"([A-Za-z0-9._-]*)(?:\[([0-9]+)[^\]]*\])?([A-Za-z0-9._-]*)", node_list)
    host = "".join(part or "" for part in match.groups()) if match else ""
    if not host:
        raise TopologyError(f"no host name in the Slurm node list {node_list!r}")
    return host


def _from(environment: Mapping[str, str], launcher: str, rank: str, world: str, local: str) -> Launch:
    names = (rank, world, local, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise TopologyError(f"started by {launcher}, but {', '.join(missing)} is not set")
    try:
        return Launch(
            int(environment[rank]),
            int(environment[world]),
            int(environment[local]),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            launcher,
        )
    except ValueError as error:
        raise TopologyError(f"started by {launcher}, but its variables are not numbers: {error}") from None


def raise_open_files() -> int:
    """Let this process open as many files as it may, and answer how many: gloo holds one for each rank."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def open_process_group(launch: Launch, timeout_minutes: int) -> torch.device:
    """Join the job's process group and answer the device of this rank.

    Exports the launch variables, because DeepSpeed reads them from the environment. On CUDA both
    NCCL (device tensors) and gloo (host tensors) answer; on CPU gloo alone.

    Collective: every rank of the job.
    """
    import torch
    import torch.distributed as dist

    os.environ.update(launch.environment())
    raise_open_files()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", launch.local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return device
