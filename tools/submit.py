"""Submit a run to Slurm, with a copy of code and config that later changes do not touch.

The copy is in the run folder, and the job runs it, also when it is queued again. --dry-run writes nothing; it
shows the resolved config, the plan and the line that would be typed.

`--template evaluate` and `--template convert --argument exported/X` submit the other jobs of a run alike.

Example: python tools/submit.py pipelines/demo.yaml training.micro_batch_size=4 --nodes 2 --gpus-per-node 4
"""

import argparse
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import yaml

from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import positive
from metalm.commit import git_commit
from metalm.config import load_config
from metalm.config.secrets import without_secrets
from metalm.errors import ConfigError, TopologyError
from metalm.operations.submission import Submission
from metalm.outputs import writing
from metalm.training.dry_run import describe_plan


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--template", choices=("pretrain", "finetune", "evaluate", "convert"), default="pretrain"
    )
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        help="one more for the template, such as OUT of convert or =--samples=9 of evaluate",
    )
    parser.add_argument("--nodes", type=positive, default=1)
    parser.add_argument("--gpus-per-node", type=positive, help="default: SBATCH_GPUS_PER_NODE, if set")
    parser.add_argument(
        "--ranks-per-node", type=positive, help="default: METALM_RANKS_PER_NODE, else the GPUs, or 1"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="one more option for sbatch"
    )
    parser.add_argument(
        "--memory", help="share nodes with other jobs, with so much memory on each, such as 64G"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and stop")
    return parser.parse_intermixed_args()


def from_environment(name: str, option: str) -> int | None:
    """The number at the end of a variable such as `8` or `a100:8`; None where it is not set.

    Raises:
        ConfigError: no number above 0 is there.
    """
    value = os.environ.get(name, "")
    if not value:
        return None
    try:
        return positive(value.rpartition(":")[2])
    except argparse.ArgumentTypeError:
        raise ConfigError(
            f"{name} is {value!r}; expected a number above 0 at its end, such as 8 or a100:8: set it so, or "
            f"give {option}"
        ) from None


def plan_of(submission: Submission) -> str:
    """What the job's ranks will need, of a job that has ranks.

    Raises:
        TopologyError: so many ranks cannot hold the run.
    """
    if submission.template == "convert.sbatch":
        return "a conversion: one process, no ranks to plan for"
    try:
        return describe_plan(submission.config, submission.ranks)
    except TopologyError as error:
        raise TopologyError(
            f"{error}\nranks of this job: --nodes {submission.nodes} x "
            f"{submission.ranks // submission.nodes} on each (--ranks-per-node, else --gpus-per-node, else 1)"
        ) from error


def main() -> None:
    arguments = parse_arguments()
    submission = Submission(
        config=load_config(arguments.pipeline, arguments.overrides),
        stamp=time.strftime("%Y%m%d-%H%M%S"),
        template=f"{arguments.template}.sbatch",
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node or from_environment("SBATCH_GPUS_PER_NODE", "--gpus-per-node"),
        ranks_per_node=arguments.ranks_per_node
        or from_environment("METALM_RANKS_PER_NODE", "--ranks-per-node"),
        options=arguments.sbatch,
        arguments=arguments.argument,
        shell=os.environ,
        memory=arguments.memory,
    )
    if arguments.template == "convert" and not arguments.argument:
        raise ConfigError("where is the converted model to go? give --argument exported/NAME")
    plan = plan_of(submission)
    words = submission.command()
    if arguments.dry_run:
        print(yaml.safe_dump(without_secrets(submission.config), sort_keys=False))
        print(plan, shlex.join(words), sep="\n\n")
        return
    if not shutil.which(words[0]):
        raise ConfigError("there is no sbatch here: submit from a login node, or look with --dry-run")
    with writing(submission.folder, "choose another run.folder"):
        submission = submission.write(git_commit())
    words = submission.command()
    print(plan, shlex.join(words), sep="\n\n", flush=True)
    code = subprocess.run(words).returncode
    if code:
        submission.withdraw()
        raise ConfigError(f"sbatch refused the job with code {code}")


if __name__ == "__main__":
    run_tool(main)
