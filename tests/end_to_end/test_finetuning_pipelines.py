"""Each pipeline of finetuning, in small: it learns invented records by heart, as its export shows.

Data are prepared, trained on, exported and evaluated by the commands that users type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from distributed.ranks import run_program
from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.reader import CheckpointReader
from metalm.run_metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests/tasks/data"


class Case(NamedTuple):
    """Tasks of a pipeline by name with the metric that is to be 1, and in which wordings it learns them."""

    metrics: dict[str, str]
    wordings: str = "first"
    largest_loss: float = 0.05
    """Of an image with several captions the first words stay open."""


CASES = {
    "finetune_multitask": Case({"qnli": "exact_match", "squad_v1": "squad_f1", "samsum": "rougeL"}),
    "instruction_tune": Case({"sst2": "exact_match", "boolq": "exact_match"}, wordings="all"),
    "finetune_vqa": Case({"vqav2": "vqa_accuracy"}),
    "finetune_nlvr2": Case({"nlvr2": "exact_match"}),
    "finetune_captions": Case({"coco_caption": "coco_bleu4"}, largest_loss=0.5),
    "finetune_explanations": Case({"esnli_ve": "exact_match"}),
}
TRAINING = (
    "training.precision=fp32",
    "training.steps=120",
    "training.optimizer.learning_rate=3e-3",
    "training.schedule.warmup_steps=10",
    "training.schedule.decay=constant",
    "guards.spike_sigma=null",
    "checkpoint.every_steps=120",
    "monitor.evaluate_every_steps=120",
    "monitor.sample_every_steps=120",
)


def run(*words: str | Path, num_ranks: int = 1) -> str:
    code, output = run_program(list(map(str, words)), num_ranks, timeout_s=280)
    assert code == 0, output
    return output


def finetune(name: str, case: Case, folder: Path, tokenizer: Path, start: str, *more: str) -> Path:
    """Prepare the tasks, train on them in `folder`, and hold them to be learnt; the run's folder."""
    folder.mkdir(exist_ok=True)
    shards = folder / f"shards of {name}"
    run(REPOSITORY / "tools/prepare_tasks.py", *asked(case), "--wordings", case.wordings, "--out", shards)
    where = (f"run.folder={folder}", f"data.tokenizer={tokenizer}", f"data.sources.tasks.path={shards}")
    starts = (f"initialize.decoder={start}", f"initialize.encoders={start}")
    pipeline = REPOSITORY / f"pipelines/{name}_tiny.yaml"
    evaluation = f"data.evaluation.tasks.path={shards}"
    run("-m", "metalm", "train", pipeline, *where, evaluation, *starts, *TRAINING, *more, num_ranks=2)
    run_folder = folder / f"{name}_tiny"
    losses = [entry["loss/all"] for entry in read_metrics(run_folder) if "loss/all" in entry]
    assert losses[-1] < case.largest_loss, losses
    return run_folder


def asked(case: Case) -> tuple[str | Path, ...]:
    return ("--data", DATA, "--split", "validation", "--tasks", ",".join(case.metrics))


def test_a_run_is_scored_on_tasks_while_it_trains(tiny_data: Path, tmp_path: Path) -> None:
    watched = {"names": ["qnli"], "data": str(DATA), "every_steps": 60, "questions": 2}
    case = Case({"qnli": "exact_match"})
    folder = finetune(
        "finetune_multitask", case, tmp_path, tiny_data / "tokenizer", "null", f"monitor.tasks={watched}"
    )
    scores = {
        entry["step"]: entry["tasks/qnli/exact_match"]
        for entry in read_metrics(folder)
        if "tasks/qnli/exact_match" in entry
    }
    assert sorted(scores) == [60, 120]
    assert scores[120] == 1.0
    (result,) = json.loads((folder / "tasks/step_00000120/results.json").read_text())
    assert result["questions"] == 2


def hold_export_to_know(case: Case, run_folder: Path, out: Path) -> None:
    run(REPOSITORY / "tools/convert_to_hf.py", run_folder, out)
    run("-m", "metalm", "evaluate-tasks", out, *asked(case))
    results = json.loads((out / "tasks/results.json").read_text())
    assert [result["task"] for result in results] == list(case.metrics)
    for result in results:
        assert result["scores"][case.metrics[result["task"]]]["value"] == pytest.approx(1.0), result


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_learns_its_task_by_heart(name: str, tiny_data: Path, tmp_path: Path) -> None:
    trained = finetune(name, CASES[name], tmp_path, tiny_data / "tokenizer", "null")
    hold_export_to_know(CASES[name], trained, tmp_path / "hf")


def test_an_encoder_learns_a_task_for_a_frozen_decoder(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = tiny_data / "tokenizer"
    base = finetune("finetune_multitask", Case({"rte": "exact_match"}), tmp_path, tokenizer, "null")
    case = Case({"qnli": "exact_match"})
    trained = finetune("finetune_single", case, tmp_path, tokenizer, str(base))
    before, after = (CheckpointReader(find_checkpoint(folder)) for folder in (base, trained))
    for name in before.parameters("decoder"):
        assert torch.equal(before.read("decoder", name), after.read("decoder", name))
    hold_export_to_know(case, trained, tmp_path / "hf")
