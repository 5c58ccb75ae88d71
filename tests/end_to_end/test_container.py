"""The recipes of containers: both copy the same files, and what they copy can be installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "slurm/container"
DOCKERFILE, DEFINITION = (FOLDER / "Dockerfile").read_text(), (FOLDER / "metalm.def").read_text()


def copied_by_docker() -> set[str]:
    return {
        name for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]
    }


def test_both_recipes_copy_install_and_default_to_the_same() -> None:
    files = re.search(r"%files\n(.*?)\n\n", DEFINITION, re.DOTALL)
    assert files is not None
    pairs = [line.split() for line in files[1].splitlines()]
    assert {source for source, _ in pairs} == copied_by_docker()
    assert all(target == f"/opt/source/{source}" for source, target in pairs)
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert defaults == dict(re.findall(r"^ +(BASE|TORCH)=(\S+)$", DEFINITION, re.MULTILINE))
    packages = r"apt-get install .*--no-install-recommends (.*?)(?: \\)?$"
    assert re.findall(packages, DOCKERFILE, re.MULTILINE) == re.findall(packages, DEFINITION, re.MULTILINE)
    for recipe in (DOCKERFILE, DEFINITION):
        assert "/opt/source/slurm/container/install.sh /opt/metalm" in recipe


def test_what_is_copied_makes_the_whole_package(tmp_path: Path) -> None:
    for name in copied_by_docker():
        if (REPOSITORY / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPOSITORY / name, tmp_path / "source" / name, ignore=ignored)
        else:
            (tmp_path / "source").mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("metalm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"metalm/cli.py", "metalm/project/pipelines/demo.yaml", "metalm/project/tools/submit.py"} <= {
        *names
    }


def test_the_installer_asks_for_a_folder() -> None:
    found = subprocess.run([FOLDER / "install.sh"], capture_output=True, text=True)
    assert found.returncode == 64 and "usage: install.sh FOLDER" in found.stderr


def test_the_installer_installs_extras_that_there_are() -> None:
    named = re.search(r"source\}\[([a-z0-9,]+)\]", (FOLDER / "install.sh").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert named is not None
    # `flash` is for GPUs alone, and compiles at its first use.
    assert {*named[1].split(","), "dev", "docs", "flash"} == project["optional-dependencies"].keys()
