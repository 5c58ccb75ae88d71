"""Data sets whose records need more than to be read before they can be worded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers.reader import BadRecord, Record, in_pairs
from metalm.tasks.readers.tables import read_jsonl, read_tsv
from metalm.tasks.readers.texts import read_xml

_POSSESSIVES = {"my", "your", "his", "her", "our", "their"}
_ARTICLES = {"a", "an", "the"}


def read_piqa(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """PIQA: a file of records and one of labels, line by line, as `label`."""
    for records, labels in in_pairs(names, "a file of records and one of labels"):
        lines = files.read(labels).decode("utf-8", "replace").split()
        number = -1
        for number, record in enumerate(read_jsonl(files, [records], split)):
            if number >= len(lines):
                yield BadRecord("no_label", f"{records}:{number + 1}")
            elif isinstance(record, BadRecord):
                yield record
            else:
                yield {**record, "label": lines[number]}
        for missing in range(number + 1, len(lines)):
            yield BadRecord("label_without_record", f"{labels}:{missing + 1}")


def read_mrpc(
    files: DataFiles, names: Sequence[str], split: str, *, dev_ids: str, training_split: str = "train"
) -> Iterator[Record | BadRecord]:
    """MRPC, as its owner distributes it: `Quality`, `#1 String`, `#2 String`.

    Args:
        dev_ids: the file of pairs of ids of which the validation set is made.
        training_split: what is left of the training file without these; other splits of it are these.
    """
    lines = files.read(dev_ids).decode("utf-8-sig").splitlines()
    held_out = {tuple(line.split()[-2:]) for line in lines if line.strip()}
    for record in read_tsv(files, names, split):
        if isinstance(record, BadRecord):
            yield record
            continue
        is_held_out = (record.get("#1 ID"), record.get("#2 ID")) in held_out
        if split == "test" or is_held_out == (split != training_split):
            yield record


def read_winogrande(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """Winogrande: `before` and `after` the blank, and `endings`, what may stand from the blank on."""
    for record in read_jsonl(files, names, split):
        if isinstance(record, BadRecord):
            yield record
            continue
        before, blank, after = str(record.get("sentence", "")).partition("_")
        if not blank:
            yield BadRecord("no_blank", f"{record.get('qID')}")
            continue
        options = [str(record.get("option1", "")), str(record.get("option2", ""))]
        yield {**record, "before": before, "after": after, "endings": [option + after for option in options]}


def read_wsc(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """WSC of SuperGLUE: `name` and `pronoun`, and `marked`, the text with stars around the pronoun."""
    for record in read_jsonl(files, names, split):
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            target, words = record["target"], record["text"].split(" ")
            at, pronoun = target["span2_index"], target["span2_text"]
            length = len(pronoun.split(" "))
            there = " ".join(words[at : at + length])  # with what stands at it, such as a comma
            words[at : at + length] = [
                there.replace(pronoun, f"*{pronoun}*", 1) if pronoun in there else f"*{there}*"
            ]
            name = target["span1_text"]
        except (KeyError, TypeError, AttributeError):
            yield BadRecord("no_target", f"{record.get('idx')}")
            continue
        yield {**record, "name": name, "pronoun": pronoun, "marked": " ".join(words)}


def read_winograd(
    files: DataFiles, names: Sequence[str], split: str, *, first: int | None = None
) -> Iterator[Record | BadRecord]:
    """Winograd schemas: `before`, `pronoun` and `after`, `names` that may replace the pronoun, and `right`.

    A name has the form that its place asks for: `'s` for a possessive pronoun, and an article in lower case
    within a sentence. `after` begins with a space, unless a punctuation mark is first; `right` is A or B.

    Args:
        first: only so many.
    """
    for number, record in enumerate(read_xml(files, names, split, at="schema", first=first)):
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            text, answers = record["text"], record["answers"]["answer"]
            before, pronoun, after = text["txt1"], text["pron"], text["txt2"]
            yield {
                "before": before,
                "pronoun": pronoun,
                "after": after if after[:1] in ".,;:!?'" else f" {after}",
                "names": [_in_place(name, before, pronoun) for name in answers],
                "right": record["correctAnswer"].rstrip("."),
            }
        except (KeyError, TypeError, AttributeError):
            yield BadRecord("no_schema", f"schema {number + 1}")


def _in_place(name: str, before: str, pronoun: str) -> str:
    """A name as it stands in the place of a pronoun."""
    article, space, rest = name.partition(" ")
    if not before or before.rstrip("\"'").endswith((".", "!", "?")):
        name = name[:1].upper() + name[1:]
    elif article.lower() in _ARTICLES | _POSSESSIVES:
        name = article.lower() + space + rest
    return f"{name}'s" if pronoun.lower() in _POSSESSIVES else name
