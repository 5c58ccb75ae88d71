"""What `tools/submit.py` writes and types: a snapshot of code and config, and the sbatch line.

A job that is queued again weeks later must run what was submitted, whatever the repository holds by then.
What the job must know stands in the snapshot's own template: many sites give jobs nothing of the shell's
environment.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from metalm.config import RunConfig
from metalm.errors import ConfigError
from metalm.progress import Phase
from metalm.project_files import project_root
from metalm.run_folder import COMMIT_NAME, LOGS_NAME, SUBMITTED_NAME, TEMPLATE_NAME

_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "clusters")
_WHOLE_NODES = ("#SBATCH --exclusive", "#SBATCH --mem=0")
_FIRST_COMMAND = "set -uo pipefail\n"
_OWN_PREFIX = "METALM_"
_JOBS_PYTHON = Path(".venv/bin/python")
"""What `slurm/cluster.sh` takes where no other is named: below the folder where the job is submitted."""
_OF_A_JOB = ("METALM_CHAIN", "METALM_CODES", "METALM_NODES")


@dataclass(frozen=True)
class Submission:
    """One submission of a run: `RUN/submitted/STAMP` and what Slurm is asked for."""

    config: RunConfig
    stamp: str
    template: str
    """Name of the file in `slurm/`."""
    nodes: int
    gpus_per_node: int | None
    ranks_per_node: int | None
    """None: as many as GPUs, or one."""
    options: Sequence[str] = ()
    """Further ones of sbatch."""
    arguments: Sequence[str] = ()
    """Of the template, behind the config, or in its place behind the run's folder for `convert.sbatch`."""
    shell: Mapping[str, str] = field(default_factory=dict)
    """The environment in which it is submitted."""
    memory: str | None = None
    """Of each node, which then is shared with other jobs; None: whole nodes."""

    @property
    def run_folder(self) -> Path:
        """The run's folder, absolute: the job may be looked at from anywhere."""
        return (self.config.run.folder / self.config.run.name).absolute()

    @property
    def folder(self) -> Path:
        """The snapshot."""
        return self.run_folder / SUBMITTED_NAME / self.stamp

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * (self.ranks_per_node or self.gpus_per_node or 1)

    def settings(self) -> dict[str, str]:
        """What the job must know, by variable: the shell's own, and those of this submission."""
        own = {
            name: value
            for name, value in self.shell.items()
            if name.startswith(_OWN_PREFIX) and name not in _OF_A_JOB
        }
        ranks = {} if self.ranks_per_node is None else {"METALM_RANKS_PER_NODE": str(self.ranks_per_node)}
        options = {"METALM_SBATCH_OPTIONS": shlex.join(self._more_options())}
        if not own.get("METALM_PYTHON") and not own.get("METALM_CONTAINER") and not _JOBS_PYTHON.is_file():
            own["METALM_PYTHON"] = sys.executable
        return {**own, "METALM_ROOT": str(self.folder / "code"), **ranks, **options}

    def command(self) -> list[str]:
        """The sbatch command. Training jobs of one run, which share its name, run one after another."""
        gpus = [] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]
        action = self.template.removesuffix(".sbatch")
        name = [f"--job-name={self.config.run.name}", "--dependency=singleton"]
        if action in ("evaluate", "convert"):
            name = [f"--job-name={self.config.run.name}-{action}"]
        first = self.run_folder if action == "convert" else self.folder / "config.yaml"
        return [
            "sbatch",
            f"--nodes={self.nodes}",
            *gpus,
            *name,
            f"--output={self.run_folder}/logs/job-%j.log",
            *self._more_options(),
            str(self._template_path),
            str(first),
            *self.arguments,
        ]

    def write(self, commit: str | None) -> Submission:
        """Copy the code, and write the resolved config with the DeepSpeed files that it names.

        Data, tokenizers and the environment are used where they are.

        Returns:
            This one, by a stamp of its own: several may be written in the same second.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        own = self._with_own_folder()
        try:
            own._fill(commit)
        except OSError:
            own.withdraw()
            raise
        return own

    def withdraw(self) -> None:
        """Remove what `write` has made, as of a job that Slurm refuses."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other submissions or starts are in them
            for folder in (self.run_folder / SUBMITTED_NAME, self.run_folder / LOGS_NAME, self.run_folder):
                folder.rmdir()

    def _with_own_folder(self) -> Submission:
        for number in itertools.count(1):
            own = self if number == 1 else replace(self, stamp=f"{self.stamp}-{number}")
            with suppress(FileExistsError):
                own.folder.mkdir(parents=True)
                return own
        raise AssertionError("numbers do not end")

    def _fill(self, commit: str | None) -> None:
        (self.run_folder / LOGS_NAME).mkdir(exist_ok=True)
        library, code = Path(__file__).parents[1], self.folder / "code"
        with Phase(f"copying the code to {code}"):
            shutil.copytree(library, code / "src" / library.name, ignore=_LEFT_OUT)
            for name in ("slurm", "tools", "pipelines"):
                shutil.copytree(project_root() / name, code / name, ignore=_LEFT_OUT)
        self._template_path.write_text(self._template(self._template_path.read_text()))
        (self.folder / "code" / COMMIT_NAME).write_text(f"{commit or 'unknown'}\n")
        config = self.config.model_dump(mode="json")
        for engine, path in (
            ("decoder", self.config.deepspeed.decoder),
            ("encoders", self.config.deepspeed.encoders),
        ):
            copied = self.folder / f"deepspeed_{engine}.json"
            shutil.copyfile(path, copied)
            config["deepspeed"][engine] = str(copied)
        (self.folder / TEMPLATE_NAME).write_text(f"{self.template}\n")
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    @property
    def _template_path(self) -> Path:
        return self.folder / "code" / "slurm" / self.template

    def _more_options(self) -> list[str]:
        """Those of the cluster, of nodes that are shared, and those given, which win."""
        options = self.shell.get("METALM_SBATCH_OPTIONS", "")
        try:
            cluster = shlex.split(options)
        except ValueError as error:
            raise ConfigError(f"METALM_SBATCH_OPTIONS is {options!r}: {error}") from None
        return [*cluster, *([] if self.memory is None else [f"--mem={self.memory}"]), *self.options]

    def _template(self, content: str) -> str:
        """The template with the settings in it, and without taking whole nodes where they are shared."""
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.settings().items()]
        head, tail = content.split(_FIRST_COMMAND, maxsplit=1)
        if self.memory is not None:
            head = "".join(line for line in head.splitlines(True) if line.rstrip() not in _WHOLE_NODES)
        return "".join([head, "# As it was submitted:\n", *lines, _FIRST_COMMAND, tail])
