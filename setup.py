"""Builds the wheel; all that describes the project is in pyproject.toml.

The files that a run needs beside the library lie at the top of the repository. A wheel holds them in
`metalm/project`, where `metalm.project_files` finds them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT_FOLDERS = ("pipelines", "deepspeed_configs", "slurm", "tools")


class BuildWithProjectFiles(build_py):
    """Copies the project's folders into what is built; an editable install uses those of the repository."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        built = Path(self.build_lib)
        shutil.rmtree(built, ignore_errors=True)  # what an earlier build has left there would be in the wheel
        super().run()
        for name in PROJECT_FOLDERS:
            shutil.copytree(
                name, built / "metalm" / "project" / name, ignore=shutil.ignore_patterns("__pycache__")
            )


setup(cmdclass={"build_py": BuildWithProjectFiles})
