"""Claim h (Tables 7 to 11): claim f on pictures of clothes and on photographs, and on another task."""

from __future__ import annotations

from collections.abc import Iterator

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Series, jobs_for
from metalm.reproduction.claims.questions_about_images import ARMS, SEARCHED_AT, questions_about_images
from metalm.reproduction.jobs import Job, shared_job, tool

TASKS = {
    "clothes": "fashion-mnist/tasks/fashion_mnist_yes_no.yaml",
    "photographs": "bigbench/tasks/cifar10_yes_no.yaml",
}
MOST = 14_000
"""Questions of each that are trained on: all that there are of photographs."""
STEPS = {"cpu": 400, "gpu": 3000}
QUESTIONS = {"cpu": 1000, "gpu": 3910}
SHOTS = (0, 1, 4)
QUESTIONS_BEHIND_SHOTS = {"cpu": 300, "gpu": 1000}
CHANCE = 0.5
"""Half of the questions about each picture are to be answered by yes."""


def questions_about_photographs(setting: Setting) -> Claim:
    """The claim with its arms."""
    of_images = questions_about_images(setting)
    searchers = {arm.name: arm for arm in of_images.arms}

    def arm(name: str, trained_on: str, *, is_shuffled: bool = False) -> Arm:
        pipeline, about, _ = ARMS[name]
        examples = f"h_{trained_on}" + ("_blind" if name == "question" else "")
        train = "h_photographs_shuffled_train" if is_shuffled else f"{examples}_train"
        asked = [_asked(setting, name, trained_on)]
        if trained_on == "clothes" and name != "question":
            asked += [_asked(setting, name, "photographs", shots) for shots in SHOTS]
        return Arm(
            f"h_shuffled_{name}" if is_shuffled else f"h_{trained_on}_{name}",
            f"{about}, {trained_on}" + (", trained on shuffled answers" if is_shuffled else ""),
            pipeline,
            (
                f"data.tokenizer={setting.shared('h_tokenizer')}",
                f"data.sources.tasks.path={setting.shared(train)}",
                f"data.evaluation.tasks.path={setting.shared(f'{examples}_validation')}",
                f"training.steps={STEPS[setting.scale]}",
                f"training.schedule.warmup_steps={STEPS[setting.scale] // 10}",
            ),
            tuple(asked),
            (f"shared/{train}", f"shared/{examples}_validation"),
            rate_of=searchers[f"f_{name}_{SEARCHED_AT}"],
            minutes=2.8,
        )

    arms = {(name, trained_on): arm(name, trained_on) for trained_on in TASKS for name in ARMS}
    shuffled = arm("joint", "photographs", is_shuffled=True)
    tried = [
        f"{searcher.name}/rate_{rate:g}"
        for name in ARMS
        for searcher in (searchers[f"f_{name}_{SEARCHED_AT}"],)
        for rate in searcher.grid
    ]

    def above(worse: str, about: str, asked: str) -> Comparison:
        return Comparison(
            f"joint above {about}, {asked}",
            Series(arms["joint", asked], asked),
            Series(arms[worse, asked], asked),
        )

    return Claim(
        letter="h",
        title="Questions about clothes and photographs",
        says=of_images.says,
        how=(
            "Does a picture of clothes (Fashion-MNIST), or a photograph (CIFAR-10's test set), show a thing "
            "of some kind? Trained from the start on 14,000 questions of either, at the learning rates of "
            "claim f. Zero- and few-shot: what was trained on clothes is asked about photographs."
        ),
        paper=of_images.paper,
        sets=("fashion-mnist", "bigbench", "easy-vqa"),
        shared=(*jobs_for(tried, (of_images,), setting), *_shared(setting)),
        arms=(*arms.values(), shuffled),
        comparisons=tuple(
            above(worse, about, asked)
            for asked in TASKS
            for worse, about in (
                ("question", "the question alone"),
                ("patches", "patches in a causal decoder"),
            )
        ),
        chance=(ChanceCheck(Series(shuffled, "photographs"), CHANCE),),
        reported=tuple(
            Series(arms[name, "clothes"], _named("photographs", shots))
            for name in ("joint", "patches")
            for shots in SHOTS
        ),
    )


def _named(asked: str, shots: int | None) -> str:
    return asked if shots is None else f"{asked} behind {shots} demonstrations"


def _asked(setting: Setting, name: str, asked: str, shots: int | None = None) -> Scoring:
    task = setting.data / TASKS[asked]
    if name == "question":
        task = setting.shared("h_blind_tasks") / task.name
    questions = QUESTIONS if shots is None else QUESTIONS_BEHIND_SHOTS
    # Text whose encoder is not there is the decoder's, and no other encoder's.
    readers = "image=patches" if name == "patches" else None
    return Scoring(
        _named(asked, shots), (task,), limit=questions[setting.scale], readers=readers, shots=shots
    )


def _shared(setting: Setting) -> Iterator[Job]:
    tasks = {name: setting.data / path for name, path in TASKS.items()}
    texts, tokenizer = setting.shared("h_worded.jsonl"), setting.shared("h_tokenizer")
    where = ("--data", setting.data)
    blind = setting.shared("h_blind_tasks")
    prepared = [
        tool("vary_task", "worded", *tasks.values(), *where, "--most", 10_000, "--out", texts),
        tool("vary_task", "blind", *tasks.values(), "--out", blind),
        tool("train_tokenizer", texts, "--vocab-size", 512, "--out", tokenizer),
    ]
    yield shared_job("h_tokenizer", prepared)
    for name, task in tasks.items():
        for examples, file in ((f"h_{name}", task), (f"h_{name}_blind", blind / task.name)):
            for split, most in (("train", MOST), ("validation", 1000)):
                command = setting.examples(f"{examples}_{split}", [file], split, most=most)
                yield shared_job(f"{examples}_{split}", [command], "h_tokenizer")
    name = "h_photographs_shuffled_train"
    shuffled = setting.shuffled_examples(name, "h_shuffled_task", [tasks["photographs"]], most=MOST)
    yield shared_job(name, shuffled, "h_tokenizer")
