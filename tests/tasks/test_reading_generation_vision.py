"""What records of reading, generation and vision tasks are read as: answers, references, groups, images.

The records are those of tests/tasks/data, among which every task has one that needs care.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from metalm.errors import DataError
from metalm.modalities.image import decode_image
from metalm.tasks.records import Tally, TaskData, TaskRecord
from metalm.tasks.rendering import answer_alone, render
from metalm.tasks.task_file import load_task

DATA = Path(__file__).parent / "data"

TURNED = {
    "drop": 3,
    "squad_v1": 2,
    "squad_v2": 0,
    "openbookqa": 3,
    "boolq": 0,
    "arc_easy": 3,
    "natural_questions": 0,
    "common_gen": 4,
    "e2e_nlg": 0,
    "aeslc": 2,
    "samsum": 3,
    "xsum": 2,
}
"""Of the ten templates of each task of multitask finetuning, those whose target is no answer, as in FLAN."""


def read(name: str, split: str, tally: Tally | None = None, data: Path = DATA) -> list[TaskRecord]:
    return TaskData(load_task(name), data).records(split, tally)


def answers(name: str, split: str) -> list[tuple[str, ...]]:
    return [record.answers for record in read(name, split)]


def references(name: str, split: str) -> list[tuple[str, ...]]:
    return [record.references for record in read(name, split)]


def left_out(name: str, split: str) -> dict[str, int]:
    tally = Tally()
    read(name, split, tally)
    return {cause: len(places) for cause, places in tally.dropped.items()}


@pytest.mark.parametrize("name", TURNED)
def test_ten_templates_of_which_some_are_turned_around(name: str) -> None:
    templates = load_task(name).templates
    turned = [template for template in templates if template.use == ("instruction_tuning",)]
    assert len(templates) == 10
    assert len(turned) == TURNED[name]
    assert templates[0].plain == ("TARGET:",)
    assert not any("answer" in template.target for template in turned if name != "common_gen")


@pytest.mark.parametrize("name", ["common_gen", "e2e_nlg", "aeslc", "samsum", "xsum"])
def test_texts_are_searched_for_with_four_beams(name: str) -> None:
    decode = load_task(name).decode
    assert (decode.method, decode.num_beams, decode.length_penalty) == ("beam", 4, 0.6)


@pytest.mark.parametrize("name", ["squad_v1", "drop", "natural_questions", "vqav2", "coco_caption"])
def test_answers_and_captions_are_generated_greedily(name: str) -> None:
    assert load_task(name).decode.method == "greedy"


# Reading


def test_drop_takes_the_first_of_number_spans_and_date() -> None:
    assert answers("drop", "train") == [("13",), ("Rita Olsen | Ben Tate",)]
    assert answers("drop", "validation") == [("20",), ("4 May 1811",), ("begun",)]
    assert references("drop", "validation") == [("20", "20 lives"), ("4 May 1811", "May 1811"), ("begun",)]
    assert left_out("drop", "train") == {"empty_first_answer": 1}


def test_squad_has_all_answers_once_and_titles_without_underscores() -> None:
    assert references("squad_v1", "validation") == [("mules", "by mules"), ("1890", "in 1890")]
    assert left_out("squad_v1", "validation") == {"empty_answers": 1}
    assert read("squad_v1", "train")[0].fields["title"] == "Skarvik Lighthouse"


def test_squad_2_calls_a_question_without_answer_unanswerable() -> None:
    assert references("squad_v2", "validation") == [("unanswerable",), ("mules", "by mules")]
    assert left_out("squad_v2", "train") == {}


def test_boolq_maps_truth_to_words() -> None:
    assert answers("boolq", "train") == [("no",), ("yes",)]
    assert [record.options for record in read("boolq", "train")] == [("no", "yes")] * 2
    task, asked = load_task("boolq"), []
    for record in read("boolq", "validation"):
        bare = next(template for template in task.templates if template.id == "bare")
        asked.append(str(render(task, bare, record, "yes").parts[0].content).rpartition("\n\n")[2])
    assert asked == ["Does the night train stop in alder?", "Was the mill ever rebuilt?"]


def test_openbookqa_has_the_fact_and_the_text_of_the_right_choice() -> None:
    assert answers("openbookqa", "train") == [("steam leaves it under pressure",), ("a fern",)]
    assert answers("openbookqa", "test") == [("gets hot",), ("is less dense than water",)]
    assert left_out("openbookqa", "train") == {"unknown_key": 1}
    assert read("openbookqa", "test")[0].fields["fact"] == "metal conducts heat"


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_arc_has_letters_and_digits_as_keys_and_three_to_five_options(name: str) -> None:
    assert answers(name, "train") == [("a balance",), ("solid to liquid",)]
    assert answers(name, "test") == [("water",), ("Mercury",)]
    assert left_out(name, "train") == {"unknown_key": 1}
    sizes = [len(record.options) for split in ("validation", "test") for record in read(name, split)]
    assert sizes == [5, 3, 4]


def test_arc_is_normalised_by_the_answer_context() -> None:
    task, record = load_task("arc_easy"), read("arc_easy", "test")[0]
    assert task.icl is not None
    alone = answer_alone(task, task.icl.template, record, "water")
    assert [part.content for part in alone.parts] == ["Answer:", " water"]


def test_natural_questions_end_in_a_question_mark_and_have_every_answer() -> None:
    assert references("natural_questions", "validation") == [("Lake Orr", "in Lake Orr"), ("three",)]
    assert left_out("natural_questions", "validation") == {"empty_answers": 1}
    questions = [record.fields["question"] for record in read("natural_questions", "validation")]
    assert questions == ["Where does the river orrin begin?", "How many bells hang in the old church?"]


# Generation


def test_common_gen_trains_on_each_sentence_and_refers_to_all() -> None:
    assert load_task("common_gen").train_on == "each"
    (record,) = read("common_gen", "validation")
    assert record.group == "kite, fly, hill, child"
    assert len(record.answers) == len(record.references) == 3
    assert left_out("common_gen", "validation") == {"empty_scenes": 1}


def test_e2e_groups_the_texts_of_one_meaning() -> None:
    first, second, other = read("e2e_nlg", "validation")
    assert first.group == second.group != other.group
    assert first.group == "name[The Brass Kettle], eatType[pub], food[Greek], near[Old Quay]"
    assert first.references == ('Near Old Quay, the pub "The Brass Kettle" serves Greek dishes.',)
    assert left_out("e2e_nlg", "validation") == {"empty_text": 1}


def test_aeslc_has_a_body_on_one_line_and_the_senders_subject() -> None:
    (record,) = read("aeslc", "validation")
    assert record.fields["body"] == "Please send me the figures for March. I need them before noon."
    assert record.references == ("March figures",)
    assert answers("aeslc", "train") == [("Van is back",)]  # the other mail is empty


def test_samsum_parts_turns_at_either_kind_of_line_end() -> None:
    task = load_task("samsum")
    assert len(read("samsum", "train")) == 1  # the other dialogue is empty
    for record in read("samsum", "validation"):
        text = render(task, task.templates[0], record, record.answers[0]).parts[0].content
        assert isinstance(text, str)
        assert "\r" not in text
        assert text.count("\n\n") == len(str(record.fields["dialogue"]).splitlines()) + 1


def test_xsum_reads_the_ids_of_each_split() -> None:
    assert answers("xsum", "train") == [("The old bridge of Brevik is closed to lorries from Monday.",)]
    assert answers("xsum", "test") == [("A village school has won a prize for its garden.",)]
    assert left_out("xsum", "validation") == {"no_file": 1}
    assert read("xsum", "test")[0].fields["document"].splitlines() == [
        "The pupils grow beans and sell them.",
        "They plan to buy a greenhouse.",
    ]


# In context


def test_storycloze_has_two_endings() -> None:
    assert answers("storycloze", "validation") == [
        ("Nils picked a basket of plums.",),
        ("Vera rang the neighbour's bell.",),
    ]
    assert [len(record.options) for record in read("storycloze", "test")] == [2, 2]


def test_winograd_puts_each_name_in_place_of_the_pronoun_and_scores_what_follows() -> None:
    task, records = load_task("winograd"), read("winograd", "test")
    assert task.icl is not None
    shown = []
    for record in records:
        for name in record.options:
            before, after = render(task, task.icl.template, record, name).parts
            assert after.is_trained
            shown.append(f"{before.content}|{after.content}")
    assert shown == [
        "The ladder did not reach the gutter because the ladder| was too high.",
        "The ladder did not reach the gutter because the gutter| was too high.",
        "The baker thanked the miller, for the baker's| flour had arrived in time.",
        "The baker thanked the miller, for the miller's| flour had arrived in time.",
        "Rosa waved to Ellen from the train. Ellen| had come to the platform to say farewell.",
        "Rosa waved to Ellen from the train. Rosa| had come to the platform to say farewell.",
        "When the goat butted the gate, somebody mended the goat|.",
        "When the goat butted the gate, somebody mended the gate|.",
    ]
    assert [record.answers[0] for record in records] == ["the gutter", "the miller's", "Ellen", "the gate"]
    assert left_out("winograd", "test") == {"unknown_right": 1}


def test_wsc273_is_the_first_273_schemas(tmp_path: Path) -> None:
    lines = (DATA / "winograd/WSCollection.xml").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if "<schema>" in line)
    end = next(number for number, line in enumerate(lines) if "</schema>" in line) + 1
    (tmp_path / "winograd").mkdir()
    content = [*lines[:first], *lines[first:end] * 285, lines[-1]]
    (tmp_path / "winograd/WSCollection.xml").write_text("".join(content))
    assert len(read("winograd", "test", data=tmp_path)) == 273


# Vision


def test_captions_of_an_image_are_its_references_and_are_all_trained_on() -> None:
    for name, captions in (("coco_caption", [5, 6]), ("flickr30k", [5, 5])):
        assert load_task(name).train_on == "each"
        assert [len(found) for found in references(name, "test")] == captions
    assert [len(found) for found in references("nocaps", "validation")] == [10, 10, 10]
    assert left_out("nocaps", "validation") == {"empty_captions": 1}


def test_coco_trains_on_what_karpathy_calls_train_and_restval() -> None:
    folders = [record.fields["folder"] for record in read("coco_caption", "train")]
    assert folders == ["train2014", "val2014"]


def test_vqa_has_ten_answers_and_trains_on_the_most_frequent() -> None:
    assert answers("vqav2", "train") == [("red",), ("no",)]
    assert [len(found) for found in references("vqav2", "validation")] == [10] * 4
    assert references("vqav2", "train")[0] == (*["red"] * 8, "dark red", "maroon")
    assert left_out("vqav2", "validation") == {"no_annotation": 1}


def test_okvqa_takes_the_stemmed_answers_that_its_owner_scores() -> None:
    assert answers("okvqa", "train") == [("oar",)]
    assert references("okvqa", "validation")[0] == (*["milk"] * 6, *["chees"] * 2, *["wool"] * 2)


def test_vqa_in_karpathys_splits_tells_frequent_answers_from_rare_ones() -> None:
    assert answers("vqa_karpathy", "train") == [("red",), ("no",), ("2",)]
    assert answers("vqa_karpathy", "validation") == [("bike",)]
    assert answers("vqa_karpathy", "test") == [("2:10",), ("bread",)]
    assert answers("vqa_karpathy", "test_in") == [("bread",)]
    assert answers("vqa_karpathy", "test_out") == [("2:10",)]


def test_nlvr2_reads_each_image_with_the_statement() -> None:
    task = load_task("nlvr2")
    assert answers("nlvr2", "train") == [("yes",), ("no",)]
    (template,) = task.templates
    example = render(task, template, read("nlvr2", "train")[0], "yes")
    left, words, gap, right, same_words, plain, target = example.parts
    assert (left.modality, right.modality) == ("image", "image")
    assert left.content != right.content
    assert words.content == same_words.content == "Each image shows one kettle."
    assert (gap.content, gap.is_encoded) == ("", False)
    assert (plain.content, target.content) == ("\n\nit is", " yes")
    for part in (left, right):  # the second is a JPEG under the name of a PNG
        assert isinstance(part.content, bytes)
        assert decode_image(part.content).shape == (16, 16, 3)


def test_esnli_ve_learns_the_label_with_its_reason_and_scores_either() -> None:
    labels, reasons = load_task("esnli_ve"), load_task("esnli_ve_explanations")
    assert answers("esnli_ve", "train") == [("entailment",), ("contradiction",)]
    assert read("esnli_ve", "train")[0].options == ("entailment", "neutral", "contradiction")
    assert left_out("esnli_ve", "validation") == {"unknown_label": 1}
    record = read("esnli_ve", "train")[1]
    (learnt,) = labels.templates_for("finetuning")
    *_, target = render(labels, learnt, record, record.answers[0]).parts
    assert target.content == " contradiction because One cannot cross a bridge, and sleep, at the same time."
    (compared,) = labels.templates_for("evaluation")
    assert compared.target == " {answer}"
    assert reasons.templates_for("finetuning") == []
    assert references("esnli_ve_explanations", "test") == [
        ("Onions are vegetables, and a kitchen is indoors.",)
    ]
    assert left_out("esnli_ve_explanations", "test") == {"empty_explanation": 1}


@pytest.mark.parametrize(
    ("name", "split", "image"),
    [
        ("coco_caption", "test", "coco/val2014/COCO_val2014_000000000404.jpg"),
        ("vqav2", "train", "coco/train2014/COCO_train2014_000000000101.jpg"),
        ("flickr30k", "test", "flickr30k/flickr30k-images/9100000003.jpg"),
        ("nocaps", "validation", "nocaps/val/00aa11bb22cc33d0.jpg"),
        ("nlvr2", "train", "nlvr2/images/train/12/train-701-0-img0.png"),
        ("nlvr2", "validation", "nlvr2/images/dev/dev-702-1-img0.png"),
    ],
)
def test_a_missing_image_is_named(name: str, split: str, image: str, tmp_path: Path) -> None:
    task = load_task(name)
    shutil.copytree(DATA / task.data.folder, tmp_path / task.data.folder)
    (tmp_path / image).unlink()
    record = read(name, split, data=tmp_path)[0]
    with pytest.raises(DataError, match=f"{image} is not there"):
        render(task, task.templates[0], record, record.answers[0])


@pytest.mark.parametrize("name", ["drop", "openbookqa", "arc_easy", "common_gen", "xsum", "coco_caption"])
def test_packed_files_are_read_as_unpacked_ones(name: str, tmp_path: Path) -> None:
    data = load_task(name).data
    assert data.archive is not None
    (tmp_path / data.folder).mkdir()
    kind = "gztar" if data.archive.endswith(".tar.gz") else "zip"
    packed = tmp_path / data.folder / data.archive
    shutil.make_archive(str(packed).removesuffix(".tar.gz").removesuffix(".zip"), kind, DATA / data.folder)
    assert [path.name for path in packed.parent.iterdir()] == [data.archive]
    for split in data.splits:
        found, expected = read(name, split, data=tmp_path), read(name, split)
        assert [(one.key, one.answers) for one in found] == [(one.key, one.answers) for one in expected]
