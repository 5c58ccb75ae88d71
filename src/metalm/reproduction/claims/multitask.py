"""Claim i (Table 2): finetuned on tasks of many clusters at once, MetaLM is better than GPT in nearly all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from metalm.reproduction.arms import Scoring, Setting
from metalm.reproduction.claim import Claim, Comparison, Series
from metalm.reproduction.claims.pretrained import GPT, LARGE_GPT, METALM, Finetuning, pretraining
from metalm.reproduction.jobs import Job, shared_job, tool


class Cluster(NamedTuple):
    """Tasks that are scored alike."""

    about: str
    by: Literal["likelihood", "generation"]
    tasks: tuple[str, ...]
    paper: tuple[float, float]
    """GPT's and MetaLM's figures of the paper's cluster."""


CLUSTERS = (
    Cluster("nli", "likelihood", ("vitaminc", "fever"), (65.0, 79.1)),
    Cluster("sentiment", "likelihood", ("multiemo",), (92.9, 94.6)),
    Cluster("coreference, explained", "likelihood", ("winowhy",), (67.1, 84.3)),
    Cluster("coreference, completed", "generation", ("winogrande",), (67.1, 84.3)),
    Cluster(
        "commonsense",
        "likelihood",
        ("cosmos_qa", "social_iqa", "wikihow_goals", "wikihow_order", "wikihow_steps"),
        (63.3, 84.2),
    ),
    Cluster("reading", "generation", ("disfl_qa", "drop", "quoref", "ropes"), (64.5, 73.1)),
    Cluster("closed book", "generation", ("wikidata",), (38.2, 44.3)),
    Cluster("structure to text", "generation", ("common_gen", "e2e", "webnlg"), (44.2, 44.1)),
    Cluster("summaries", "generation", ("xsum",), (29.8, 31.0)),
    Cluster("dialogue, chosen", "likelihood", ("timedial",), (80.3, 84.3)),
    Cluster("dialogue, said", "generation", ("topical_chat",), (80.3, 84.3)),
)
"""The data that there are, of the paper's clusters."""
MOST = {"cpu": 1000, "gpu": 10_000}
"""Records of each task that are trained on."""
STEPS = {"cpu": 400, "gpu": 6000}
QUESTIONS = {"cpu": 100, "gpu": 500}
"""Of each task."""
CHOSEN_ON = ("nli", "sentiment", "coreference, explained", "commonsense")
"""The clusters whose validation chooses the learning rate."""


def multitask(setting: Setting) -> Claim:
    """The claim with its arms."""
    limit = QUESTIONS[setting.scale]
    asked = tuple(
        Scoring(
            one.about,
            _tasks(setting, one),
            by=one.by,
            limit=min(limit, 60) if one.by == "generation" else limit,
        )
        for one in CLUSTERS
    )
    chosen = tuple(path for one in CLUSTERS if one.about in CHOSEN_ON for path in _tasks(setting, one))
    chosen_on = Scoring("validation", chosen, "validation", limit=60)

    steps = STEPS[setting.scale]
    warmup = f"training.schedule.warmup_steps={steps // 10}"
    finetuning = Finetuning(setting, "i", steps, asked, chosen_on, (warmup,))
    metalm = finetuning.arm("i_metalm", METALM, 9.0)
    gpt = finetuning.arm("i_gpt", GPT, 6.0)
    large = finetuning.arm("i_gpt_large", LARGE_GPT, 9.0)
    return Claim(
        letter="i",
        title="Multitask finetuning, by cluster",
        says="Finetuned on many tasks at once, MetaLM is better than GPT in all clusters but one.",
        how=(
            "21 tasks of BIG-bench, up to 1,000 records of each (10,000 at scale gpu), all but the answer "
            "encoded. A cluster's score is the mean over its tasks: accuracy of the likeliest option, F1 or "
            "ROUGE-1 of what is generated. The models are those of claim a, pretrained on its passages."
        ),
        paper=tuple((f"{one.about}: GPT, MetaLM", f"{one.paper[0]}, {one.paper[1]}") for one in CLUSTERS),
        sets=("bigbench",),
        shared=(*pretraining(setting, METALM, GPT, LARGE_GPT), *_examples(setting)),
        arms=(metalm, gpt, large),
        comparisons=tuple(
            Comparison(
                f"MetaLM above GPT, {one.about}",
                Series(metalm, one.about),
                Series(gpt, one.about),
                f"GPT {one.paper[0]}; MetaLM {one.paper[1]}",
            )
            for one in CLUSTERS
            if one.paper[0] < one.paper[1]
        ),
        metric="score",
        reported=tuple(Series(one, cluster.about) for cluster in CLUSTERS for one in (metalm, gpt, large)),
    )


def _tasks(setting: Setting, cluster: Cluster) -> tuple[Path, ...]:
    """Of a cluster, with all but the answer encoded."""
    return tuple(setting.shared("i_tasks") / f"bb_{name}.yaml" for name in cluster.tasks)


def _examples(setting: Setting) -> Iterator[Job]:
    tasks = [setting.data / f"bigbench/tasks/bb_{name}.yaml" for one in CLUSTERS for name in one.tasks]
    encoded = [path for one in CLUSTERS for path in _tasks(setting, one)]
    made = tool("vary_task", "encoded", *tasks, "--out", setting.shared("i_tasks"))
    most = MOST[setting.scale]
    yield shared_job(
        "i_train", [made, setting.examples("i_train", encoded, "train", most=most)], "a_shards", minutes=0.5
    )
    held_out = setting.examples("i_validation", encoded, "validation", most=50)
    yield shared_job("i_validation", [held_out], "i_train")
