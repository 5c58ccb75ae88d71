"""Small raw corpora, and a way to start the tools as a user does."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

TOOLS = Path(__file__).parents[3] / "tools"
WriteLines = Callable[[Path, Iterable[Any]], None]
RunTool = Callable[..., tuple[int, str, str]]
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


@pytest.fixture(scope="session")
def start_tool() -> Callable[..., subprocess.Popen[str]]:
    """Starts a tool as a user does."""

    def start(name: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def run_tool(start_tool: Callable[..., subprocess.Popen[str]]) -> RunTool:
    """Runs a tool to its end: exit code, standard output, standard error."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        process = start_tool(name, *arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return run
