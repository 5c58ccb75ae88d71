"""A claim of two arms, and results that nothing was trained for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Curve, Series
from metalm.reproduction.jobs import Job, Marks

TESTED = Scoring("test", (Path("invented.yaml"),))


def arm(name: str) -> Arm:
    needs = ("shared/data",)
    return Arm(name, f"what {name} is", "text", (), (TESTED,), needs, rates=(1e-3,), chosen_on=TESTED)


METALM, GPT, SHUFFLED = Series(arm("m"), "test"), Series(arm("g"), "test"), Series(arm("s"), "test")


def claim(tried: str = "") -> Claim:
    return Claim(
        letter="x",
        title="An invented claim",
        says="It is better.",
        how="By made-up results.",
        paper=(("GPT", "65.0"), ("MetaLM", "79.1")),
        sets=("invented",),
        shared=(Job("shared/data", list),),
        arms=(METALM.arm, GPT.arm, SHUFFLED.arm),
        comparisons=(Comparison("MetaLM above GPT", METALM, GPT),),
        chance=(ChanceCheck(SHUFFLED, 0.5),),
        curves=(Curve("MetaLM", ((10, METALM),)),),
        tried=tried,
    )


def write_scores(setting: Setting, series: Series, values: Sequence[float]) -> None:
    """One seed each, with a curve of losses; their jobs are done."""
    marks, jobs = Marks(setting.out), {job.name: job for job in series.arm.jobs(setting)}
    (setting.out / "jobs").mkdir(parents=True, exist_ok=True)
    for seed, value in enumerate(values, 1):
        run = setting.out / series.arm.name / f"seed_{seed}"
        folder = TESTED.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        scores = {"exact_match": {"value": value, "standard_error": 0.01, "count": 400}}
        (folder / "results.json").write_text(json.dumps([{"scores": scores, "questions": 400}]))
        (run / "logs").mkdir(exist_ok=True)
        entries = [{"step": step, "held_out/tasks": 1.0 / (step + seed)} for step in (10, 20, 30)]
        entries.append(
            {
                "step": 30,
                "data/tasks/tokens": 5120,
                "data/tasks/samples": 77,
            }
        )
        (run / "logs/metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
        marks.write(jobs[f"{series.arm.name}/seed_{seed}"], seconds=60.0)
