"""No command is silent for long: its long phases say what they are, before they have come to their end."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from metalm import progress
from metalm.checkpoint.manifest import record_file, write_manifest
from metalm.cli import _run_command, make_parser
from metalm.commands.scripts import COMMANDS, GROUPS, find_scripts

REPOSITORY = Path(__file__).parents[1]
IMMEDIATE = {
    "status": "reads a few small files",
    "stop": "writes one file",
    "completion": "asks each script for its options",
    "tasks": "see `tasks check`",
    "tool": "is the scripts themselves",
    "import templates": "reads two small files",
    "prepare demo": "names each step; steps tell the rest",
    "chat": "loads as `generate` does; answers are heard as they come",
}
"""Commands without a phase of their own, and why."""
MEASUREMENTS = (
    *("bench_attention", "bench_checkpoint", "bench_data", "bench_data_peers", "bench_gpt2", "bench_plan"),
    *("bench_step", "check_gpu", "check_ranks", "lower_bounds", "measure_start", "measured_tables"),
    *("report_kernels", "tune_attention"),
)
"""Scripts that print each figure as it is there; nothing is to run beside what they time."""
ALIKE = (
    *("draw_answers", "draw_mask", "evaluate_harness", "make_demo_data", "randomise_encoder"),
    *("summarise_demo", "vary_task"),
)
"""Scripts beyond the commands, which are short, or go through the same phases."""


class Heard(io.StringIO):
    """A log that knows when something was said."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.event = words, threading.Event()

    def write(self, text: str) -> int:
        if self.words in text:
            self.event.set()
        return super().write(text)


class Enough(BaseException):
    """The phase was told of; what follows it is not wanted."""


@dataclass(frozen=True)
class Slow:
    """A command in one of its long phases."""

    command: str
    stub: str
    """What takes for ever: a function, or with a colon before it, a module that is imported."""
    words: str
    """That are said meanwhile."""
    arguments: Callable[[Path], Sequence[str | Path]] = field(default=lambda folder: [])
    besides: dict[str, Any] = field(default_factory=dict)
    """Further functions, and what they answer."""


def table(folder: Path) -> Path:
    (folder / "one.png").write_bytes(b"")
    (folder / "pairs.csv").write_text("path,caption\none.png,a caption\n")
    return folder / "pairs.csv"


def clips(folder: Path) -> Path:
    (folder / "clips").mkdir()
    for name in ("one.wav", "one.txt"):
        (folder / "clips" / name).write_bytes(b"a")
    return folder / "clips"


def task(folder: Path) -> Path:
    """A task file, with its data beside it."""
    (folder / "sums").mkdir()
    (folder / "sums/train.csv").write_text("sum,right\n1 + 1,2\n")
    content = {
        "task": "sums",
        "cluster": "misc",
        "data": {
            "folder": "sums",
            "reader": "csv",
            "files": {"train": "train.csv"},
            "fields": {"sum": "sum", "right": "right"},
        },
        "answer": "right",
        "templates": [{"id": "asked", "plain": ["{sum}"], "target": " {answer}"}],
        "metrics": ["exact_match"],
        "evaluated_on": "train",
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(content))
    return folder / "sums.yaml"


def records(folder: Path, **record: Any) -> Path:
    path = folder / "records.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return path


def checkpoint(folder: Path) -> Path:
    step = folder / "run" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "file").write_bytes(b"content")
    write_manifest(step, {"file": record_file(step / "file")})
    return step


def shards(folder: Path) -> Path:
    (folder / "shards").mkdir()
    (folder / "shards" / "0.tar").write_bytes(b"")
    return folder / "shards"


def exported(folder: Path) -> Path:
    (folder / "exported").mkdir()
    (folder / "exported" / "config.json").write_text('{"model_type": "metalm"}')
    return folder / "exported"


DATA = "metalm.data.preparation"
DEMO = REPOSITORY / "pipelines" / "demo.yaml"
CHECK, JOIN = "metalm.training.check_start.check_start", "metalm.training.joining.join"
LOADS = "loading DeepSpeed and Megatron"
RECORD = SimpleNamespace(options=[], answers=["a"], key="k")
CHATS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SLOW = [
    Slow("train", ":metalm.training.check_start", "loading the schema", lambda f: [DEMO]),
    Slow("train", CHECK, "reading the configuration", lambda f: [DEMO]),
    Slow("train", ":metalm.training.joining", "loading torch", lambda f: [DEMO], {CHECK: None}),
    Slow("train", JOIN, "joining 1 rank", lambda f: [DEMO], {CHECK: None}),
    Slow("train", ":metalm.training.loop", LOADS, lambda f: [DEMO], {CHECK: None, JOIN: None}),
    Slow("evaluate", ":metalm.training.evaluate", LOADS, lambda f: [DEMO], {CHECK: None, JOIN: None}),
    Slow(
        "evaluate-tasks",
        ":metalm.conversion.export_answerer",
        "loading transformers",
        lambda f: [exported(f), "--tasks", "mnli"],
    ),
    Slow(
        "generate",
        "metalm.conversion.generate._load_model",
        "loading the model",
        lambda f: [exported(f), "--prompt", "a"],
    ),
    Slow("generate", ":metalm.conversion.generate", "loading transformers", lambda f: [exported(f)]),
    Slow("report", "metalm.operations.report.write_report", "writing the report", lambda f: [f]),
    Slow("preflight", ":metalm.operations.preflight", "loading torch", lambda f: [f]),
    Slow(
        "tasks check",
        "metalm.tasks.showing.render",
        "wording",
        lambda f: ["mnli", "--data", f],
        {"metalm.tasks.showing.TaskData": SimpleNamespace(records=lambda split, tally: [RECORD])},
    ),
    Slow(
        "check",
        "metalm.data.checking._check_shard",
        "checking",
        lambda f: [f, "--processes", "1"],
        {"metalm.data.checking.open_index": SimpleNamespace(shards=[1]), "metalm.data.checking._open": None},
    ),
    Slow(
        "prepare text",
        f"{DATA}.text_shards.run_tasks",
        "preparing",
        lambda f: [records(f, text="a"), "--out", f / "out", "--store", "text"],
    ),
    Slow(
        "prepare pairs",
        f"{DATA}.pair_shards.run_tasks",
        "preparing",
        lambda f: [table(f), "--out", f / "out"],
    ),
    Slow(
        "prepare pairs",
        f"{DATA}.pair_shards.list_records",
        "listing",
        lambda f: [table(f), "--out", f / "out"],
    ),
    Slow(
        "prepare audio",
        f"{DATA}.pair_shards.run_tasks",
        "preparing",
        lambda f: [clips(f), "--out", f / "out"],
    ),
    Slow(
        "prepare chat",
        f"{DATA}.example_shards.run_tasks",
        "preparing",
        lambda f: [records(f, **CHATS), "--out", f / "out"],
    ),
    Slow(
        "prepare interleaved",
        f"{DATA}.example_shards.run_tasks",
        "preparing",
        lambda f: [records(f, texts=["a"], images=[None]), "--out", f / "out"],
    ),
    Slow(
        "prepare tasks",
        f"{DATA}.example_shards.run_tasks",
        "preparing",
        lambda f: ["--tasks", task(f), "--data", f, "--out", f / "out"],
    ),
    Slow(
        "prepare tokenizer",
        "metalm.data.tokenizer._pieces_for_training",
        "training the tokenizer",
        lambda f: [records(f, text="a"), "--out", f / "out", "--vocab-size", "300"],
    ),
    Slow("index", "metalm.data.storage.index._scan_all", "indexing", lambda f: [shards(f), "--kind", "text"]),
    Slow(
        "plan",
        "metalm.planning.search.plan_run",
        "planning layouts",
        lambda f: [DEMO, "--gpus", "2", "--search"],
    ),
    Slow(
        "submit",
        "shutil.copytree",
        "copying the code",
        lambda f: [DEMO, "--nodes", "1", "--gpus-per-node", "2", f"run.folder={f}"],
        {"shutil.which": "sbatch"},
    ),
    Slow("inspect", "metalm.checkpoint.manifest._check_file", "hashing", lambda f: [checkpoint(f)]),
    Slow(
        "convert", "metalm.checkpoint.manifest._check_file", "hashing", lambda f: [checkpoint(f), f / "out"]
    ),
    Slow(
        "prune",
        "metalm.checkpoint.folders.prune_checkpoints",
        "removing checkpoints",
        lambda f: [checkpoint(f).parents[1]],
    ),
    Slow("convert", ":metalm.conversion.export", "loading transformers", lambda f: [f, f / "out"]),
    Slow("refresh", ":metalm.conversion.refresh", "loading transformers", lambda f: [f]),
    Slow("import export", ":metalm.conversion.restore", "loading transformers", lambda f: [f, DEMO]),
    Slow(
        "import decoder",
        ":metalm.conversion.import_decoder",
        "loading transformers",
        lambda f: [f, f / "out"],
    ),
    Slow(
        "import tokenizer",
        "metalm.conversion.completed_tokenizer.read_foreign_tokenizer",
        "reading the tokenizer",
        lambda f: [f, "--out", f / "out"],
    ),
    Slow(
        "fetch",
        "metalm.reproduction.data.getting.subprocess.Popen",
        "fetching",
        lambda f: ["vader", "--output", f],
        {"metalm.reproduction.data.getting.importlib.util.find_spec": True},
    ),
    Slow(
        "reproduce",
        "metalm.reproduction.queue.Queue.run_job",
        "running jobs",
        lambda f: ["--only", "a", "--out", f / "out"],
        {"metalm.reproduction.claim.check_data": None},
    ),
    Slow(
        "calibrate",
        ":metalm.training.calibrate",
        LOADS,
        lambda f: [f / "out.json"],
    ),
]


class Blocked(MetaPathFinder):
    """A module that takes for ever to load."""

    def __init__(self, name: str, wait: Callable[[], None]) -> None:
        self._name, self._wait = name, wait

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == self._name:
            self._wait()


@pytest.mark.parametrize("slow", SLOW, ids=lambda slow: f"{slow.command}: {slow.words}")
def test_what_takes_long_says_so(slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_S", "LOG_EVERY_S"):
        monkeypatch.setattr(progress, name, 0.01)
    monkeypatch.delenv("RANK", raising=False)
    for name in ("DS_ACCELERATOR", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, "cpu" if name == "DS_ACCELERATOR" else "1"))
    heard = Heard(slow.words)

    def wait(*arguments: Any, **others: Any) -> None:
        if heard.event.wait(5):
            raise Enough
        pytest.fail(f"metalm {slow.command} is silent in {slow.stub}; it said: {heard.getvalue()!r}")

    for name, answer in slow.besides.items():
        monkeypatch.setattr(name, lambda *arguments, answer=answer, **others: answer)
    if slow.stub.startswith(":"):
        monkeypatch.delitem(sys.modules, slow.stub[1:], raising=False)
        monkeypatch.setattr(sys, "meta_path", [Blocked(slow.stub[1:], wait), *sys.meta_path])
    else:
        monkeypatch.setattr(slow.stub, wait)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    arguments = [*slow.command.split(), *map(str, slow.arguments(tmp_path))]
    monkeypatch.setattr(sys, "stderr", heard)
    with pytest.raises(Enough):
        _run_command(arguments)


def test_no_command_is_left_out() -> None:
    commands = {action.dest for action in make_parser()._subparsers._group_actions[0]._choices_actions}
    commands = {name for name in commands if name not in GROUPS} | {"tasks check"} | COMMANDS.keys()
    covered = {slow.command for slow in SLOW}
    assert commands == covered | IMMEDIATE.keys() and not covered & IMMEDIATE.keys()
    assert find_scripts().keys() == {*COMMANDS.values(), *MEASUREMENTS, *ALIKE}
