"""The figures of a run in `logs/metrics.jsonl`: a JSON object a line, read without torch or TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metalm.regular_files import open_regular, read_regular
from metalm.run_folder import LOGS_NAME

_BLOCK_BYTES = 1 << 16
_MOST_BYTES = 1 << 20


def metrics_path(run_folder: Path) -> Path:
    """Where they are."""
    return run_folder / LOGS_NAME / "metrics.jsonl"


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """All that are written so far, one dictionary per write, in order; a line that is torn is left out.

    A line is torn at the end of the file while it is written, and inside where a machine went down.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    path = metrics_path(run_folder)
    return list(_entries(read_regular(path).splitlines())) if path.exists() else []


def newest_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The last that were written, newest first, of up to a mebibyte of the file.

    It is read from its end: that takes as long for a run of a million steps as for one of ten.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    path = metrics_path(run_folder)
    return list(_entries(_lines_from_end(path))) if path.exists() else []


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield entry


def _lines_from_end(path: Path) -> Iterator[bytes]:
    with open_regular(path) as handle:
        end = handle.seek(0, os.SEEK_END)
        first, cut = end, b""
        while first > 0 and end - first < _MOST_BYTES:
            size = min(_BLOCK_BYTES, first)
            first = handle.seek(first - size)
            cut, *whole = (handle.read(size) + cut).split(b"\n")
            yield from reversed(whole)
        if first == 0:
            yield cut
