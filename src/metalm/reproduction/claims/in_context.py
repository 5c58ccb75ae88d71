"""Claim d (Table 5): without finetuning, a model with an encoder is as good as GPT behind demonstrations."""

from __future__ import annotations

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import Claim, Comparison, Series
from metalm.reproduction.claims.pretrained import pretraining, where_texts_are

TASKS = ("bb_social_iqa", "bb_wikihow_goals", "bb_winowhy", "bb_cosmos_qa")
SHOTS = (0, 1, 4)
LONG = ("data.sequence_length=2048",)
"""Four demonstrations are longer than a row of training."""
QUESTIONS = {"cpu": 100, "gpu": 500}
"""Of each task."""
RATE = 3e-3
"""Of pretraining, as in the pipelines."""


def in_context(setting: Setting) -> Claim:
    """The claim with its arms."""
    tasks = tuple(setting.data / "bigbench/tasks" / f"{name}.yaml" for name in TASKS)
    scorings = tuple(
        Scoring(f"{shots} shots", tasks, limit=QUESTIONS[setting.scale], shots=shots, overrides=LONG)
        for shots in SHOTS
    )

    def arm(name: str, about: str, pipeline: str, minutes: float) -> Arm:
        return Arm(
            name,
            about,
            pipeline,
            where_texts_are(setting),
            scorings,
            ("shared/a_shards",),
            rates=(RATE,),
            minutes=minutes,
        )

    gpt = arm("d_gpt", "GPT, pretrained alone", "a_text", 6.0)
    metalm = arm("d_metalm", "MetaLM, pretrained alone", "a_pretrain", 8.0)
    series = {(one, shots): Series(one, f"{shots} shots") for one in (gpt, metalm) for shots in SHOTS}
    return Claim(
        letter="d",
        title="In context",
        says="Without finetuning MetaLM is a little better than GPT, behind 0, 1 and 4 demonstrations.",
        how=(
            "Commonsense and coreference of BIG-bench: options compared by likelihood, the mean over four "
            "tasks. At a few million parameters chance is what is to be expected: reported, not more."
        ),
        paper=(("GPT, k = 0, 1, 4", "59.9, 59.4, 60.2"), ("MetaLM", "60.4, 59.8, 60.9")),
        sets=("bigbench",),
        shared=pretraining(setting),
        arms=(gpt, metalm),
        comparisons=tuple(
            Comparison(f"MetaLM above GPT, k = {shots}", series[metalm, shots], series[gpt, shots])
            for shots in SHOTS
        ),
    )
