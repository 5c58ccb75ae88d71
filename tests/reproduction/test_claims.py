"""Claims as they are declared: their jobs fit together, and their arms are alike in what they are given."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metalm.config import RunConfig, load_config
from metalm.errors import DataError
from metalm.reproduction.arms import Arm, Setting
from metalm.reproduction.claim import Claim, check_data, jobs_of
from metalm.reproduction.claims import CLAIMS
from metalm.reproduction.data.set_folder import SOURCE_NAME
from metalm.reproduction.data.sets import SETS
from metalm.reproduction.jobs import PIPELINES, Command, in_order
from metalm.reproduction.slurm import write_arrays
from metalm.reproduction.this_machine import Precision, Scale

REPOSITORY = Path(__file__).parents[2]
MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Without data, but for what pipelines read of the encoder's folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/real/minilm/encoder", "runs/reproduce/shared/random_encoder"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text(json.dumps(MINILM))
    return Setting(Path("data/real"), Path("runs/reproduce"), "cpu", 3)


@pytest.mark.parametrize("path", sorted((REPOSITORY / PIPELINES).glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pipeline_is_valid_as_it_stands(path: Path, setting: Setting) -> None:
    assert load_config(path).run.name


def config_of(arm: Arm) -> RunConfig:
    return load_config(REPOSITORY / PIPELINES / f"{arm.pipeline}.yaml", arm.overrides)


@pytest.fixture
def any_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates need not have been tried to be chosen."""
    monkeypatch.setattr(Arm, "chosen_rate", lambda arm, setting: 1e-3)


def commands_of(claim: Claim, setting: Setting) -> Iterator[Command]:
    for job in claim.jobs(setting):
        if not job.name.endswith(("seed_2", "seed_3")):
            yield from job.commands()


@pytest.mark.usefixtures("any_rate")
@pytest.mark.parametrize("letter", CLAIMS)
@pytest.mark.parametrize(("scale", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("gpu", "bf16")])
def test_every_training_is_a_valid_run(
    letter: str, scale: Scale, precision: Precision, setting: Setting
) -> None:
    setting = replace(setting, scale=scale, precision=precision)
    trainings = [
        command
        for command in commands_of(CLAIMS[letter](setting), setting)
        if command[1:4] == ("-m", "metalm", "train")
    ]
    for words in trainings:
        assert load_config(Path(words[4]), words[5:]).training.precision == precision
    assert trainings


@pytest.mark.usefixtures("any_rate")
@pytest.mark.parametrize("letter", CLAIMS)
def test_a_claim_names_the_data_sets_that_its_jobs_read(letter: str, setting: Setting) -> None:
    claim = CLAIMS[letter](setting)
    words = " ".join(word for command in commands_of(claim, setting) for word in command)
    assert set(re.findall(rf"{setting.data}/([\w-]+)", words)) == set(claim.sets)
    assert set(claim.sets) <= set(SETS)


@pytest.mark.parametrize("letter", CLAIMS)
def test_arms_that_are_compared_are_given_the_same_number_of_rows(letter: str, setting: Setting) -> None:
    for one in CLAIMS[letter](setting).comparisons:
        better, worse = (config_of(series.arm).training for series in (one.better, one.worse))
        assert better.steps * better.global_batch_size == worse.steps * worse.global_batch_size, one.about


@pytest.mark.parametrize("letter", CLAIMS)
def test_jobs_stand_behind_what_they_need_and_have_names_of_their_own(letter: str, setting: Setting) -> None:
    claim = CLAIMS[letter](setting)
    jobs = jobs_of([(claim, setting)])
    assert sum(map(len, in_order(jobs))) == len(jobs)
    assert len(jobs) == len(list(claim.jobs(setting)))
    assert {f"{series.arm.name}/seed_3" for series in claim.series()} <= {job.name for job in jobs}


def test_arms_have_as_many_seeds_as_asked_for_or_as_their_verdict_usually_needs(setting: Setting) -> None:
    def seeds(arm: str, **changes: Any) -> int:
        own = replace(setting, **{"seeds": None} | changes)
        names = [job.name for job in jobs_of([(CLAIMS["f"](own), own)])]
        return sum(name.startswith(f"{arm}/seed_") for name in names)

    assert (seeds("f_joint_100"), seeds("f_patches_100")) == (4, 4)
    assert (seeds("f_joint_10"), seeds("f_question_100")) == (3, 3)
    assert seeds("f_joint_100", scale="gpu") == 3
    assert seeds("f_joint_100", seeds=1) == seeds("f_joint_10", seeds=1) == 1


@pytest.mark.parametrize("letter", CLAIMS)
def test_rates_are_tried_with_a_seed_that_is_not_reported(letter: str, setting: Setting) -> None:
    claim = CLAIMS[letter](setting)
    tried = [job for arm in claim.arms for job in arm.jobs(setting) if "/rate_" in job.name]
    assert len(tried) == sum(len(arm.rates) for arm in claim.arms if len(arm.rates) > 1)
    for job in tried:
        train, ask = job.commands()
        assert "run.seed=0" in train
        assert ask[ask.index("--split") + 1] == "validation"


def test_the_rate_that_is_best_on_validation_is_taken(setting: Setting) -> None:
    arm = next(arm for arm in CLAIMS["b"](setting).arms if arm.name == "b_metalm")
    job = next(job for job in arm.jobs(setting) if job.name == "b_metalm/seed_2")
    for rate, value in zip(arm.rates, (0.6, 0.8, 0.7), strict=True):
        folder = setting.out / f"b_metalm/rate_{rate:g}/scores/validation"
        folder.mkdir(parents=True)
        scores = {"exact_match": {"value": value, "standard_error": 0.01, "count": 500}}
        (folder / "results.json").write_text(json.dumps([{"scores": scores, "questions": 500}]))
    train, ask = job.commands()
    assert f"training.optimizer.learning_rate={arm.rates[1]:g}" in train
    assert "run.seed=2" in train
    assert ask[ask.index("--split") + 1] == "test"


def test_data_that_are_not_there_are_named(setting: Setting) -> None:
    claims = [CLAIMS["b"](setting)]
    with pytest.raises(DataError, match=r"no vader, minilm in data/real: .*fetch_data.py vader minilm"):
        check_data(claims, setting.data)
    for name in ("vader", "minilm"):
        (setting.data / name).mkdir(exist_ok=True)
        (setting.data / name / SOURCE_NAME).write_text("{}")
    check_data(claims, setting.data)


def test_arrays_run_the_jobs_of_a_stage_behind_the_one_before(setting: Setting) -> None:
    jobs = jobs_of([(CLAIMS["b"](setting), setting)])
    typed = write_arrays(jobs, setting, ["--only", "b"])
    stages = in_order(jobs)
    assert typed.count("sbatch") - typed.count(".sbatch") == len(stages)
    assert typed.count("--dependency=afterany") == len(stages) - 1
    script = (setting.out / "slurm/stage_0.sbatch").read_text()
    assert f"--array=0-{len(stages[0]) - 1}\n" in script
    assert all(job.name in script for job in stages[0])
    assert "--gpus" not in script


def test_arrays_ask_for_a_gpu_where_the_scale_is_its(setting: Setting) -> None:
    at_gpu = replace(setting, scale="gpu")
    write_arrays(jobs_of([(CLAIMS["b"](at_gpu), at_gpu)]), at_gpu, ["--only", "b", "--scale", "gpu"])
    assert "#SBATCH --gpus=1\n#SBATCH --time=" in (setting.out / "slurm/stage_0.sbatch").read_text()
