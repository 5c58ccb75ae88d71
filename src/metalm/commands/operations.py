"""`metalm status`, `report`, `stop` and `preflight`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from metalm.commands.argument_types import positive
from metalm.operations.preflight_limits import Limits
from metalm.progress import Phase


def add_commands(commands: Any) -> None:
    status = commands.add_parser(
        "status", help="tell how a run, or each of a folder, is doing", epilog="Example: metalm status runs"
    )
    status.add_argument(
        "run_folder",
        type=Path,
        metavar="RUN",
        help="the run's folder, such as runs/NAME; or that of all runs",
    )
    status.add_argument(
        "--watch",
        nargs="?",
        type=positive,
        const=5,
        metavar="SECONDS",
        help="go on, and print it anew; default: every 5 s",
    )
    status.set_defaults(run=_status)

    report = commands.add_parser(
        "report",
        help="write one HTML page of a run: curves, samples, layout, faults, versions",
        epilog="Example: metalm report runs/first --out first.html",
    )
    report.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, such as runs/NAME")
    report.add_argument("--out", type=Path, help="the page; default: report.html in the run's folder")
    report.set_defaults(run=_report)

    stop = commands.add_parser(
        "stop", help="ask a run to save and end", epilog="Example: metalm stop runs/first"
    )
    stop.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, such as runs/NAME")
    stop.set_defaults(run=_stop)

    preflight = commands.add_parser(
        "preflight",
        help="check the nodes of a job before a run starts on them",
        epilog="Example: srun metalm preflight runs/first --bad-nodes bad_nodes.txt",
    )
    preflight.add_argument("run_folder", type=Path, metavar="RUN", help="where the run will write")
    for limit in dataclasses.fields(Limits):
        name = f"--{limit.name.replace('_', '-')}"
        preflight.add_argument(name, type=float, default=limit.default, **limit.metadata)
    preflight.add_argument("--deadline-s", type=float, default=40.0, help="for reports, and again for links")
    preflight.add_argument("--mebibytes", type=positive, default=64, help="size of the tensor that is summed")
    preflight.add_argument("--bad-nodes", type=Path, help="file for the names of nodes that are not fit")
    preflight.add_argument("--calibration", type=Path, help="file for the links' figures, for metalm plan")
    preflight.set_defaults(run=_preflight)


def _status(options: argparse.Namespace) -> int | None:
    from metalm.operations.status import status

    return status(options.run_folder, options.watch)


def _report(options: argparse.Namespace) -> None:
    with Phase("writing the report"):
        from metalm.operations.report import write_report

        written = write_report(options.run_folder, options.out)
    print(f"wrote {written}")


def _stop(options: argparse.Namespace) -> int | None:
    from metalm.operations.stop import stop

    return stop(options.run_folder)


def _preflight(options: argparse.Namespace) -> int | None:
    with Phase("loading torch"):
        from metalm.operations.preflight import preflight

    limits = Limits(**{limit.name: getattr(options, limit.name) for limit in dataclasses.fields(Limits)})
    return preflight(
        options.run_folder,
        limits,
        deadline_s=options.deadline_s,
        mebibytes=options.mebibytes,
        bad_nodes=options.bad_nodes,
        calibration=options.calibration,
    )
