"""The answers of a model to one task asked in one way, written as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from metalm.errors import BusyError, ConfigError
from metalm.file_lock import try_lock
from metalm.outputs import writing

ELSEWHERE = "name another folder with --out"


class AnswersFile:
    """JSON Lines: what the answers depend on, then the key and the answer of each question.

    One process has it at a time: what two wrote at once would be torn.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """
        Args:
            about: what the answers depend on.
        """
        self._path, self._about = path, about
        self._file: IO[bytes] | None = None

    def open(self) -> dict[str, dict[str, Any]]:
        """The answers that are there, by their questions' keys; a torn last line is none.

        Questions that could not be asked are no answers: what they lacked may be there now.

        Raises:
            ConfigError: they are of something else, or the file cannot be written.
            BusyError: another process has it.
        """
        with writing(self._path, ELSEWHERE):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
        if try_lock(self._file) is False:
            raise BusyError(f"another evaluation is writing {self._path}: wait for its end, or {ELSEWHERE}")
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            about, answers = (lines[0], dict(lines[1:])) if lines else (self._about, {})
            if about == self._about:
                self._file.truncate(len(whole))
                self._file.seek(0, os.SEEK_END)
                return {key: answer for key, answer in answers.items() if "skipped" not in answer}
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self._path} holds no answers ({error}): remove it, or {ELSEWHERE}") from None
        raise ConfigError(f"{self._path} holds answers of another model, task, data or setting: {ELSEWHERE}")

    def append(self, answers: Mapping[str, Any]) -> None:
        """Write further answers, by their questions' keys."""
        assert self._file is not None
        lines = [] if self._file.tell() else [json.dumps(self._about)]
        lines += [json.dumps(one) for one in answers.items()]
        with writing(self._path, ELSEWHERE):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            with suppress(OSError):  # the disk is full, which `append` has said
                self._file.close()
