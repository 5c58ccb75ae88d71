"""One claim in miniature, from records to report, by the commands that the queue starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from distributed.fork_server import Program
from metalm.reproduction import queue
from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import Claim, Comparison, Series, jobs_of
from metalm.reproduction.jobs import Job, tool
from metalm.reproduction.report import write_report
from metalm.reproduction.results import results_of
from reproduction.invented import write_task

TINY = (
    "initialize.decoder=null",
    "model.vocab_size=512",
    "model.decoder.num_layers=1",
    "model.decoder.hidden_size=32",
    "model.decoder.num_heads=2",
    "data.sequence_length=128",
    "training.steps=4",
    "training.schedule.warmup_steps=1",
    "monitor.evaluate_every_steps=2",
    "monitor.evaluation_rows=2",
)


def start(command: Sequence[str], *, stdout: IO[bytes], stderr: Any, env: Any) -> Program:
    """As `subprocess.Popen`, without the imports."""
    return Program(list(command[1:]), stdout.fileno())


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(queue, "Popen", start)
    texts = [f"{word} {number}" for number in range(20) for word in ("good", "bad")]
    write_task(
        tmp_path / "data",
        {"train": texts, "validation": ["good 21", "bad 22"], "test": ["good 23", "bad 24"]},
    )
    return Setting(tmp_path / "data", tmp_path / "out", "cpu", 1)


def claim(setting: Setting) -> Claim:
    task, tokenizer, worded = (
        setting.data / "invented.yaml",
        setting.shared("tok"),
        setting.shared("worded.jsonl"),
    )
    where = ("--data", setting.data)
    shards = setting.shared("train")
    commands = [
        tool("vary_task", "worded", task, *where, "--out", worded),
        tool("train_tokenizer", worded, "--vocab-size", 512, "--out", tokenizer),
        tool("prepare_tasks", "--tasks", task, *where, "--processes", 1, "--out", shards),
    ]
    paths = (
        f"data.tokenizer={tokenizer}",
        f"data.sources.tasks.path={shards}",
        f"data.evaluation.tasks.path={shards}",
    )
    arm = Arm(
        "arm",
        "a tiny decoder",
        "b_gpt",
        (*TINY, *paths),
        (Scoring("test", (task,)),),
        ("shared/train",),
        rates=(1e-3,),
    )
    series = Series(arm, "test")
    return Claim(
        letter="x",
        title="In miniature",
        says="",
        how="",
        paper=(("GPT", "65.0"),),
        sets=(),
        shared=(Job("shared/train", lambda: commands),),
        arms=(arm,),
        comparisons=(Comparison("itself", series, series),),
    )


def test_a_claim_goes_from_records_to_a_report(setting: Setting) -> None:
    jobs = jobs_of([(claim(setting), setting)])
    said: list[str] = []
    queue.Queue(jobs, setting.out, said.append).run(1)
    assert [line.split()[1] for line in said if line.startswith("done")] == [
        "shared/train",
        "arm/seed_1",
    ]
    found = results_of(claim(setting), setting)
    (measured,) = found.measured.values()
    assert measured.questions == 2
    assert measured.scores.mean in (0.0, 0.5, 1.0)
    assert [curve.steps for curve in found.figures.curves] == [(0, 2, 4)]
    write_report([found], setting, said.append)
    assert "| arm, test | a tiny decoder |" in (setting.out / "report.md").read_text()
    config = (setting.out / "arm/seed_1/config.yaml").read_text()
    assert "seed: 1\n" in config
    marks = json.loads((setting.out / "jobs/arm--seed_1.json").read_text())
    assert [command[3] for command in marks["commands"]] == ["train", "evaluate-tasks"]
