"""Tasks of BIG-bench that stand for the paper's clusters of text, and its photographs of CIFAR-10.

BIG-bench has no splits. Records that have a claim, passage or the like in common are on one side, also across
tasks: FEVER's claims are in VitaminC, too. Its tasks are not for pretraining: the passages of VitaminC's
training side alone are written as text, to pretrain for that task.
"""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalm.errors import DataError
from metalm.reproduction.data import bigbench_examples as examples_of
from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.bigbench_examples import Parser
from metalm.reproduction.data.packages import BIGBENCH
from metalm.reproduction.data.photographs import write_photographs
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import connected, side_of, split_by_group

PACKAGES = (BIGBENCH,)
ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"
PHOTOGRAPHS = "cifar10_classification/hex"
_INSTRUCTIONS = "natural_instructions/subtask0"


@dataclass(frozen=True)
class Source:
    """Where a task of ours stands in BIG-bench."""

    folder: str
    parse: Parser
    label: str | None = None
    """The field whose values are counted."""
    most: dict[str, int] = field(default_factory=dict)
    """By split, records that are kept."""
    unit: str = "group"
    """The field by which they are chosen: of an article that is large, not all claims are."""


LARGE = {"train": 20_000, "validation": 2_000, "test": 5_000}
GROUPED: tuple[dict[str, Source], ...] = (
    {
        "bb_vitaminc": Source("vitaminc_fact_verification", examples_of.vitaminc, "label", LARGE, "claim"),
        "bb_fever": Source("fact_checker/fever", examples_of.fever, "label"),
    },
    {"bb_multiemo": Source("multiemo/all_sentence_en", examples_of.multiemo, "label", LARGE)},
    {"bb_winowhy": Source("winowhy", examples_of.winowhy, "label")},
    {"bb_winogrande": Source(f"{_INSTRUCTIONS}33_winogrande_answer_generation", examples_of.winogrande)},
    {"bb_social_iqa": Source("social_iqa", examples_of.social_iqa, "answer")},
    {
        "bb_wikihow_goals": Source("goal_step_wikihow/goal_inference", examples_of.wikihow_goals, "answer"),
        "bb_wikihow_steps": Source("goal_step_wikihow/step_inference", examples_of.wikihow_steps, "answer"),
        "bb_wikihow_order": Source("goal_step_wikihow/step_ordering", examples_of.wikihow_order, "answer"),
    },
    {
        "bb_cosmos_qa": Source(
            f"{_INSTRUCTIONS}25_cosmosqa_incorrect_answer_generation", examples_of.cosmos_qa, "answer"
        )
    },
    {"bb_disfl_qa": Source("disfl_qa", examples_of.disfl_qa)},
    {"bb_drop": Source(f"{_INSTRUCTIONS}28_drop_answer_generation", examples_of.passages)},
    {"bb_quoref": Source(f"{_INSTRUCTIONS}02_quoref_answer_generation", examples_of.passages)},
    {"bb_ropes": Source(f"{_INSTRUCTIONS}61_ropes_answer_generation", examples_of.ropes)},
    {"bb_wikidata": Source("qa_wikidata", examples_of.wikidata)},
    {"bb_e2e": Source("gem/e2e_nlg", examples_of.structures)},
    {"bb_webnlg": Source("gem/webnlg_en", examples_of.triples)},
    {"bb_common_gen": Source("gem/common_gen", examples_of.structures)},
    {"bb_xsum": Source("gem/xsum", examples_of.xsum)},
    {"bb_timedial": Source("timedial", examples_of.timedial, "answer")},
    {"bb_topical_chat": Source("topical_chat", examples_of.topical_chat)},
)
"""Tasks by the names of ours; those of one group have claims and the like in common."""


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write the tasks, VitaminC's passages, and the photographs."""
    sources = [source for group in GROUPED for source in group.values()]
    wanted = {
        f"{ROOT}{place}/task.json": place for place in (PHOTOGRAPHS, *(source.folder for source in sources))
    }
    contents = {
        wanted[name]: content for name, content in read_members(files[BIGBENCH.name], wanted.__contains__)
    }
    if missing := sorted(set(wanted.values()) - contents.keys()):
        raise DataError(f"{files[BIGBENCH.name]} lacks {', '.join(missing)}: get the package again")
    for group in GROUPED:
        parsed = [
            (task, record, keys)
            for task, source in group.items()
            for record, keys in source.parse(_examples(contents.pop(source.folder)))
        ]
        roots = connected([keys for _, _, keys in parsed])
        records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for (task, record, _), root in zip(parsed, roots, strict=True):
            records[task].append({**record, "group": " ".join(parsed[root][2][0])})
        for task, source in group.items():
            sides = split_by_group(
                records[task],
                operator.itemgetter("group"),
                source.most,
                operator.itemgetter(source.unit),
            )
            folder.write_task(task, sides, source.label)
        if "bb_vitaminc" in group:
            folder.write_text("vitaminc_passages", _articles(records["bb_vitaminc"]))
    write_photographs(_examples(contents.pop(PHOTOGRAPHS)), folder)


def _examples(content: bytes) -> list[dict[str, Any]]:
    return json.loads(content)["examples"]


def _articles(records: Iterable[dict[str, Any]]) -> list[str]:
    """A document for each article of the training side, of its title and its passages."""
    passages: dict[str, dict[str, None]] = {}
    for record in records:
        if side_of(record["group"]) == "train":
            passages.setdefault(record["article"], {})[record["passage"]] = None
    return ["\n".join([title, *found]) for title, found in passages.items()]
