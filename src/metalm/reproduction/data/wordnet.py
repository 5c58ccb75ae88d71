"""WordNet 3.0: what words mean, with sentences that use them.

Two tasks are made of it: whether a word has one meaning in two of its sentences (as in arXiv 1808.09121), and
which word a definition is of. The text is of all meanings that neither task asks about in validation or test.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.errors import DataError
from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.packages import WORDNET
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import connected, normalised, place_of, split_by_group

PACKAGES = (WORDNET,)
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
MOST_PAIRS = 3
"""Of one word, with one meaning and with two, each."""
NUM_WORDS = 4
"""That a definition may be of."""
DEFINITIONS = {"train": 20_000, "validation": 2_000, "test": 5_000}
_ASKED = ("validation", "test")


@dataclass(frozen=True)
class Meaning:
    """One synset."""

    key: str
    part: str
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    """Keys of what it is a kind of."""
    definition: str
    sentences: tuple[str, ...]


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write both tasks and the text."""
    found = dict(
        read_members(
            files[WORDNET.name], lambda name: name in {f"usr/share/wordnet/data.{part}" for part in PARTS}
        )
    )
    meanings = {
        meaning.key: meaning for name, content in sorted(found.items()) for meaning in _read(name, content)
    }
    same = _split_pairs(list(_pairs(meanings)))
    folder.write_task("wordnet_same_meaning", same, "label")
    asked = split_by_group(
        list(_definitions(list(meanings.values()))), lambda record: record["group"], DEFINITIONS
    )
    folder.write_task("wordnet_definitions", asked, "answer")
    hidden = {record["meaning"] for side in _ASKED for record in asked[side]}
    hidden |= {meaning for side in _ASKED for record in same[side] for meaning in record["meanings"]}
    folder.write_text(
        "wordnet", (_article(meaning, meanings) for key, meaning in meanings.items() if key not in hidden)
    )


def _read(name: str, content: bytes) -> Iterator[Meaning]:
    """The synsets of a file, as wndb(5WN) describes it."""
    part = name.rpartition(".")[2]
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        if line.startswith("  "):
            continue  # the licence
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        try:
            count = int(fields[3], 16)
            words = [
                re.sub(r"\([a-z]+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]
            ]
            pointers = fields[5 + 2 * count :]
            kinds = [
                f"{part}:{pointers[at + 1]}"
                for at in range(0, 4 * int(fields[4 + 2 * count]), 4)
                if pointers[at] in ("@", "@i")
            ]
            definition, _, _ = gloss.partition('"')
            sentences = re.findall(r'"([^"]+)"', gloss)
            yield Meaning(
                f"{part}:{fields[0]}",
                part,
                tuple(words),
                tuple(kinds),
                definition.strip(" ;"),
                tuple(sentence.strip() for sentence in sentences),
            )
        except (IndexError, ValueError) as error:
            raise DataError(f"{name}:{number} is no line of WordNet: {error!r}") from None


def _pairs(meanings: Mapping[str, Meaning]) -> Iterator[dict[str, Any]]:
    """For each word as many pairs of sentences with one meaning as with two, at most `MOST_PAIRS` of each."""
    uses: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for meaning in meanings.values():
        for word in meaning.words:
            shown = re.compile(rf"\b{re.escape(word)}(s|es|d|ed|ing)?\b", re.IGNORECASE)
            uses[word, meaning.part] += [
                (sentence, meaning.key) for sentence in meaning.sentences if shown.search(sentence)
            ]
    for (word, part), found in uses.items():
        kept: dict[str, list[tuple[tuple[str, str], ...]]] = {"same": [], "different": []}
        for pair in itertools.combinations(sorted(set(found)), 2):
            if normalised(pair[0][0]) != normalised(pair[1][0]):
                kept["same" if pair[0][1] == pair[1][1] else "different"].append(pair)
        most = min(MOST_PAIRS, *map(len, kept.values()))
        for label, pairs in kept.items():
            for one, other in sorted(pairs, key=lambda pair: place_of(repr(pair)))[:most]:
                yield {
                    "word": word,
                    "part": PARTS[part],
                    "sentence1": one[0],
                    "sentence2": other[0],
                    "meanings": [one[1], other[1]],
                    "label": label,
                }


def _split_pairs(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """All pairs of a word are on one side, and so are all pairs of a sentence."""
    roots = connected(
        [
            (record["word"].lower(), *(normalised(record[name]) for name in ("sentence1", "sentence2")))
            for record in records
        ]
    )
    grouped = [
        {**record, "group": records[root]["word"]} for record, root in zip(records, roots, strict=True)
    ]
    return split_by_group(grouped, lambda record: record["group"])


def _definitions(meanings: Sequence[Meaning]) -> Iterator[dict[str, Any]]:
    """Each definition with its word among words of the same part of speech, in an order as if at random."""
    by_part: dict[str, list[Meaning]] = defaultdict(list)
    for meaning in meanings:
        by_part[meaning.part].append(meaning)
    for meaning in meanings:
        others = by_part[meaning.part]
        drawn = {
            others[int(place_of(f"{meaning.key} {number}") * len(others))].words[0]
            for number in range(1, NUM_WORDS)
        }
        words = sorted(
            {meaning.words[0], *(drawn - set(meaning.words))}, key=lambda word: place_of(meaning.key + word)
        )
        if len(words) == NUM_WORDS:
            yield {
                "meaning": meaning.key,
                "part": PARTS[meaning.part],
                "definition": meaning.definition,
                "options": words,
                "answer": words.index(meaning.words[0]),
                "group": normalised(meaning.definition),
            }


def _article(meaning: Meaning, meanings: Mapping[str, Meaning]) -> str:
    """What a dictionary would say of a meaning."""
    lines = [f"{', '.join(meaning.words)} ({PARTS[meaning.part]}): {meaning.definition}."]
    kinds = [meanings[kind].words[0] for kind in meaning.kinds if kind in meanings]
    if kinds:
        lines.append(f"Kind of: {', '.join(kinds)}.")
    return "\n".join([*lines, *meaning.sentences])
