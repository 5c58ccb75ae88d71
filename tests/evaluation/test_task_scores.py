"""What of a generated text is scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from metalm.errors import ConfigError, DataError
from metalm.evaluation.likelihoods import Likelihood
from metalm.evaluation.task_results import TaskResult, table
from metalm.evaluation.task_scores import Evaluated, evaluate_tasks, require_out
from metalm.tasks.metrics import Score
from metalm.tasks.task_file import IN_CONTEXT, TaskFile, load_task
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

    from_each = gathered

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
        assert len([row for row in rows if "| generation |" in row]) == len(entries)
        return [(entry["task"], entry["shots"]) for entry in entries]

    assert ask(first, shots=(0,)) == [("pets", 0)]
    assert ask(second, shots=(0, 1)) == [("pets", 0), ("others", 0), ("others", 1)]
    assert ask(first, shots=(0,)) == [("others", 0), ("others", 1), ("pets", 0)]
    (entry, *_) = json.loads((out / "results.json").read_text())
    assert entry["scores"]["exact_match"] == {"value": 1.0, "standard_error": None, "count": 1}
    (out / "answers").rename(tmp_path / "answers of others")
    assert ask(second, "trained further", shots=(1,)) == [("others", 1)]


def test_results_of_another_evaluation_that_ends_meanwhile_stay(tmp_path: Path) -> None:
    out, first, second = tmp_path / "out", write_task(tmp_path), write_task(tmp_path, "others")
    asked, model = TaskSettings(data=tmp_path), Evaluated("a model", "as it is")

    class Interrupted(Repeats):
        """Another process scores the second task while this one asks the first."""

        def continuations(self, prompts: Sequence[Any], *_: Any) -> list[str]:
            evaluate_tasks(Repeats(), [second], asked, model, out, print)  # type: ignore[arg-type]
            return super().continuations(prompts)

    evaluate_tasks(Interrupted(), [first], asked, model, out, print)  # type: ignore[arg-type]
    entries = json.loads((out / "results.json").read_text())
    assert [entry["task"] for entry in entries] == ["others", "pets"]


def test_answers_to_data_that_were_mended_are_asked_for_again(tmp_path: Path) -> None:
    task, asked, model = write_task(tmp_path), TaskSettings(data=tmp_path), Evaluated("a model", "as it is")
    evaluate_tasks(Repeats(), [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]
    file = tmp_path / "pets/validation.jsonl"
    file.write_text(file.read_text().replace("cat", "dog"))
    with pytest.raises(ConfigError, match="answers of another model, task, data or setting"):
        evaluate_tasks(Repeats(), [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]


def test_what_could_not_be_asked_is_asked_again(tmp_path: Path) -> None:
    task, asked, model = write_task(tmp_path), TaskSettings(data=tmp_path), Evaluated("a model", "as it is")

    class Missing(Repeats):
        """A model that cannot read what is asked."""

        def continuations(self, prompts: Sequence[Any], *_: Any) -> Any:
            return [None for _ in prompts]

    with pytest.raises(DataError, match="no question of validation could be asked: {'undecodable': 1}"):
        evaluate_tasks(Missing(), [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]
    (result,) = evaluate_tasks(Repeats(), [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]
    assert (result.questions, result.skipped) == (1, {})


def test_a_model_that_says_nan_has_no_score(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    task = task.model_copy(update={"options": {"cat": "cat", "dog": "dog"}})
    asked, model = TaskSettings(data=tmp_path, scored_by="likelihood"), Evaluated("a model", "as it is")

    class Broken(Repeats):
        """A model with nan in its weights."""

        def likelihoods(self, documents: Sequence[Any], *_: Any) -> list[Likelihood]:
            return [Likelihood(math.nan, 1) for _ in documents]

    with pytest.raises(DataError, match="pets: the likelihood of an answer to validation:0 is nan"):
        evaluate_tasks(Broken(), [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]


def test_means_are_over_wordings_of_one_kind_alone() -> None:
    def result(split: str, template: str, value: float, task: str = "pets", by: str = "generation") -> Any:
        scores = {"exact_match": Score(value, 0.1, 9)}
        return TaskResult(task, "misc", split, template, 0, by, scores, 9)

    def means(results: Sequence[TaskResult]) -> list[str]:
        return [line for line in table(results, "a model").splitlines() if line.endswith("00 |")]

    results = [
        result("validation", "one", 0.2),
        result("validation", "two", 0.4),
        result("test", "one", 0.9),
        result("validation", IN_CONTEXT, 0.6),
        result("validation", IN_CONTEXT, 0.8, by="likelihood"),
    ]
    how = "as finetuned, by generation | exact_match"
    assert means(results) == [f"| pets, validation, {how} | 0.3000 | 0.4000 |"]
    results = [result("validation", "one", 0.2), result("test", "one", 0.4, "others")]
    assert means(results) == [f"| cluster misc, {how} | 0.3000 | 0.3000 |"]
    assert means([*results, result("test", "one", 0.9)]) == []


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


def test_how_answers_are_scored_can_change_without_asking_again(tmp_path: Path) -> None:
    """Records of one passage depend on each other where the task says so."""
    write_task(tmp_path)
    lines = [
        {"question": f"who purrs in {n}?", "passage": n // 8, "right": "cat" if n < 8 else "dog"}
        for n in range(16)
    ]
    (tmp_path / "pets/validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = TASK | {"data": TASK["data"] | {"fields": TASK["data"]["fields"] | {"passage": "passage"}}}
    asked, model = TaskSettings(data=tmp_path, shots=(0,)), Evaluated("a model", "as it is")

    class Silent(Repeats):
        """A model that must not be asked."""

        def continuations(self, prompts: Sequence[Any], *_: Any) -> Any:
            raise AssertionError(prompts)

    def errors(answerer: Repeats, **keys: Any) -> dict[str, float]:
        (tmp_path / "pets.yaml").write_text(yaml.safe_dump(content | keys))
        task = load_task(tmp_path / "pets.yaml")
        (result,) = evaluate_tasks(answerer, [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]
        return {name: one.standard_error for name, one in result.scores.items()}

    assert errors(Repeats())["exact_match"] == pytest.approx(0.5 / 16**0.5, rel=0.1)
    found = errors(Silent(), drawn_together="passage", metrics=["exact_match", "squad_f1"])
    assert found["exact_match"] == found["squad_f1"] == pytest.approx(0.5 / 2**0.5, rel=0.1)


def test_an_option_that_was_chosen_is_scored_by_all_metrics_of_the_task(tmp_path: Path) -> None:
    keys = {"options": {"cat": "a cat", "dog": "a dog"}, "metrics": ["accuracy", "squad_f1"]}
    task = write_task(tmp_path).model_copy(update=keys)
    asked, model = TaskSettings(data=tmp_path, scored_by="likelihood"), Evaluated("a model", "as it is")

    class Chooses(Repeats):
        """A model that takes the last option."""

        def likelihoods(self, documents: Sequence[Any], *_: Any) -> list[Likelihood]:
            return [Likelihood(float(number), 1) for number, _ in enumerate(documents)]

    (result,) = evaluate_tasks(Chooses(), [task], asked, model, tmp_path / "out", print)  # type: ignore[arg-type]
    assert {name: one.value for name, one in result.scores.items()} == {"accuracy": 0.0, "squad_f1": 0.0}
