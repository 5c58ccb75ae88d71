"""Where compiled code is kept by users with and without a home that can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from metalm.cache_folder import cache_folder
from metalm.errors import ConfigError
from metalm.training.extensions import prepare_extensions
from permissions import as_users_are


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, "")  # and back to what it was
        monkeypatch.delenv(name)
    return folder


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_it_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache_folder("a/b") == tmp_path / (".cache/a/b" if variable == "HOME" else "a/b")
    assert list(cache_folder("a/b").iterdir()) == []


@pytest.mark.parametrize("home", ["missing", "read only"])
def test_without_a_home_to_write_in_it_is_private_among_temporary_files(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "read only").mkdir(mode=0o500)
    monkeypatch.setenv("HOME", "/proc/nope" if home == "missing" else str(tmp_path / home))
    with as_users_are():
        folder = cache_folder("a")
    (private,) = temporary.iterdir()
    assert folder == private / "a" and folder.is_dir()
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_is_not_taken(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nope")
    private = cache_folder("a").parent
    private.chmod(0o777)
    with pytest.raises(ConfigError, match=r"is not this user's alone\): set XDG_CACHE_HOME to a folder"):
        cache_folder("a")
    (private / "a").rmdir()
    private.rmdir()
    private.symlink_to(temporary.parent)
    with pytest.raises(ConfigError, match="is not this user's alone"):
        cache_folder("a")


def test_a_folder_of_extensions_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nope")
    with pytest.raises(ConfigError, match="/proc/nope cannot be written: .*; set TORCH_EXTENSIONS_DIR to"):
        prepare_extensions()
