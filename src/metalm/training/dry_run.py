"""What a run will need, worked out before anything is started: `metalm train PIPELINE --dry-run`."""

from __future__ import annotations

import yaml

from metalm.config import RunConfig
from metalm.config.secrets import without_secrets
from metalm.errors import EXIT_DONE
from metalm.planning.devices import find_device
from metalm.planning.plan import plan_run
from metalm.planning.report import describe_batch, describe_memory
from metalm.progress import Phase
from metalm.run_lock import find_holder
from metalm.training.check_start import check_start
from metalm.training.going_on import check_going_on


def describe_plan(config: RunConfig, world_size: int) -> str:
    """Batch arithmetic, parameters per component, and bytes per rank.

    Raises:
        TopologyError: so many ranks cannot hold the run.
    """
    plan = plan_run(config, world_size, find_device("cpu"))  # memory does not depend on the device
    return f"{describe_batch(plan)}\n\n{describe_memory(plan)}"


def dry_run(config: RunConfig, world_size: int, *, with_data: bool) -> int:
    """Print the plan of a run, then check all that it reads, as its start will.

    Args:
        with_data: whether tokenizer, shards and weights to start from are there to be checked.

    Raises:
        TopologyError, ConfigError, DataError, CheckpointError: as `check_start` and `check_going_on`.
    """
    print_plan(config, world_size)
    if with_data:
        with Phase("checking what is read"):
            check_going_on(check_start(config, world_size))
        print("what is read: checked, but the contents of weights")
    else:
        print("what is read: not checked (--without-data)")
    return EXIT_DONE


def print_plan(config: RunConfig, world_size: int) -> None:
    """Print the resolved config and the plan of a run on so many ranks.

    The last lines are for the batch script: a name and a value, as it is.
    """
    plan = describe_plan(config, world_size)
    print(yaml.safe_dump(without_secrets(config), sort_keys=False))
    print(f"{plan}\n")
    initial = [name for name in ("run", "decoder", "encoders") if getattr(config.initialize, name)]
    run_folder = config.run.folder / config.run.name
    print(f"run folder: {run_folder}")
    if (holder := find_holder(run_folder)) is not None:
        print(f"held by: {holder}")
    print(f"initial weights: {', '.join(initial) or 'none'}", flush=True)
