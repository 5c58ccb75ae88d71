"""What of a generated text is scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from metalm.evaluation.task_scores import Evaluated, evaluate_tasks
from metalm.tasks.task_file import load_task
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


def score(folder: Path, **settings: Any) -> tuple[float, str]:
    """The score, and what was taken for the answer."""
    (folder / "pets").mkdir(exist_ok=True)
    for split in ("train", "validation"):
        line = json.dumps({"question": f"who purrs in {split}?", "right": "cat"})
        (folder / "pets" / f"{split}.jsonl").write_text(line + "\n")
    (folder / "pets.yaml").write_text(yaml.safe_dump(TASK))
    asked = TaskSettings(data=folder, **settings)
    model = Evaluated("a model", "as it is")
    out = folder / f"out_{len(list(folder.iterdir()))}"
    (result,) = evaluate_tasks(Repeats(), [load_task(folder / "pets.yaml")], asked, model, out, print)  # type: ignore[arg-type]
    (file,) = (out / "answers").iterdir()
    _, answer = file.read_text().splitlines()
    return result.scores["exact_match"].value, json.loads(answer)[1]["prediction"]


def test_in_context_an_answer_ends_where_the_next_demonstration_would_begin(tmp_path: Path) -> None:
    assert score(tmp_path, shots=(1,)) == (1.0, "cat")
    assert score(tmp_path, shots=(0,)) == (1.0, "cat")
    assert score(tmp_path) == (0.0, "cat\n\nquestion: who barks? dog")
