"""Claim f (Tables 7 to 11): image and question encoded together, against patches in a causal decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.reproduction.arms import USUAL_SEEDS, Arm, Scoring, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Curve, Series
from metalm.reproduction.jobs import Job, shared_job, tool

TRAINED_ON = {"1": 366, "10": 3657, "100": 35402}
"""About so much percent of the questions, and how many that is."""
STEPS = {"cpu": {"1": 100, "10": 300, "100": 3300}, "gpu": {"1": 200, "10": 800, "100": 3000}}
QUESTIONS = {"cpu": 2000, "gpu": 9673}
MINUTES = {
    "joint": {"1": 1.1, "10": 3.2, "100": 22.0},
    "patches": {"1": 1.1, "10": 3.0, "100": 22.0},
    "question": {"1": 0.6, "10": 1.3, "100": 11.0},
}
SHARE_OF_YES = 3611 / 9673
"""The most frequent answer among the questions that are tested on."""
SEARCHED_AT, COMPARED_AT = "10", "100"
"""Percent of the questions that learning rates are chosen with, and of those that the verdict is about."""
SEEDS = {"cpu": 4, "gpu": USUAL_SEEDS}
"""Of the two arms that are near each other there. Of three, their intervals have overlapped by 0.2 points;
with five, all claims take more than six hours."""
ARMS = {
    "joint": ("f_joint", "MetaLM: image and question encoded together", "f"),
    "patches": ("f_patches", "a causal decoder with as many layers, patches through a linear map", "f"),
    "question": ("f_question", "a decoder with as many layers that is not shown the image", "f_blind"),
}
"""By name: pipeline, what it is, and its examples."""
RATES = {
    "joint": (5e-4, 1e-3, 2e-3),
    "patches": (5e-4, 1e-3, 2e-3, 4e-3),
    "question": (5e-4, 1e-3, 2e-3, 4e-3),
}
"""Of each arm: such that its best is none of the ends, unless what is beyond makes no difference."""


def questions_about_images(setting: Setting) -> Claim:
    """The claim with its arms."""
    arms = {(name, share): arm for name in ARMS for share, arm in _by_share(setting, name).items()}
    shuffled = Arm(
        "f_shuffled",
        "MetaLM, trained on shuffled answers",
        "f_joint",
        _overrides(setting, "f_shuffled_train", "f_validation", SEARCHED_AT),
        (_test(setting, "joint"),),
        ("shared/f_shuffled_train", "shared/f_validation"),
        rate_of=arms["joint", SEARCHED_AT],
        minutes=3.5,
    )

    def series(name: str, share: str) -> Series:
        return Series(arms[name, share], "test")

    return Claim(
        letter="f",
        title="Questions about images",
        says=(
            "An encoder that reads an image together with its question answers better than a causal decoder."
        ),
        how=(
            "easy-VQA: questions about a drawing of one coloured shape, at 1, 10 and 100% of them. All arms "
            "have five layers of the same width and are trained from the start on the same questions."
        ),
        paper=(("VQAv2 finetuned, MetaLM", "74.4"), ("OK-VQA", "46.5"), ("Karpathy out of domain", "21.1")),
        sets=("easy-vqa",),
        shared=tuple(_shared(setting)),
        arms=(*arms.values(), shuffled),
        comparisons=(
            *(
                Comparison(about, series("joint", COMPARED_AT), series(name, COMPARED_AT))
                for about, name in (
                    ("joint above question alone", "question"),
                    ("joint above patches in a causal decoder", "patches"),
                )
            ),
        ),
        chance=(ChanceCheck(Series(shuffled, "test"), SHARE_OF_YES),),
        curves=tuple(
            Curve(about, tuple((count, series(name, share)) for share, count in TRAINED_ON.items()))
            for name, (_, about, _) in ARMS.items()
        ),
    )


def _by_share(setting: Setting, name: str) -> dict[str, Arm]:
    """The arm at each share of the questions, all at the rate that one of them has chosen."""
    pipeline, about, examples = ARMS[name]
    found: dict[str, Arm] = {}
    for share in sorted(TRAINED_ON, key=lambda one: one != SEARCHED_AT):
        is_searcher = share == SEARCHED_AT
        found[share] = Arm(
            f"f_{name}_{share}",
            f"{about}, {share}% of the questions",
            pipeline,
            _overrides(setting, f"{examples}_train_{share}", f"{examples}_validation", share),
            (_test(setting, name),),
            (f"shared/{examples}_train_{share}", f"shared/{examples}_validation"),
            rates=RATES[name] if is_searcher else (),
            chosen_on=_test(setting, name, "validation") if is_searcher else None,
            rate_of=None if is_searcher else found[SEARCHED_AT],
            minutes=MINUTES[name][share],
            usual_seeds=SEEDS[setting.scale] if share == COMPARED_AT and name != "question" else USUAL_SEEDS,
        )
    return found


def _task(setting: Setting) -> Path:
    return setting.data / "easy-vqa/tasks/easy_vqa.yaml"


def _test(setting: Setting, name: str, split: str = "test") -> Scoring:
    task = setting.shared("f_blind_task") / _task(setting).name if name == "question" else _task(setting)
    limit = QUESTIONS[setting.scale] if split == "test" else 500
    # Text whose encoder is not there is the decoder's, and no other encoder's.
    readers = "image=patches" if name == "patches" else None
    return Scoring(split, (task,), split, "generation", limit, readers=readers)


def _overrides(setting: Setting, train: str, validation: str, share: str) -> tuple[str, ...]:
    return (
        f"data.tokenizer={setting.shared('f_tokenizer')}",
        f"data.sources.tasks.path={setting.shared(train)}",
        f"data.evaluation.tasks.path={setting.shared(validation)}",
        f"training.steps={STEPS[setting.scale][share]}",
        f"training.schedule.warmup_steps={STEPS[setting.scale][share] // 10}",
    )


def _shared(setting: Setting) -> Iterator[Job]:
    task, blind = _task(setting), setting.shared("f_blind_task")
    texts, tokenizer = setting.shared("f_worded.jsonl"), setting.shared("f_tokenizer")
    where = ("--data", setting.data)
    prepared = [
        tool("vary_task", "worded", task, *where, "--most", 20_000, "--out", texts),
        tool("vary_task", "blind", task, "--out", blind),
        tool("train_tokenizer", texts, "--vocab-size", 512, "--out", tokenizer),
    ]
    yield shared_job("f_tokenizer", prepared)
    for name, file in (("f", task), ("f_blind", blind / task.name)):
        for share, count in TRAINED_ON.items():
            command = setting.examples(f"{name}_train_{share}", [file], "train", most=count)
            yield shared_job(f"{name}_train_{share}", [command], "f_tokenizer")
        command = setting.examples(f"{name}_validation", [file], "validation", most=1000)
        yield shared_job(f"{name}_validation", [command], "f_tokenizer")
    most = TRAINED_ON[SEARCHED_AT]
    shuffled = setting.shuffled_examples("f_shuffled_train", "f_shuffled_task", [task], most=most)
    yield shared_job("f_shuffled_train", shuffled, "f_tokenizer")
