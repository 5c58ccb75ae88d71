"""`metalm evaluate-tasks` as typed: a run on layouts of its ranks, and its export, say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from built_once import built_once
from distributed.ranks import run_program
from metalm.evaluation.task_scores import QUESTIONS_AT_ONCE

REPOSITORY = Path(__file__).parents[2]
NUM_QUESTIONS = QUESTIONS_AT_ONCE + 3
TRAINING = (
    "data.sequence_length=256",
    "model.encoders.text.max_text_positions=48",
    "model.encoders.image.max_text_positions=48",
    "model.encoders.image.connector=linear",
    "training.steps=3",
    "training.optimizer.learning_rate=0.02",
    "parallel.tensor=2",
)
TASK = """
task: colours
cluster: pictures
data:
  folder: colours
  reader: jsonl
  files: {train: train.jsonl, validation: validation.jsonl}
  fields: {question: question, file: file, answer_text: answer}
  media: {picture: "{file}"}
options: {red: red, green: green, dark blue: dark blue}
answer: answer_text
templates:
  - id: asked
    span: [{image: picture}, "Question: {question}"]
    plain: ["TARGET:"]
    target: " {answer}"
icl:
  span: [{image: picture}, "Question: {question}"]
  plain: ["Answer:"]
  target: " {answer}"
  normalise: NORMALISE
decode: DECODE
metrics: [exact_match]
"""


class Trained:
    """A run on two ranks, its export, a task and its data."""

    def __init__(self, folder: Path, tiny_data: Path) -> None:
        self.folder, self.run, self.export = folder, folder / "runs/tiny", folder / "hf"
        self._tiny = tiny_data

    def build(self) -> None:
        self.folder.mkdir()
        words = ["-m", "metalm", "train", str(self._tiny / "tiny.yaml"), f"run.folder={self.folder / 'runs'}"]
        code, output = run_program([*words, *TRAINING], 2, timeout_s=180)
        assert code == 0, output
        tool = str(REPOSITORY / "tools/convert_to_hf.py")
        code, output = run_program([tool, str(self.run), str(self.export)], timeout_s=180)
        assert code == 0, output
        data = self.folder / "data/colours"
        data.mkdir(parents=True)
        draw = np.random.default_rng(0)
        for split, count in (("train", 4), ("validation", NUM_QUESTIONS)):
            lines = []
            for number in range(count):
                name = f"{split}-{number % 5}.png"
                pixels = draw.integers(0, 256, (24, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(data / name)
                answer = ("red", "green", "dark blue")[number % 3]
                question = f"which colour has thing {number}?"
                lines.append(json.dumps({"question": question, "file": name, "answer": answer}))
            (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")

    def task(self, path: Path, *, normalise: str = "none", decode: str = "{max_new_tokens: 6}") -> Path:
        path.write_text(TASK.replace("NORMALISE", normalise).replace("DECODE", decode))
        return path

    def evaluate(
        self, model: Path, task: Path, out: Path, *words: str, num_ranks: int = 1
    ) -> tuple[int, str]:
        command = ["-m", "metalm", "evaluate-tasks", str(model), "--tasks", str(task)]
        where = ["--data", str(self.folder / "data"), "--out", str(out)]
        return run_program([*command, *where, *words], num_ranks, timeout_s=180)

    def answers(self, model: Path, task: Path, out: Path, *words: str, num_ranks: int = 1) -> dict[str, Any]:
        code, output = self.evaluate(model, task, out, *words, num_ranks=num_ranks)
        assert code == 0, output
        (file,) = (out / "answers").iterdir()
        return dict(json.loads(line) for line in file.read_text().splitlines()[1:])


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = built_once(tmp_path_factory, "evaluated", lambda folder: Trained(folder, tiny_data).build())
    return Trained(folder, tiny_data)


def test_options_are_as_likely_on_every_layout_and_in_the_export(trained: Trained, tmp_path: Path) -> None:
    task = trained.task(tmp_path / "task.yaml", normalise="answer_context")
    asked = ("--shots", "1", "--limit", "8")
    reference = trained.answers(trained.export, task, tmp_path / "one", *asked, "--batch-size", "1")
    assert len(reference) == 8
    spread = [max(one["scores"]) - min(one["scores"]) for one in reference.values()]
    assert min(spread) > 1e-2
    board = EventAccumulator(str(trained.run / "tensorboard"))
    ways = {
        "many": (trained.export, (*asked, "--batch-size", "16"), 1),
        "tensor": (trained.run, asked, 2),
        "data": (trained.run, (*asked, "parallel.tensor=1", "--batch-size", "3"), 2),
        "context": (trained.run, (*asked, "parallel={tensor: 1, context: 2}"), 2),
    }
    for name, (model, words, num_ranks) in ways.items():
        found = trained.answers(model, task, tmp_path / name, *words, num_ranks=num_ranks)
        assert found.keys() == reference.keys()
        for key, one in reference.items():
            assert found[key]["prediction"] == one["prediction"]
            np.testing.assert_allclose(found[key]["scores"], one["scores"], rtol=0, atol=1e-4)
    board.Reload()
    right = np.mean([one["prediction"] in one["references"] for one in reference.values()])
    shown = [event.value for event in board.Scalars("tasks/colours/1_shots/exact_match")]
    assert shown == pytest.approx([right] * 3)  # of all layouts


def test_the_run_and_its_export_generate_alike(trained: Trained, tmp_path: Path) -> None:
    beams = "{method: beam, num_beams: 3, length_penalty: 0.6, max_new_tokens: 6}"
    task = trained.task(tmp_path / "task.yaml", decode=beams)
    exported = trained.answers(trained.export, task, tmp_path / "export", "--limit", "5")
    run = trained.answers(
        trained.run, task, tmp_path / "run", "--limit", "5", "parallel.tensor=1", num_ranks=2
    )
    assert len(exported) == 5
    assert run == exported


def test_an_evaluation_that_was_killed_goes_on(trained: Trained, tmp_path: Path) -> None:
    task, out = trained.task(tmp_path / "task.yaml"), tmp_path / "out"
    asked = ("--shots", "0", "--batch-size", "64")
    whole = trained.answers(trained.export, task, out, *asked)
    assert len(whole) == NUM_QUESTIONS
    results = json.loads((out / "results.json").read_text())
    assert results[0]["scores"]["exact_match"]["count"] == NUM_QUESTIONS
    (file,) = (out / "answers").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    marked = lines[1].replace('"prediction": "', '"prediction": "was here: ')
    file.write_text("".join([lines[0], marked, *lines[2:40]]) + lines[40][:30])
    again = trained.answers(trained.export, task, out, *asked)
    assert again.keys() == whole.keys()
    differing = [key for key in whole if again[key]["prediction"] != whole[key]["prediction"]]
    assert differing == [next(iter(whole))]
    code, output = trained.evaluate(trained.export, task, out, *asked, "--seed", "1")
    assert code == 64
    assert "holds answers of another model, task, data or setting" in output


def test_answers_of_other_data_or_weights_are_not_taken(trained: Trained, tmp_path: Path) -> None:
    task, out = trained.task(tmp_path / "task.yaml"), tmp_path / "out"
    data, export = tmp_path / "data", tmp_path / "hf"
    shutil.copytree(trained.folder / "data", data)
    shutil.copytree(trained.export, export)
    asked = ("--limit", "2", "--data", str(data))
    before = trained.answers(export, task, out, *asked)
    assert trained.answers(export, task, out, *asked) == before
    weights = export / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, output = trained.evaluate(export, task, out, *asked)
    assert (code, "holds answers of another model, task, data" in output) == (64, True), output
    content[-1] ^= 1
    weights.write_bytes(content)
    questions = data / "colours/validation.jsonl"
    questions.write_text(questions.read_text() + questions.read_text().splitlines()[0] + "\n")
    code, output = trained.evaluate(export, task, out, *asked)
    assert (code, "holds answers of another model, task, data" in output) == (64, True), output
    words = ("--limit", "2", "--shots", "0")
    trained.answers(trained.run, task, tmp_path / "run", *words, num_ranks=2)
    code, output = trained.evaluate(
        trained.run, task, tmp_path / "run", *words, "data.sequence_length=512", num_ranks=2
    )
    assert code == 64, output


def test_a_prompt_leaves_room_for_the_answer(trained: Trained, tmp_path: Path) -> None:
    decode, data = "{max_new_tokens: 200}", tmp_path / "data"
    task = trained.task(tmp_path / "task.yaml", decode=decode)
    shutil.copytree(trained.folder / "data", data)
    questions = data / "colours/validation.jsonl"
    short, long = (json.loads(line) for line in questions.read_text().splitlines()[:2])
    long["question"] = "which colour has this thing? " * 40
    questions.write_text("".join(json.dumps(one) + "\n" for one in (short, long)))
    where = ("--data", str(data), "--shots", "0", "--score-by", "generation", "--batch-size", "2")
    found = trained.answers(trained.export, task, tmp_path / "split", *where)
    assert found["validation:1"] == {"skipped": "too_long"}
    cut = ("--overflow", "cut_right")
    together = trained.answers(trained.export, task, tmp_path / "cut", *where, *cut)
    alone = trained.answers(trained.export, task, tmp_path / "alone", *where, *cut, "--batch-size", "1")
    assert together == alone
    assert together["validation:0"] == found["validation:0"]
    assert "prediction" in together["validation:1"]
    run = trained.answers(trained.run, task, tmp_path / "run", *where, *cut, num_ranks=2)
    assert run == together


def test_processes_that_share_an_export_write_what_one_does(trained: Trained, tmp_path: Path) -> None:
    """To the bit, and whoever answered the questions before a kill."""
    task = trained.task(tmp_path / "task.yaml")
    asked = ("--shots", "1", "--batch-size", "7")
    outs = {num_ranks: tmp_path / str(num_ranks) for num_ranks in (1, 2, 3)}
    for num_ranks in (1, 2):
        trained.answers(trained.export, task, outs[num_ranks], *asked, num_ranks=num_ranks)
    expected = folder_content(outs[1])
    assert len(expected) == 4  # answers, results twice, and their lock
    assert folder_content(outs[2]) == expected
    shutil.copytree(outs[2], outs[3])
    (file,) = (outs[3] / "answers").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: 1 + QUESTIONS_AT_ONCE]) + lines[-1][:20])
    trained.answers(trained.export, task, outs[3], *asked, num_ranks=3)
    assert folder_content(outs[3]) == expected


def folder_content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shots", "one"), "give numbers with commas between"),
        (("--limit", "0"), "is no number above 0"),
        (("--seed", "-1"), "'-1' is no number from 0 on"),
        (("--readers", "image"), "say who reads what"),
        (("--readers", "image=scene"), "the model's encoders are image, text"),
        (("parallel.tensor=1",), "is for runs"),
        (("--tasks", "mnil"), "there is no task mnil"),
        (("--device", "abacus"), "--device abacus"),
        (("--device", "cuda:7"), "GPU 7 is wanted, this machine has 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_asked_is_refused(
    trained: Trained, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    task = trained.task(tmp_path / "task.yaml")
    code, output = trained.evaluate(trained.export, task, tmp_path / "out", *words)
    assert (code, message in output) == (64, True), output
    assert "Traceback" not in output


def test_more_demonstrations_than_there_are_is_refused(trained: Trained, tmp_path: Path) -> None:
    task = trained.task(tmp_path / "task.yaml")
    code, output = trained.evaluate(trained.export, task, tmp_path / "out", "--shots", "5")
    assert code == 64
    assert "5 demonstrations are wanted, but train has 4" in output
