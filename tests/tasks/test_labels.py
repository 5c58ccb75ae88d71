"""Labels of the shipped task files, and what their data have that is easily read wrongly."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from metalm.errors import ConfigError
from metalm.tasks.records import Tally, TaskData, TaskRecord
from metalm.tasks.rendering import render
from metalm.tasks.task_file import OwnOptions, load_task

DATA = Path(__file__).parent / "data"

YES_OR_NO = {"0": "no", "1": "yes"}
ENTAILED = {"entailment": "yes", "not_entailment": "no"}
ENTAILED_NEUTRAL_OR_NOT = {
    "entailment": "yes",
    "neutral": "it is not possible to tell",
    "contradiction": "no",
}
BY_LETTER = {"e": "Yes", "n": "It's impossible to say", "c": "No"}
LABELS = {
    "anli_r1": BY_LETTER,
    "anli_r2": BY_LETTER,
    "anli_r3": BY_LETTER,
    "cb": {"entailment": "Yes", "contradiction": "No", "neutral": "It's impossible to say"},
    "mnli": ENTAILED_NEUTRAL_OR_NOT,
    "qnli": ENTAILED,
    "rte": ENTAILED,
    "snli": ENTAILED_NEUTRAL_OR_NOT,
    "wnli": YES_OR_NO,
    "imdb": {"neg": "negative", "pos": "positive"},
    "sst2": {"0": "negative", "1": "positive"},
    "sentiment140": {"0": "negative", "4": "positive"},
    "yelp_polarity": {"1": "negative", "2": "positive"},
    "qqp": YES_OR_NO,
    "mrpc": YES_OR_NO,
    "paws_wiki": YES_OR_NO,
    "wsc": {"false": "no", "true": "yes"},
    "cola": {"0": "unacceptable", "1": "acceptable"},
    "wic": {"false": "different meanings", "true": "the same meaning"},
    "trec": {
        "DESC": "description",
        "ENTY": "entity",
        "ABBR": "abbreviation",
        "HUM": "human",
        "NUM": "numeric",
        "LOC": "location",
    },
}
"""By task, the text of each value that the owner's files have as a label."""

OWN_ANSWERS = {
    "dpr": ["The goats", "the hens", "Ben"],
    "winogrande": ["Marta", "ferry", "Ben"],
    "hellaswag": [
        "Put it into cold water for an hour. Then let it dry in the sun.",
        "climbs up to the roof and looks around.",
    ],
    "piqa": ["stand the pot in a bowl of ice.", "Use a piece of chalk.", "Turn it in a sharpener."],
    "copa": ["The postman had rung the bell.", "The beans grew well.", "It was cold."],
}
"""By task whose records have options of their own, the answers of those it is evaluated on."""

TURNED = {
    **dict.fromkeys(["anli_r1", "anli_r2", "anli_r3", "cb", "qnli", "rte", "snli", "trec"], 1),
    **dict.fromkeys(["cola", "sst2", "copa", "piqa"], 2),
    **dict.fromkeys(["imdb", "yelp_polarity"], 3),
    "sentiment140": 4,
    **dict.fromkeys(["mnli", "wnli", "qqp", "mrpc", "paws_wiki", "wic"], 0),
    **dict.fromkeys(["wsc", "winogrande", "dpr", "hellaswag"], 0),
}
"""By task, how many of its wordings do not ask for the answer (as in arXiv 2109.01652)."""


def read(name: str, split: str, data: Path = DATA) -> tuple[list[TaskRecord], dict[str, tuple[int, str]]]:
    """The records of a split, and what was left out: how many by cause, and the first of them."""
    tally = Tally()
    records = TaskData(load_task(name), data).records(split, tally)
    return records, {cause: (len(places), places[0]) for cause, places in tally.dropped.items()}


def shown_in_context(name: str, split: str, number: int = 0) -> list[str]:
    """What each option of a record looks like in context: all that is read, a bar, and what is scored."""
    task = load_task(name)
    assert task.icl is not None
    record = read(name, split)[0][number]
    examples = [render(task, task.icl.template, record, option) for option in record.options]
    return ["|".join(str(part.content) for part in example.parts) for example in examples]


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    assert load_task(name).options == LABELS[name]


@pytest.mark.parametrize("name", OWN_ANSWERS)
def test_answers_among_own_options(name: str) -> None:
    task = load_task(name)
    assert isinstance(task.options, OwnOptions)
    records, _ = read(name, task.evaluated_on)
    assert [record.answers for record in records] == [(answer,) for answer in OWN_ANSWERS[name]]
    assert all(record.answers[0] in record.options for record in records)


@pytest.mark.parametrize("name", TURNED)
def test_ten_wordings_and_how_many_are_turned_around(name: str) -> None:
    task = load_task(name)
    assert len(task.templates) == 10
    turned = [template for template in task.templates if template not in task.templates_for("evaluation")]
    assert len(turned) == TURNED[name]
    assert not [template.id for template in turned if "finetuning" in template.use]
    assert all("{answer" in t.target for t in task.templates_for("evaluation"))


@pytest.mark.parametrize(
    ("name", "split", "count", "first"),
    [
        ("mnli", "validation", 1, "validation:3"),
        ("snli", "train", 1, "train:3"),
        ("snli", "validation", 1, None),
    ],
)
def test_pairs_without_consensus_are_left_out(name: str, split: str, count: int, first: str | None) -> None:
    records, dropped = read(name, split)
    assert len(records) == 3
    assert dropped["unwanted_label"][0] == count
    assert first is None or dropped["unwanted_label"][1] == f"{first}, '-'"


def test_premises_of_anli_stand_in_context(tmp_path: Path) -> None:
    folder = tmp_path / "anli" / "anli_v0.1" / "R1"
    folder.mkdir(parents=True)
    (folder / "dev.jsonl").write_text('{"uid": "1", "premise": "A.", "hypothesis": "B.", "label": "e"}\n')
    with pytest.raises(ConfigError, match="have no 'context'.*premise"):
        read("anli_r1", "validation", tmp_path)


def test_cb_knows_labels_by_their_names_and_not_their_order() -> None:
    records, _ = read("cb", "validation")
    assert [record.answers[0] for record in records] == ["It's impossible to say", "Yes", "No"]


@pytest.mark.parametrize(
    ("name", "split", "field", "value"),
    [
        ("mnli", "train", "premise", 'The ferry left at "noon sharp.'),
        ("qnli", "train", "question", 'Who wrote "Quiet Harbour?'),
        ("wnli", "tuning", "premise", 'Ida told Eva "that she had won.'),
        ("sst2", "train", "sentence", 'the "surprise at the end'),
        ("qqp", "validation", "first", 'Is "Quiet Harbour a good novel?'),
        ("mrpc", "test", "first", '"We are pleased, Falk said.'),
        ("cola", "train", "sentence", 'He said "no and went home.'),
    ],
)
def test_stray_quotes_of_tables_are_characters(name: str, split: str, field: str, value: str) -> None:
    records, dropped = read(name, split)
    assert value in [record.fields[field] for record in records]
    assert not dropped.keys() - {"wrong_number_of_columns"}


def test_cells_of_paws_are_quoted() -> None:
    records, _ = read("paws_wiki", "validation")
    expected = 'The film " Quiet Harbour " was shown in Ardby before it was shown in Bern .'
    assert records[0].fields["first"] == expected


@pytest.mark.parametrize(("split", "place"), [("train", "QQP/train.tsv:4"), ("validation", "QQP/dev.tsv:4")])
def test_short_rows_of_qqp_are_counted(split: str, place: str) -> None:
    records, dropped = read("qqp", split)
    assert len(records) == 3
    assert dropped == {"wrong_number_of_columns": (1, place)}


def test_validation_set_of_mrpc_is_that_of_the_ids() -> None:
    names = ["tuning", "validation", "test"]
    firsts = {name: [record.fields["first"] for record in read("mrpc", name)[0]] for name in names}
    assert firsts["tuning"] == [
        '"The bridge will be open by June, the mayor said.',
        "Oats rose by a tenth to 210.",
    ]
    assert firsts["validation"] == ["The ferry was late, as ever.", "The council met on Monday."]
    assert len(firsts["test"]) == 3


def test_validation_set_of_wnli_turns_labels_of_the_training_set_around() -> None:
    def by_sentence(split: str) -> dict[str, str]:
        return {record.fields["premise"]: record.answers[0] for record in read("wnli", split)[0]}

    training, validation = by_sentence("tuning"), by_sentence("validation")
    both = training.keys() & validation.keys()
    assert len(both) == 2
    assert all(training[sentence] != validation[sentence] for sentence in both)


def test_breaks_of_imdb_are_newlines_and_unlabelled_reviews_are_not_read() -> None:
    records, _ = read("imdb", "validation")  # all four of the training set
    assert {(record.answers[0], "<br" in record.fields["review"]) for record in records} == {
        ("negative", False),
        ("positive", False),
    }
    assert len(records) == 4
    assert "five times.\n\nThe plot" in records[0].fields["review"]


def test_neutral_tweets_are_left_out() -> None:
    records, dropped = read("sentiment140", "test")
    assert [record.answers[0] for record in records] == ["positive", "negative"]
    assert dropped == {"unwanted_polarity": (2, "test:1, '2'")}


def test_tweets_are_latin_1_and_in_quotes() -> None:
    tweets = [record.fields["tweet"] for record in read("sentiment140", "validation")[0]]
    assert "The caf\u00e9 is closed, and I am soaked" in tweets
    assert 'lost my keys. "again", says he' in tweets


def test_what_is_held_out_of_a_sorted_file_is_of_all_labels(tmp_path: Path) -> None:
    (tmp_path / "sentiment140").mkdir()
    rows = [f'"{0 if n < 1000 else 4}","{n}","","NO_QUERY","ida","tweet {n}"\n' for n in range(2000)]
    path = tmp_path / "sentiment140" / "training.1600000.processed.noemoticon.csv"
    path.write_text("".join(rows))
    held_out, _ = read("sentiment140", "validation", tmp_path)
    training, _ = read("sentiment140", "train", tmp_path)
    assert len(held_out) == 200
    assert 60 < sum(record.answers[0] == "positive" for record in held_out) < 140
    tweets = [record.fields["tweet"] for record in (*held_out, *training)]
    assert sorted(tweets) == sorted(f"tweet {n}" for n in range(2000))


def test_escapes_of_yelp_are_newlines_and_quotes() -> None:
    records, _ = read("yelp_polarity", "test")
    expected = 'My bicycle was ready in a day.\n\nHe said "no charge" for the bell!'
    assert records[0].fields["review"] == expected


def test_blocks_of_dpr_that_lack_a_line_are_counted() -> None:
    records, dropped = read("dpr", "validation")
    assert [record.answers[0] for record in records] == ["The ferry", "the yacht", "Anna"]
    assert dropped == {"wrong_number_of_lines": (1, "train.c.txt, block 4")}


def test_sentences_of_winogrande_without_a_blank_are_counted() -> None:
    records, dropped = read("winogrande", "train")
    assert len(records) == 3
    assert dropped == {"no_blank": (1, "3INVENTED002-1")}


def test_winogrande_in_context_scores_what_stands_behind_the_blank() -> None:
    assert shown_in_context("winogrande", "validation", 1) == [
        "The rope held the boat but not the ferry, as the boat| was too heavy.",
        "The rope held the boat but not the ferry, as the ferry| was too heavy.",
    ]
    assert shown_in_context("winogrande", "validation", 2)[0].startswith("Tom| got the bigger room")


def test_pronouns_of_wsc_are_marked_without_their_punctuation() -> None:
    records, _ = read("wsc", "tuning")
    assert [record.fields["marked"] for record in records][1:] == [
        "Jon waved to the mayor, but *he* did not see it.",
        "The goats left the hens alone. Nothing scared *them*, really.",
    ]


def test_marks_of_hellaswag_are_taken_out_and_records_without_label_counted() -> None:
    records, dropped = read("hellaswag", "validation")
    assert records[0].fields["context"] == "How to wash a woollen hat Do not put it into the machine."
    assert "[" not in "".join(option for record in records for option in record.options)
    assert dropped == {"unwanted_label": (1, "validation:2, ''")}
    assert load_task("hellaswag").icl is not None
    assert shown_in_context("hellaswag", "validation", 1)[0] == (
        "Cleaning windows: A man leans a ladder against a house. he| climbs up to the roof and looks around."
    )


def test_labels_of_piqa_go_by_line_whatever_line_is_damaged() -> None:
    records, dropped = read("piqa", "tuning")
    assert [record.answers[0] for record in records] == [
        "Put a wedge of wood under it.",
        "Fill them with newspaper.",
        "Hold the lid under hot water, then turn it.",
    ]
    assert dropped == {"bad_json": (1, "physicaliqa-train-dev/train.jsonl:3")}
    _, dropped = read("piqa", "validation")
    assert dropped == {"no_label": (1, "physicaliqa-train-dev/dev.jsonl:4")}


def test_copa_in_context_joins_cause_and_effect() -> None:
    assert shown_in_context("copa", "validation", 0) == [
        "The dog barked at the door because| the postman had rung the bell.",
        "The dog barked at the door because| the dog had eaten.",
    ]
    assert shown_in_context("copa", "validation", 1)[1] == (
        "Marta watered the beans every day so| the beans grew well."
    )


def test_training_file_of_cola_has_no_header() -> None:
    records, _ = read("cola", "train")
    assert [record.answers[0] for record in records] == [
        "acceptable",
        "unacceptable",
        "acceptable",
        "unacceptable",
    ]
    assert records[0].fields["sentence"] == "The baker gave the child a roll."


def test_the_byte_of_trec_that_is_no_text_is_a_space() -> None:
    records, dropped = read("trec", "validation")
    assert records[3].fields["question"] == "What is Bern's sister city in the north ?"
    assert not dropped


@pytest.mark.parametrize("name", ["mnli", "yelp_polarity", "piqa", "imdb"])
def test_archives_read_as_what_is_unpacked(name: str, tmp_path: Path) -> None:
    task = load_task(name)
    assert task.data.archive is not None
    folder = tmp_path / task.data.folder
    folder.mkdir()
    archive = folder / task.data.archive
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in sorted((DATA / task.data.folder).rglob("*")):
                zipped.write(path, path.relative_to(DATA / task.data.folder))
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(DATA / task.data.folder, ".")
    for split in {*task.data.files, *task.data.hold_out} - ({"train"} if task.data.hold_out else set()):
        records, dropped = read(name, split)
        packed_records, packed_dropped = read(name, split, tmp_path)
        assert packed_records == records
        assert packed_dropped == dropped


def test_files_that_are_unpacked_go_before_the_archive(tmp_path: Path) -> None:
    shutil.copytree(DATA / "mnli", tmp_path / "mnli")
    (tmp_path / "mnli" / "MNLI.zip").write_bytes(b"no archive")
    assert read("mnli", "validation", tmp_path)[0] == read("mnli", "validation")[0]
