"""A wheel, away from the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import metalm
from distributed.ranks import run_command

REPOSITORY = Path(__file__).parents[2]
BUILT_FROM = ("src", "pipelines", "deepspeed_configs", "slurm", "tools")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs of a wheel that is built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in BUILT_FROM:
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, source / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    stale = source / "build/lib/metalm/removed_since.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    code, output = run_command([*pip, str(folder), str(source)], timeout_s=200)
    assert code == 0, output
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "installed")
    shutil.rmtree(source)
    return folder / "installed"


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    program = f"import os, sys; os.chdir({str(cwd)!r}); from metalm.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    code, output = run_command(command, timeout_s=120, PYTHONPATH=str(installed))
    assert code == 0, output
    return output


def test_everything_that_a_run_needs_is_inside(installed: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", *BUILT_FROM], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if name.startswith("src/"):
            if not name.endswith("README.md"):
                assert (installed / name.removeprefix("src/")).is_file(), name
        else:
            assert (installed / "metalm/project" / name).is_file(), name
    assert not (installed / "metalm/removed_since.py").exists()


def test_the_metadata_have_licence_and_version(installed: Path) -> None:
    (metadata,) = installed.glob("metalm-*.dist-info/METADATA")
    assert f"\nVersion: {metalm.__version__}\n" in metadata.read_text()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata.read_text()
    assert (metadata.parent / "licenses/LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


def test_a_packaged_pipeline_is_planned_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    output = run(installed, tmp_path, "train", "demo.yaml", "--dry-run", "--ranks", "2", "--without-data")
    assert "tensor 2 x data 1" in output
    assert f"decoder: {installed}/metalm/project/deepspeed_configs/decoder_zero1.json" in output


def test_the_demos_data_are_prepared_by_an_installed_tool(installed: Path, tmp_path: Path) -> None:
    amount = ("--scenes", "60", "--evaluation-scenes", "6", "--text-mib", "1")
    run(installed, tmp_path, "tool", "prepare-demo", "data/demo", *amount)
    data = yaml.safe_load((REPOSITORY / "pipelines/demo.yaml").read_text())["data"]
    for source in (*data["sources"].values(), *data["evaluation"].values()):
        assert (tmp_path / source["path"] / "index.json").is_file()
    assert (tmp_path / data["tokenizer"] / "tokenizer.json").is_file()


def test_tools_are_listed_with_what_they_do(installed: Path, tmp_path: Path) -> None:
    listed = dict(re.findall(r"^(\w+) +(\S.*)$", run(installed, tmp_path, "tool"), re.MULTILINE))
    assert sorted(listed) == sorted(path.stem for path in (REPOSITORY / "tools").glob("*.py"))


def test_the_version_is_known_without_metadata(installed: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(installed / "metalm", plain / "metalm")
    command = [sys.executable, "-S", "-m", "metalm", "--version"]  # no site-packages at all
    found = subprocess.run(command, cwd=plain, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, f"metalm {metalm.__version__}\n"), found.stderr


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == metalm.__version__
