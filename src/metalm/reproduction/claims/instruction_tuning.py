"""Claim c (Table 4): instruction tuning without a cluster, which is then asked for."""

from __future__ import annotations

from pathlib import Path

from metalm.reproduction.arms import Scoring, Setting
from metalm.reproduction.claim import Claim, Comparison, Series
from metalm.reproduction.claims.pretrained import GPT, METALM, Finetuning, pretraining
from metalm.reproduction.jobs import shared_job

TRAINED_ON = ("bb_social_iqa", "bb_wikihow_goals", "bb_winowhy", "bb_cosmos_qa", "bb_timedial", "bb_multiemo")
HELD_OUT = ("bb_vitaminc", "bb_fever")
"""The cluster of natural language inference."""
MOST = {"cpu": 1500, "gpu": 5000}
"""Records of each task."""
QUESTIONS = {"cpu": 250, "gpu": 1000}
WORDINGS = 3
STEPS = {"cpu": 200, "gpu": 2000}


def instruction_tuning(setting: Setting) -> Claim:
    """The claim with its arms."""
    trained_on, held_out = (_files(setting, names) for names in (TRAINED_ON, HELD_OUT))
    asked = Scoring("held out", held_out, limit=QUESTIONS[setting.scale], templates=WORDINGS)
    chosen_on = Scoring("validation", trained_on, "validation", limit=100)
    finetuning = Finetuning(setting, "c", STEPS[setting.scale], (asked,), chosen_on)
    metalm = finetuning.arm("c_metalm", METALM, 4.2)
    gpt = finetuning.arm("c_gpt", GPT, 2.8)
    examples = [
        shared_job(
            f"c_{split}",
            [setting.examples(f"c_{split}", trained_on, split, most=MOST[setting.scale], wordings="drawn")],
            "a_shards",
        )
        for split in ("train", "validation")
    ]
    return Claim(
        letter="c",
        title="Instruction tuning, a cluster held out",
        says="Tuned on instructions without a cluster, MetaLM answers that cluster better than GPT.",
        how=(
            "Tuned on six tasks of BIG-bench in drawn wordings, asked for natural language inference in "
            "three wordings. Of a few million parameters chance is to be expected: reported, not more."
        ),
        paper=(("NLI, GPT", "46.9"), ("MetaLM", "54.5")),
        sets=("bigbench",),
        shared=(*pretraining(setting, METALM, GPT), *examples),
        arms=(metalm, gpt),
        comparisons=(
            Comparison(
                "MetaLM above GPT on the held-out cluster",
                Series(metalm, "held out"),
                Series(gpt, "held out"),
            ),
        ),
        tried=(
            "Two learning rates and 200 steps on CPU: on validation of the tasks that they are tuned on, "
            "both models stay near the share of the most frequent answers, so there is little to transfer "
            "yet. Claim a suggests what is missing: there, a real encoder learns in as many steps, and one "
            "from the start does not."
        ),
    )


def _files(setting: Setting, names: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(setting.data / "bigbench/tasks" / f"{name}.yaml" for name in names)
