"""What a rank tells, and where, when the disk is full."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from metalm.training.session import _LogFile, _quiet_writers


class FullDisk:
    """What a TensorBoard thread writes to."""

    def write(self, data: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_a_log_on_a_full_disk_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = _LogFile(Path("/dev/full"))
    for number in range(3):
        log.handle(logging.makeLogRecord({"msg": f"line {number}"}))
    assert capsys.readouterr().err == "/dev/full cannot be written: No space left on device\n"


def test_a_mistake_in_what_is_logged_is_still_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _LogFile(tmp_path / "log").handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "Traceback" in capsys.readouterr().err


def test_tensorboards_threads_end_on_a_full_disk_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: told.append(failed.exc_value))

    def fail() -> None:
        raise OSError("of another thread")

    figures: queue.Queue[bytes] = queue.Queue()
    figures.put(b"a figure")
    with _quiet_writers():
        for thread in (_AsyncWriterThread(figures, FullDisk(), 0), threading.Thread(target=fail)):
            thread.start()
            thread.join()
    assert [str(error) for error in told] == ["of another thread"]
