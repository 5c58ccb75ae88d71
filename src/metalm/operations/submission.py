"""What `tools/submit.py` writes and types: a snapshot of code and config, and the sbatch line.

A job that is queued again weeks later must run what was submitted, whatever the repository holds by then.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from metalm.config import RunConfig
from metalm.project_files import project_root
from metalm.run_folder import COMMIT_NAME

_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")


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

    @property
    def run_folder(self) -> Path:
        """The run's folder, absolute: the job may be looked at from anywhere."""
        return (self.config.run.folder / self.config.run.name).absolute()

    @property
    def folder(self) -> Path:
        """The snapshot."""
        return self.run_folder / "submitted" / self.stamp

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * (self.ranks_per_node or self.gpus_per_node or 1)

    def environment(self) -> dict[str, str]:
        """Variables that the job needs."""
        ranks = {} if self.ranks_per_node is None else {"METALM_RANKS_PER_NODE": str(self.ranks_per_node)}
        return {"METALM_ROOT": str(self.folder / "code"), **ranks}

    def command(self) -> list[str]:
        """The sbatch command. Jobs of one run, which share its name, run one after another."""
        gpus = [] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]
        return [
            "sbatch",
            f"--nodes={self.nodes}",
            *gpus,
            f"--job-name={self.config.run.name}",
            "--dependency=singleton",
            f"--output={self.run_folder}/logs/job-%j.log",
            *self.options,
            str(self.folder / "code" / "slurm" / self.template),
            str(self.folder / "config.yaml"),
        ]

    def write(self, commit: str | None) -> None:
        """Copy the code, and write the resolved config with the DeepSpeed files that it names.

        Data, tokenizers and the environment are used where they are.
        """
        (self.run_folder / "logs").mkdir(parents=True, exist_ok=True)
        library, code = Path(__file__).parents[1], self.folder / "code"
        shutil.copytree(library, code / "src" / library.name, ignore=_LEFT_OUT)
        for name in ("slurm", "tools"):
            shutil.copytree(project_root() / name, code / name, ignore=_LEFT_OUT)
        (self.folder / "code" / COMMIT_NAME).write_text(f"{commit or 'unknown'}\n")
        config = self.config.model_dump(mode="json")
        for engine, path in (
            ("decoder", self.config.deepspeed.decoder),
            ("encoders", self.config.deepspeed.encoders),
        ):
            copied = self.folder / f"deepspeed_{engine}.json"
            shutil.copyfile(path, copied)
            config["deepspeed"][engine] = str(copied)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
