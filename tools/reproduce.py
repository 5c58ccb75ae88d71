"""Try the paper's claims in small, on real data: train all arms, and report which claims hold.

What is done is passed over, and what was killed goes on where it stopped. Data come from tools/fetch_data.py.

Example: python tools/reproduce.py --only b
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import positive
from metalm.errors import ConfigError
from metalm.outputs import require_folder_place
from metalm.reproduction.arms import Setting
from metalm.reproduction.claim import check_data, jobs_of, sets_of
from metalm.reproduction.claims import CLAIMS, USUAL
from metalm.reproduction.jobs import Marks
from metalm.reproduction.queue import Queue, run_alone
from metalm.reproduction.readme import write_into
from metalm.reproduction.report import write_report
from metalm.reproduction.results import ClaimResults, results_of
from metalm.reproduction.slurm import write_arrays
from metalm.reproduction.this_machine import Precision, Scale, usual_parallel, usual_precision


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--only", default=",".join(USUAL), help="letters of claims (default: %(default)s)")
    parser.add_argument("--scale", choices=get_args(Scale), default="cpu")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="of all training; default: that of a claim's jobs that are done, else bf16 on a GPU and on CPUs "
        "that multiply it, else fp32",
    )
    parser.add_argument("--seeds", type=positive, help="of each arm; default: 3, of some on CPU 4")
    parser.add_argument(
        "--jobs",
        type=positive,
        help="at once; default: one for each core on CPU, three for four cores on a GPU",
    )
    parser.add_argument("--data", type=Path, default=Path("data/real"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default: %(default)s")
    parser.add_argument(
        "--list", action="store_true", help="show the jobs, and what they are expected to take"
    )
    parser.add_argument("--sets", action="store_true", help="print which data sets are needed")
    parser.add_argument(
        "--slurm", action="store_true", help="write job arrays to OUT/slurm, and start nothing"
    )
    parser.add_argument(
        "--report", action="store_true", help="report what is done of all claims, and start nothing"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="report, and update the table of a README, and its picture and figures, by the claims that are "
        "whole; others stay in it",
    )
    parser.add_argument("--job", metavar="NAME", help="run one job, as a task of a Slurm array does")
    options = parser.parse_args()
    options.data, options.out = options.data.absolute(), options.out.absolute()  # named one way in all jobs
    letters = list(dict.fromkeys(options.only.split(",")))
    if unknown := [letter for letter in letters if letter not in CLAIMS]:
        parser.error(f"there is no claim {unknown[0]!r}; there are {', '.join(CLAIMS)}")
    if options.readme is not None and not options.readme.is_file():
        raise ConfigError(f"there is no file {options.readme}: give --readme the README that has the table")
    settings = {letter: _setting(options, letter, options.seeds) for letter in letters}
    claims = {letter: CLAIMS[letter](setting) for letter, setting in settings.items()}
    if options.sets:
        print(" ".join(sets_of(claims.values())))
        return
    jobs = jobs_of((claims[letter], setting) for letter, setting in settings.items())
    if options.list:
        marks = Marks(options.out)
        for job in jobs:
            print(f"{job.name:<36}{job.minutes:6.1f} min{'  done' if marks.read(job) else ''}")
        total = sum(job.minutes for job in jobs)
        print(f"{len(jobs)} jobs, {total:.0f} minutes of one core of a CPU at its scale, in bf16")
        return
    only_reports = options.report or options.readme is not None
    if not only_reports:
        check_data(claims.values(), options.data)
    require_folder_place(options.out, "choose another --out")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.job is not None:
        run_alone(jobs, options.job, options.out, print)
        return
    if options.slurm:
        first, *others = settings.values()
        if any(one.precision != first.precision for one in others):
            told = ", ".join(f"{letter} in {one.precision}" for letter, one in settings.items())
            raise ConfigError(
                f"their jobs that are done were run in more than one precision ({told}): write "
                "the arrays of each with an --only of its own"
            )
        words = ["--only", options.only, "--scale", options.scale, "--precision", first.precision]
        words += ["--seeds", options.seeds] if options.seeds is not None else []
        print(write_arrays(jobs, first, [*words, "--data", options.data, "--out", options.out]))
        return
    if not only_reports:
        Queue(jobs, options.out, _say).run(options.jobs or usual_parallel(options.scale))
    results = [results_of(claim, settings[letter]) for letter, claim in claims.items()]
    together = sorted([*results, *_others(letters, options)], key=lambda one: one.claim.letter)
    # Of the setting, scale and folders count here, which all have in common.
    write_report(together, settings[letters[0]], _say)
    for one in results:
        _say(f"{one.claim.letter}: {one.claim.title}: {one.verdict}")
    if options.readme is not None:
        write_into(options.readme, results, settings[letters[0]], CLAIMS)


def _setting(options: argparse.Namespace, letter: str, seeds: int | None) -> Setting:
    """Of a claim: in the precision that is asked for, or that its jobs that are done were run in."""
    precision = options.precision or usual_precision(options.scale)
    setting = Setting(options.data, options.out, options.scale, seeds, precision)
    jobs = CLAIMS[letter](setting).jobs(setting)
    done = None if options.precision else Marks(options.out).precision(jobs)
    return setting if done is None else replace(setting, precision=done)


def _others(letters: Sequence[str], options: argparse.Namespace) -> Iterator[ClaimResults]:
    """Further claims of which there are results, for the report of all."""
    for letter, claim in CLAIMS.items():
        if letter not in letters:
            setting = _setting(options, letter, None)
            try:
                yield results_of(claim(setting), setting)
            except ConfigError as error:
                _say(f"{letter} is left out of the report: {str(error).partition(':')[0]}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_tool(main)
