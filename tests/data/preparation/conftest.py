"""Small raw corpora, and tools that stop in the middle of their work."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from corpora import TOOLS

WriteLines = Callable[[Path, Iterable[Any]], None]
SUBSETS = ("Pile-CC", "Github", "ArXiv", "Wikipedia (en)")


@pytest.fixture(scope="session")
def corpus() -> list[dict[str, Any]]:
    """300 documents of one to twenty paragraphs, about 0.5 MB."""
    stream = random.Random(7)
    words = ["the", "quick", "brown", "fox", "naïve", "数据", "jumps", "over", "</d>", "def f(x):\n    y"]
    documents = []
    for number in range(300):
        paragraphs = (
            " ".join(stream.choices(words, k=stream.randint(1, 50))) for _ in range(stream.randint(1, 20))
        )
        text = f"document {number}\n" + "\n\n".join(paragraphs)
        documents.append({"text": text, "meta": {"pile_set_name": stream.choice(SUBSETS)}})
    return documents


@pytest.fixture(scope="session")
def corpus_file(
    corpus: list[dict[str, Any]], write_lines: WriteLines, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_lines(path, corpus)
    return path


@pytest.fixture(scope="session")
def write_lines() -> WriteLines:
    """Writes rows as JSON Lines."""

    def write(path: Path, rows: Iterable[Any]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.fixture(scope="session")
def read_samples() -> Callable[[Path], dict[str, dict[str, bytes]]]:
    """Reads all samples of a folder by key with plain webdataset; a key that occurs twice is an error."""

    def read(folder: Path) -> dict[str, dict[str, bytes]]:
        shards = [str(shard) for shard in sorted(folder.glob("*.tar"))]
        samples: dict[str, dict[str, bytes]] = {}
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            assert sample["__key__"] not in samples
            samples[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
        return samples

    return read


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All that must be equal whatever the processes and restarts: shards, receipts, plan, report."""

    def read(folder: Path) -> dict[str, bytes]:
        files = [*folder.glob("*.tar"), folder / "report.json", *folder.glob("preparation/**/*.json")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return read


@pytest.fixture(scope="session")
def image_bytes() -> Callable[..., bytes]:
    """An image file of one colour."""

    def make(kind: str, size: tuple[int, int] = (20, 12), color: str = "red") -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, color).save(buffer, kind)
        return buffer.getvalue()

    return make


PAUSE = """
import os, time

def fsync(file, fsync=os.fsync, folder=os.environ["PAUSE_FOLDER"], limit=int(os.environ["PAUSE_AT"])):
    fsync(file)
    while sum(name.endswith(".tar") for name in os.listdir(folder)) >= limit:
        if os.path.exists(os.environ["PAUSE_END"]):
            return
        time.sleep(0.01)

os.fsync = fsync
"""
"""A sitecustomize that every process of a tool reads: before it finishes a file, it waits if there are enough
shards. So a test meets the tool in the middle of its work, however fast either of them is."""


class PausedTool:
    """A tool that comes to rest once so many shards are there, until `go_on`."""

    def __init__(self, folder: Path, out: Path, shards: int, command: Sequence[object]) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(PAUSE)
        self._out, self._shards, self._end = out, shards, folder / "end"
        settings = {"PAUSE_FOLDER": out, "PAUSE_AT": shards, "PAUSE_END": self._end, "PYTHONPATH": folder}
        self.process = subprocess.Popen(
            [sys.executable, str(TOOLS / str(command[0])), *map(str, command[1:])],
            env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_shards(self) -> None:
        """Returns when the tool rests, or is about to."""
        while len(list(self._out.glob("*.tar"))) < self._shards:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def go_on(self) -> None:
        """Lets its processes that are left work on."""
        self._end.touch()
