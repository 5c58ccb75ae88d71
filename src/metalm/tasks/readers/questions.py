"""Questions about passages and pictures, nested in JSON or in two files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers.captions import read_karpathy
from metalm.tasks.readers.reader import BadRecord, Record, expected, in_pairs, load_json


def read_squad(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """SQuAD: `id`, `title`, `context`, `question` and `answers`, texts without those given twice.

    Of a question without an answer (SQuAD 2) `answers` is empty.
    """
    for name in names:
        try:
            for article in load_json(files, name)["data"]:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        yield {
                            "id": question["id"],
                            "title": article["title"],
                            "context": paragraph["context"],
                            "question": question["question"],
                            "answers": list(dict.fromkeys(answer["text"] for answer in question["answers"])),
                        }
        except (KeyError, TypeError):
            raise expected(files, name, "SQuAD's JSON, {data: [{paragraphs: [{context, qas}]}]}") from None


def read_drop(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """DROP: `query_id`, `passage`, `question`, `answer` and `answers`, the validated ones included.

    The spans of one answer have ` | ` between them, as the metrics of DROP take them.
    """
    for name in names:
        try:
            for section in load_json(files, name).values():
                for question in section["qa_pairs"]:
                    given = [question["answer"], *question.get("validated_answers", ())]
                    answers = [text for text in map(_drop_answer, given) if text]
                    yield {
                        "query_id": question["query_id"],
                        "passage": section["passage"],
                        "question": question["question"],
                        "answer": answers[:1],
                        "answers": list(dict.fromkeys(answers)),
                    }
        except (KeyError, TypeError, AttributeError):
            raise expected(files, name, "DROP's JSON, {ID: {passage, qa_pairs: [...]}}") from None


def _drop_answer(answer: Mapping[str, Any]) -> str:
    """The first that is not empty of number, spans and date."""
    if number := str(answer.get("number") or "").strip():
        return number
    if spans := [str(span).strip() for span in answer.get("spans") or ()]:
        return " | ".join(spans)
    date = answer.get("date") or {}
    return " ".join(str(date[key]) for key in ("day", "month", "year") if date.get(key))


def read_vqa(
    files: DataFiles,
    names: Sequence[str],
    split: str,
    *,
    images_in: str | None = None,
    frequent_answers: str | None = None,
) -> Iterator[Record | BadRecord]:
    """VQA and OK-VQA: `question`, `question_id`, `image_id`, `data_subtype`, `answer` and all `answers`.

    The names are a file of questions and one of annotations, as often as wanted. `answer` is what most people
    said, and `data_subtype` the folder of the images, such as `val2014`.

    Args:
        images_in: Karpathy's file; only the questions about images of the split there.
        frequent_answers: JSON with answers as a list or as keys. Of a split `NAME_in` only the questions
            whose `answer` is one of these, of `NAME_out` the others.
    """
    base = split.removesuffix("_in").removesuffix("_out") if frequent_answers is not None else split
    images = None if images_in is None else _image_ids(files, images_in, base)
    frequent = None if frequent_answers is None or base == split else set(load_json(files, frequent_answers))
    for questions, answered_in in in_pairs(names, "a file of questions and one of annotations"):
        try:
            answers = {one["question_id"]: one for one in load_json(files, answered_in)["annotations"]}
            content = load_json(files, questions)
            for question in content["questions"]:
                if images is not None and question["image_id"] not in images:
                    continue
                answered = answers.get(question["question_id"])
                if answered is None:
                    yield BadRecord("no_annotation", f"{questions}, question {question['question_id']}")
                    continue
                given = [answer["answer"] for answer in answered["answers"]]
                answer = answered.get("multiple_choice_answer") or Counter(given).most_common(1)[0][0]
                if frequent is not None and (answer in frequent) == split.endswith("_out"):
                    continue
                yield {
                    **question,
                    "answers": given,
                    "answer": answer,
                    "answer_type": answered.get("answer_type", ""),
                    "data_subtype": content.get("data_subtype", ""),
                }
        except (KeyError, TypeError, IndexError):
            raise expected(
                files, questions, "VQA's {questions: [...]}, and {annotations: [...]} beside"
            ) from None


def _image_ids(files: DataFiles, name: str, split: str) -> set[int]:
    return {image["cocoid"] for image in read_karpathy(files, [name], split) if isinstance(image, dict)}
