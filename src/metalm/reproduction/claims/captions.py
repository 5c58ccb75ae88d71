"""Claim e (Table 7): captions follow the image."""

from __future__ import annotations

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import Claim, Comparison, Series
from metalm.reproduction.jobs import shared_job, tool

STEPS = {"cpu": 600, "gpu": 4000}
QUESTIONS = {"cpu": 400, "gpu": 900}
RATES = (5e-4, 1e-3, 2e-3)


def captions(setting: Setting) -> Claim:
    """The claim with its arms."""
    task = setting.data / "openmoji/tasks/openmoji_captions.yaml"
    mixed = setting.shared("e_mismatched")
    tokenizer, worded = setting.shared("e_tokenizer"), setting.shared("e_worded.jsonl")
    limit = QUESTIONS[setting.scale]
    right = Scoring("right image", (task,), by="generation", limit=limit)
    wrong = Scoring("wrong image", (mixed / task.name,), by="generation", limit=limit, data=mixed)
    arm = Arm(
        "e_captions",
        "MetaLM, trained on names of drawings",
        "e_captions",
        (
            f"data.tokenizer={tokenizer}",
            f"data.sources.tasks.path={setting.shared('e_train')}",
            f"data.evaluation.tasks.path={setting.shared('e_validation')}",
            f"training.steps={STEPS[setting.scale]}",
        ),
        (right, wrong),
        ("shared/e_tokenizer", "shared/e_train", "shared/e_validation"),
        rates=RATES,
        chosen_on=Scoring("validation", (task,), "validation", "generation", 200),
        minutes=4.2,
    )
    where = ("--data", setting.data)
    prepared = [
        tool("vary_task", "worded", task, *where, "--most", 10_000, "--out", worded),
        tool("vary_task", "mismatched", task, *where, "--out", mixed),
        tool("train_tokenizer", worded, "--vocab-size", 1024, "--out", tokenizer),
    ]
    shared = [shared_job("e_tokenizer", prepared)]
    for split in ("train", "validation"):
        command = setting.examples(f"e_{split}", [task], split)
        shared.append(shared_job(f"e_{split}", [command], "e_tokenizer"))
    return Claim(
        letter="e",
        title="Captions of pictures",
        says="Asked to summarise an image, the model says what is on it.",
        how="OpenMoji's drawings and their names: CIDEr-D from the right drawing, and from another one.",
        paper=(
            ("zero-shot CIDEr: COCO, NoCaps, Flickr30k", "82.2, 58.7, 43.3"),
            ("COCO, finetuned", "126.6"),
        ),
        sets=("openmoji",),
        shared=tuple(shared),
        arms=(arm,),
        comparisons=(
            Comparison(
                "the right image above a wrong one", Series(arm, "right image"), Series(arm, "wrong image")
            ),
        ),
        metric="CIDEr-D",
    )
