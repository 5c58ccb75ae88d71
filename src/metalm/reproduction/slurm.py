"""Jobs as Slurm arrays: one for each stage, which waits for the one before."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from metalm.project_files import project_root
from metalm.reproduction.arms import Setting
from metalm.reproduction.jobs import Job, in_order

_ARRAY = """\
#!/usr/bin/env bash
#SBATCH --job-name=reproduce
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}
{gpu}#SBATCH --time={hours:02d}:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/%x-%A-%a.log
set -euo pipefail
names=({names})
exec {command} --job "${{names[$SLURM_ARRAY_TASK_ID]}}"
"""
CPUS = 2
HOURS_MORE = 2
"""Than is expected of one core of a good CPU."""


def write_arrays(jobs: Sequence[Job], setting: Setting, words: Sequence[object]) -> str:
    """Write `OUT/slurm/stage_N.sbatch`; what to type to submit them.

    Args:
        words: options of tools/reproduce.py that the jobs were made with.
    """
    folder = (setting.out / "slurm").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join([sys.executable, str(project_root() / "tools/reproduce.py"), *map(str, words)])
    lines, before = [], ""
    for number, stage in enumerate(in_order(jobs)):
        script = folder / f"stage_{number}.sbatch"
        minutes = max(job.minutes for job in stage)
        script.write_text(
            _ARRAY.format(
                last=len(stage) - 1,
                cpus=CPUS,
                gpu="#SBATCH --gpus=1\n" if setting.scale == "gpu" else "",
                hours=HOURS_MORE + int(minutes // 60),
                folder=shlex.quote(str(folder)),
                names=" ".join(shlex.quote(job.name) for job in stage),
                command=command,
            )
        )
        lines.append(f"stage_{number}=$(sbatch --parsable {before}{shlex.quote(str(script))})")
        before = f'--dependency=afterany:"$stage_{number}" '  # what needs a task that has failed says so
    return "\n".join(lines)
