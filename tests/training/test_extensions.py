"""What is compiled at the first start on a machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from metalm.training import extensions


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is compiled")
def test_a_compilation_is_told_once_and_uses_the_environments_ninja(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ninja").touch()
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("PATH", "/usr/bin")
    stale = tmp_path / "compiled/deepspeed_shm_comm/lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    paths = []

    def compile_it() -> None:
        paths.append(os.environ["PATH"])
        assert not stale.exists()
        (stale.parent / "deepspeed_shm_comm.so").touch()

    monkeypatch.setattr(extensions, "build_shm_op", compile_it)
    extensions.prepare_extensions()
    assert paths == [f"{programs}:/usr/bin"]
    assert caplog.messages == [
        f"compiling an extension of DeepSpeed in {tmp_path}/compiled, once: this takes some minutes"
    ]
    caplog.clear()
    extensions.prepare_extensions()
    assert caplog.messages == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is compiled")
def test_environments_with_the_same_versions_do_not_undo_each_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "build_shm_op", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for environment in ("one", "other", "one"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "to be restored")
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(sys, "prefix", environment)
        extensions.prepare_extensions()
    assert len(list((tmp_path / "torch_extensions").iterdir())) == 2
