"""Packages are fetched and checked, and a folder appears whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from metalm.errors import BusyError, ConfigError, DataError, FaultError
from metalm.reproduction.data import getting, sets, vader
from metalm.reproduction.data.packages import (
    BIGBENCH,
    EASY_VQA,
    FASHION_MNIST,
    MINILM,
    OPENMOJI,
    TUXPAINT,
    VADER,
    WORDNET,
    Package,
)
from metalm.reproduction.data.set_folder import SetFolder
from reproduction.small_packages import make_package, make_vader, tarred


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with VADER's package."""
    make_package("vader", tmp_path / "given", monkeypatch)
    return tmp_path / "given"


def left(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program before all others of its name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def in_a_child(work: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_package_with_another_hash_or_size_is_refused(packages: Path, tmp_path: Path) -> None:
    file = packages / VADER.file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(DataError, match=f"{VADER.file} has the sha256 .*expected .*delete it"):
        sets.fetch_set("vader", tmp_path / "real", packages)
    file.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=f"has {len(whole) + 1:,} bytes, expected {len(whole):,}"):
        sets.fetch_set("vader", tmp_path / "real", packages)
    assert left(tmp_path / "real") == []


def test_a_package_that_is_not_in_the_folder_is_named(packages: Path, tmp_path: Path) -> None:
    (packages / VADER.file).unlink()
    with pytest.raises(DataError, match=r"vaderSentiment==0\.5 of pip, .* or leave --from out"):
        sets.fetch_set("vader", tmp_path / "real", packages)


def test_an_archive_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reproduction.small_packages.MAKERS", {"vader": lambda: b"no archive at all"})
    make_package("vader", tmp_path / "given", monkeypatch)
    with pytest.raises(DataError, match=r"is no archive that can be read.*get it again"):
        sets.fetch_set("vader", tmp_path / "real", tmp_path / "given")
    assert left(tmp_path / "real") == []


def test_a_second_call_checks_what_is_there(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sets.fetch_set("vader", tmp_path / "real", packages)
    shutil.rmtree(packages)
    assert sets.fetch_set("vader", tmp_path / "real", packages) == first
    assert f"{tmp_path}/real/vader is there: checking it" in capsys.readouterr().out
    file = tmp_path / "real/vader/tasks/vader_films/test.jsonl"
    file.write_bytes(file.read_bytes().replace(b"positive", b"negative"))
    with pytest.raises(
        DataError, match=r"test\.jsonl has been changed: delete .*/vader and fetch vader again"
    ):
        sets.fetch_set("vader", tmp_path / "real", packages)
    file.unlink()
    with pytest.raises(DataError, match="is not whole"):
        sets.fetch_set("vader", tmp_path / "real", packages)


def test_a_folder_of_another_version_is_refused(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.fetch_set("vader", tmp_path / "real", packages)
    monkeypatch.setattr("metalm.reproduction.data.set_folder.FORM", 999)
    with pytest.raises(DataError, match="written by another version of this program: delete"):
        sets.fetch_set("vader", tmp_path / "real", packages)


def test_sums_are_as_the_program_for_them_reads_them(packages: Path, tmp_path: Path) -> None:
    sets.fetch_set("vader", tmp_path / "real", packages)
    found = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "real/vader", timeout=60
    )
    assert found.returncode == 0


def test_killed_in_the_middle_nothing_half_is_left(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_killed() -> None:
        write_task = SetFolder.write_task

        def write_one(self: SetFolder, task: str, *rest: object, **named: object) -> None:
            if task == "vader_tweets":
                os.kill(os.getpid(), signal.SIGKILL)
            write_task(self, task, *rest, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(SetFolder, "write_task", write_one)
        sets.fetch_set("vader", tmp_path / "real", packages)

    assert in_a_child(be_killed) == -signal.SIGKILL
    assert left(tmp_path / "real") == [".vader.partial"]
    assert (tmp_path / "real/.vader.partial/tasks/vader_films.yaml").exists()
    counts = sets.fetch_set("vader", tmp_path / "real", packages)["counts"]
    assert counts == sets.fetch_set("vader", tmp_path / "undisturbed", packages)["counts"]
    assert left(tmp_path / "real") == ["vader"]


def test_a_full_disk_is_one_message(packages: Path, tmp_path: Path) -> None:
    def run_full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            sets.fetch_set("vader", tmp_path / "real", packages)
        except FaultError as error:
            assert "make room, or name another folder by --output" in str(error)
            os._exit(23)

    assert in_a_child(run_full) == 23
    assert left(tmp_path / "real") == []


def test_two_programs_do_not_write_into_one_folder(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    descriptor = os.open(tmp_path / "real", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(BusyError, match="another program is writing into"):
        sets.fetch_set("vader", tmp_path / "real", packages)
    os.close(descriptor)
    sets.fetch_set("vader", tmp_path / "real", packages)


def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no data set vader3; there are vader, minilm"):
        sets.fetch_set("vader3", tmp_path)


def small(package: Package, content: bytes) -> Package:
    return replace(package, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("package", "name", "arguments"),
    [
        (OPENMOJI, "npm", "pack --ignore-scripts openmoji@17.0.0"),
        (WORDNET, "apt-get", "download wordnet-base=1:3.0-37"),
    ],
)
def test_npm_and_apt_are_asked_for_the_version_and_the_file_is_kept(
    package: Package, name: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = small(package, b"content\n")
    program(
        tmp_path / "bin", name, f'echo "$@" >> {tmp_path}/asked; echo content > {package.file}', monkeypatch
    )
    for _ in range(2):
        file = getting.get_package(package, tmp_path / "real")
        assert file == tmp_path / "real/packages" / package.file
        assert file.read_bytes() == b"content\n"
    assert (tmp_path / "asked").read_text() == f"{arguments}\n"
    assert left(tmp_path / "real/packages") == [package.file]


def test_what_has_come_is_counted_while_folders_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"content")

    def change() -> None:
        for number in range(2_000):
            folder = tmp_path / f"unpacked-{number}" / "inner"
            folder.mkdir(parents=True)
            (folder / "file").write_bytes(b"12345")
            shutil.rmtree(folder.parent)

    thread = threading.Thread(target=change)
    thread.start()
    while thread.is_alive():
        assert 7 <= getting._size(tmp_path) <= 12
    thread.join()


def test_a_file_of_another_content_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = small(OPENMOJI, b"content\n")
    program(tmp_path / "bin", "npm", f"echo CONTENT > {package.file}", monkeypatch)
    with pytest.raises(DataError, match="has the sha256"):
        getting.get_package(package, tmp_path / "real")
    assert left(tmp_path / "real/packages") == []


def test_what_a_package_manager_says_is_shown_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "apt-get", "echo 'E: Failed to fetch' >&2; exit 100", monkeypatch)
    with pytest.raises(FaultError) as caught:
        getting.get_package(TUXPAINT, tmp_path / "real")
    for part in ("apt-get download tuxpaint-stamps-default=2022.06.04-1 failed", "E: Failed to fetch",
                 "`apt-get update`", TUXPAINT.file, "--from"):  # fmt: skip
        assert part in str(caught.value)


def test_a_package_manager_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FaultError, match=r"npm is not installed.*openmoji-17\.0\.0\.tgz.*--from"):
        getting.get_package(OPENMOJI, tmp_path / "real")


def test_a_package_manager_that_leaves_another_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "npm", "echo > openmoji-18.0.0.tgz", monkeypatch)
    with pytest.raises(FaultError, match=r"has not left openmoji-17\.0\.0\.tgz, but openmoji-18\.0\.0\.tgz"):
        getting.get_package(OPENMOJI, tmp_path / "real")


@pytest.mark.parametrize("is_absolute", [True, False])
def test_pip_runs_nothing_of_a_source_distribution(
    is_absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w').close()\nraise SystemExit('executed')\n".encode()
    content = tarred(
        {
            "bigbench-1.0.0/setup.py": setup,
            "bigbench-1.0.0/PKG-INFO": b"Metadata-Version: 2.1\nName: bigbench\nVersion: 1.0.0\n",
        },
        "gz",
    )
    index = tmp_path / "index"
    index.mkdir()
    (index / BIGBENCH.file).write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "real" if is_absolute else Path("real")
    file = getting.get_package(small(BIGBENCH, content), output)
    assert file.read_bytes() == content
    assert not ran.exists()
    assert left(tmp_path / "real/packages") == [BIGBENCH.file]


def test_files_are_named_as_their_package_managers_name_them() -> None:
    for package in (VADER, MINILM, EASY_VQA, BIGBENCH, WORDNET, OPENMOJI, FASHION_MNIST, TUXPAINT):
        plain = package.file.replace("_", "-").lower()
        assert package.name.lower() in plain
        assert package.version.replace(":", "%3a") in package.file
        assert len(package.sha256) == 64 and package.num_bytes > 1_000_000


def test_the_tool_says_what_it_wrote_and_the_majority_of_each_task(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Path(sets.__file__).parents[4] / "tools" / "fetch_data.py"
    arguments = ["vader", "--output", str(tmp_path / "real"), "--from", str(packages)]
    monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
    with pytest.raises(SystemExit) as ended:
        exec(compile(tool.read_text(), str(tool), "exec"), {"__name__": "__main__"})
    assert ended.value.code == 0
    assert "tasks/vader_films/train.jsonl: " in (said := capsys.readouterr().out)
    assert "% positive" in said and vader.PACKAGES[0].sha256 == hashlib.sha256(make_vader()).hexdigest()
