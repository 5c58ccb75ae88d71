"""Commands that documents show can run one after another: data are prepared, ranks fit, names exist."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from metalm.commands.completion import complete_parser
from metalm.commands.scripts import COMMANDS
from metalm.config import RunConfig, load_config
from metalm.config.rules import check_topology

REPOSITORY = Path(__file__).parents[2]
PIPELINES = REPOSITORY / "pipelines"
DOCUMENTS = [
    REPOSITORY / "README.md",
    *(REPOSITORY / f"{folder}/README.md" for folder in ("pipelines", "pipelines/tasks", "slurm")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
(GPUS_PER_NODE,) = map(
    int,
    re.findall(
        r"SBATCH_GPUS_PER_NODE=(\d+)", (REPOSITORY / "slurm/clusters/example.env").read_text(), re.MULTILINE
    ),
)
DEMO_IS_PREPARED = r"make demo|(metalm |tools/)prepare[ _]demo|the demo's data"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@dataclass(frozen=True)
class Start:
    """What a documented line starts: a pipeline that comes with MetaLM, on so many ranks."""

    line: str
    pipeline: Path
    overrides: tuple[str, ...]
    ranks: int
    reads_data: bool

    @property
    def config(self) -> RunConfig:
        return load_config(self.pipeline, self.overrides)


def start_of(line: str) -> Start | None:
    """None: the line starts no ranks, or not those of a pipeline that comes with MetaLM."""
    words = shlex.split(line, comments=True)
    ranks, reads_data = 1, "--without-data" not in words
    if words[:1] == ["torchrun"]:
        ranks, words = int(_option(words, "--nproc-per-node", "1")), words[words.index("-m") + 1 :]
    if words[:2] == ["python", "tools/submit.py"]:
        words = ["metalm", "submit", *words[2:]]
    if words[:1] == ["sbatch"]:
        nodes = next((word.partition("=")[2] for word in words if word.startswith("--nodes=")), "1")
        ranks, words = int(nodes) * GPUS_PER_NODE, [word for word in words if not word.startswith("--")][1:]
        if not words or not words[0].endswith(("pretrain.sbatch", "finetune.sbatch", "evaluate.sbatch")):
            return None
    elif words[:2] == ["metalm", "submit"]:
        if "convert" in words:
            return None
        each = _option(words, "--ranks-per-node", _option(words, "--gpus-per-node", str(GPUS_PER_NODE)))
        ranks, words = int(_option(words, "--nodes", "1")) * int(each), words[1:]
    elif words[:1] == ["metalm"] and words[1:2][:1] in (["train"], ["evaluate"], ["evaluate-tasks"]):
        ranks, words = int(_option(words, "--ranks", str(ranks))), words[1:]
        reads_data = reads_data and words[0] != "evaluate-tasks"
    else:
        return None
    named = PIPELINES / Path(words[1]).name
    if words[0] == "evaluate-tasks":
        named = named.with_suffix(".yaml") if words[1].startswith("runs/") else PIPELINES / "none"
    if not named.is_file():
        return None
    overrides = tuple(word for word in words[2:] if "=" in word and not word.startswith("-"))
    return Start(line, named, overrides, ranks, reads_data)


def _option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def commands_in(text: str) -> Iterator[str]:
    """The lines of bash blocks, and submissions within the text."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`(sbatch --nodes[^`\n]*)`", text)


def header_of(pipeline: Path) -> str:
    """Its first comment as text, with lines that are continued joined."""
    lines = [line for line in pipeline.read_text().splitlines() if line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(line.removeprefix("#").strip() for line in lines))


def preparations_in(lines: Iterator[str] | list[str]) -> dict[str, set[str]]:
    """The words of each preparation, by the folder that it makes below data/."""
    scripts = {script: f"metalm {command}" for command, script in COMMANDS.items()}
    found = {}
    for line in lines:
        line = re.sub(r"^python tools/(\w+)\.py", lambda match: scripts.get(match[1], match[0]), line.strip())
        if line.startswith("metalm ") and (out := re.search(r"--out (data/\S+)", line)):
            found[out[1]] = set(shlex.split(line, comments=True))
    return found


def starts_in_documents() -> list[tuple[Path, Start]]:
    found = []
    for document in DOCUMENTS:
        for line in commands_in(document.read_text()):
            if (start := start_of(line)) is not None:
                found.append((document, start))
    return found


def starts_elsewhere() -> list[Start]:
    """Of the examples that `--help` shows, and of pipelines' first lines."""
    lines = [line for text in _epilogs(complete_parser()) for line in text.splitlines()]
    for pipeline in sorted(PIPELINES.glob("*.yaml")):
        lines += [line for line in header_of(pipeline).splitlines() if re.match(r"torchrun|metalm ", line)]
    lines = [re.sub(r"^\s*(Examples?: )?", "", line) for line in lines]
    starting = [line for line in lines if re.match(r"torchrun .* metalm |metalm |python tools/submit", line)]
    return [start for start in map(start_of, starting) if start is not None]


def _epilogs(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield parser.epilog or ""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _epilogs(child)


def paths_read(config: RunConfig) -> set[str]:
    """Below data/; a run that starts from another has that one's tokenizer."""
    data = config.data
    paths = {str(source.path) for source in (*data.sources.values(), *data.evaluation.values())}
    if config.initialize.decoder is None and config.initialize.run is None:
        paths.add(str(data.tokenizer))
    return {path for path in paths if path.startswith("data/")}


def test_documented_ranks_hold_what_they_are_to_run() -> None:
    starts = [start for _, start in starts_in_documents()]
    elsewhere = starts_elsewhere()
    assert len(starts) > 15 and len(elsewhere) >= 4
    assert {start.ranks for start in starts} >= {1, 2, 4, 8, 16}
    for start in [*starts, *elsewhere]:
        try:
            check_topology(start.config, start.ranks)
        except Exception as error:
            raise AssertionError(start.line) from error


def test_what_a_documented_run_reads_is_prepared_before_it() -> None:
    read: set[str] = set()
    for document, start in starts_in_documents():
        if not start.reads_data:
            continue
        text, header = document.read_text(), header_of(start.pipeline)
        made = {*preparations_in(commands_in(text)), *preparations_in(header.splitlines())}
        if re.search(DEMO_IS_PREPARED, f"{text}\n{header}"):
            made.add("data/demo")
        for path in paths_read(start.config):
            assert any(Path(path).is_relative_to(folder) for folder in made), (
                document.name,
                start.line,
                path,
            )
        read |= paths_read(start.config)
    assert read > {"data/mnli/shards/heldout", "data/multitask/shards/train", "data/chat/shards/text"}


def test_pipelines_that_say_how_their_data_are_prepared_leave_none_out() -> None:
    count = 0
    for pipeline in sorted(PIPELINES.glob("*.yaml")):
        if made := preparations_in(header_of(pipeline).splitlines()):
            assert paths_read(load_config(pipeline, [])) <= made.keys(), pipeline.name
            count += 1
    assert count >= 8


def test_documents_prepare_data_as_their_pipelines_say() -> None:
    said = {}
    for pipeline in PIPELINES.glob("*.yaml"):
        said |= preparations_in(header_of(pipeline).splitlines())
    count = 0
    for document in DOCUMENTS:
        for folder, words in preparations_in(commands_in(document.read_text())).items():
            if folder in said:
                assert words == said[folder], (document.name, folder)
                count += 1
    assert count >= 7


def test_checkpoints_of_the_demo_that_are_named_are_there_after_it() -> None:
    config = load_config(PIPELINES / "demo.yaml", [])
    checkpoint, steps = config.checkpoint, config.training.steps
    assert checkpoint.keep_every_steps is None and checkpoint.keep_best is None
    saved = sorted({*range(checkpoint.every_steps, steps, checkpoint.every_steps), steps})
    kept = {f"step_{step:08d}" for step in saved[-checkpoint.keep_last :]}
    texts = [document.read_text() for document in DOCUMENTS]
    texts += [tool.read_text() for tool in sorted((REPOSITORY / "tools").glob("*.py"))]
    named = re.findall(r"runs/demo/checkpoints/(\w+)", "\n".join(texts))
    assert len(named) >= 3
    assert set(named) <= kept
