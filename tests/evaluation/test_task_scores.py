"""What of a generated text is scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from metalm.errors import ConfigError
from metalm.evaluation.task_scores import Evaluated, evaluate_tasks, require_out
from metalm.tasks.task_file import TaskFile, load_task
from metalm.tasks.ways import TaskSettings

WORDING: dict[str, Any] = {"plain": ["question: {question}"], "target": " {answer}"}
TASK: dict[str, Any] = {
    "task": "pets",
    "cluster": "misc",
    "data": {
        "folder": "pets",
        "reader": "jsonl",
        "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "fields": {"question": "question", "right": "right"},
    },
    "answer": "right",
    "templates": [{"id": "asked", **WORDING}],
    "icl": {**WORDING, "score": "generation"},
    "metrics": ["exact_match"],
}


class Repeats:
    """A model that goes on as the demonstrations do."""

    is_first, share, num_shares = True, 0, 1

    def maker(self, *_: Any) -> Any:
        return SimpleNamespace(make=lambda example, **_: SimpleNamespace(document=example), read=None)

    def agreed(self, value: Any) -> Any:
        return value

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def continuations(self, prompts: Sequence[Any], *_: Any) -> list[str]:
        return [" cat\n\nquestion: who barks? dog" for _ in prompts]


def write_task(folder: Path, name: str = "pets") -> TaskFile:
    """A task about who purrs."""
    (folder / "pets").mkdir(exist_ok=True)
    for split in ("train", "validation"):
        line = json.dumps({"question": f"who purrs in {split}?", "right": "cat"})
        (folder / "pets" / f"{split}.jsonl").write_text(line + "\n")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(TASK | {"task": name}))
    return load_task(folder / f"{name}.yaml")


def score(folder: Path, **settings: Any) -> tuple[float, str]:
    """The score, and what was taken for the answer."""
    task = write_task(folder)
    asked = TaskSettings(data=folder, **settings)
    model = Evaluated("a model", "as it is")
    out = folder / f"out_{len(list(folder.iterdir()))}"
    (result,) = evaluate_tasks(Repeats(), [task], asked, model, out, print)  # type: ignore[arg-type]
    (file,) = (out / "answers").iterdir()
    _, answer = file.read_text().splitlines()
    return result.scores["exact_match"].value, json.loads(answer)[1]["prediction"]


def test_in_context_an_answer_ends_where_the_next_demonstration_would_begin(tmp_path: Path) -> None:
    assert score(tmp_path, shots=(1,)) == (1.0, "cat")
    assert score(tmp_path, shots=(0,)) == (1.0, "cat")
    assert score(tmp_path) == (0.0, "cat\n\nquestion: who barks? dog")


def test_results_of_the_same_model_stay_when_other_tasks_are_asked(tmp_path: Path) -> None:
    out, first, second = tmp_path / "out", write_task(tmp_path), write_task(tmp_path, "others")

    def ask(task: TaskFile, weights: str = "as it is", **settings: Any) -> list[tuple[str, int]]:
        asked, model = TaskSettings(data=tmp_path, **settings), Evaluated("a model", weights)
        evaluate_tasks(Repeats(), [task], asked, model, out, print)  # type: ignore[arg-type]
        entries = json.loads((out / "results.json").read_text())
        rows = [line for line in (out / "results.md").read_text().splitlines() if "exact_match" in line]
        assert len([row for row in rows if "generation" in row]) == len(entries)
        return [(entry["task"], entry["shots"]) for entry in entries]

    assert ask(first, shots=(0,)) == [("pets", 0)]
    assert ask(second, shots=(0, 1)) == [("pets", 0), ("others", 0), ("others", 1)]
    assert ask(first, shots=(0,)) == [("others", 0), ("others", 1), ("pets", 0)]
    (entry, *_) = json.loads((out / "results.json").read_text())
    assert entry["scores"]["exact_match"] == {"value": 1.0, "standard_error": None, "count": 1}
    (out / "answers").rename(tmp_path / "answers of others")
    assert ask(second, "trained further", shots=(1,)) == [("others", 1)]


def test_results_of_before_that_name_no_model_or_are_damaged_are_replaced(tmp_path: Path) -> None:
    out, task = tmp_path / "out", write_task(tmp_path)
    out.mkdir()
    for content in ('[{"task": "pets", "scores": {}}]', "[{", "[3]", '[{"model": "a model", "weights": ""}]'):
        (out / "results.json").write_text(content)
        asked, model = TaskSettings(data=tmp_path, shots=(0,)), Evaluated("a model", "")
        evaluate_tasks(Repeats(), [task], asked, model, out, print)  # type: ignore[arg-type]
        (entry,) = json.loads((out / "results.json").read_text())
        assert (entry["task"], entry["model"]) == ("pets", "a model")


def test_a_folder_that_cannot_be_written_is_refused_before_any_task_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/out cannot be written: Not a directory; name another folder"):
        require_out(Repeats(), tmp_path / "file/out")  # type: ignore[arg-type]
    require_out(Repeats(), tmp_path / "new/out")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
