"""Claim a (Table 2, NLI): where two texts are compared, an encoder is better than a decoder alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Series
from metalm.reproduction.jobs import Job, shared_job, tool

TRAINED_ON = {"cpu": 10_000, "gpu": 20_000}
STEPS = {"cpu": 300, "gpu": 3000}
"""Of eight rows of 512 positions: about one epoch, and five."""
QUESTIONS = {"cpu": 2000, "gpu": 5000}
AS_MANY_LAYERS = "model.decoder.num_layers=8"
"""Of GPT as MetaLM has in decoder and encoder together."""
RATES = (3e-4, 1e-3)
DETECTED, DOCKED = "a_pretrained_detected", "a_docked"
SHARE_OF_TRUE = 2498 / 5000
"""The most frequent answer among the questions that are tested on."""


def pair_comparison(setting: Setting) -> Claim:
    """The claim with its arms."""
    task = _worded(setting)
    tested = Scoring("test", (task,), limit=QUESTIONS[setting.scale])
    chosen_on = Scoring("validation", (task,), "validation", limit=500)

    def arm(
        name: str,
        about: str,
        pipeline: str,
        start: str,
        minutes: float,
        *more: str,
        train: str = "a_train",
        rate_of: Arm | None = None,
    ) -> Arm:
        return Arm(
            name,
            about,
            pipeline,
            (*finetuning(setting, start, "a", STEPS, train=train), *more),
            (tested,),
            (f"shared/{start}", f"shared/{train}", "shared/a_validation"),
            rates=() if rate_of else RATES,
            chosen_on=None if rate_of else chosen_on,
            rate_of=rate_of,
            minutes=minutes,
        )

    def encoder(start: str) -> str:
        return f"initialize.encoders={setting.shared(start)}"

    gpt = arm("a_gpt", "GPT with the equal decoder", "a_gpt", "a_text", 5.5)
    large = arm("a_gpt_large", "GPT with as many layers in all", "a_gpt", "a_text_large", 8.0, AS_MANY_LAYERS)
    metalm = arm("a_metalm", "MetaLM", "a_metalm", "a_pretrained", 8.0, encoder("a_pretrained"))
    detecting = arm(
        "a_metalm_detected",
        "MetaLM, whose encoder was first pretrained by replaced-token detection",
        "a_metalm",
        DETECTED,
        8.0,
        encoder(DETECTED),
        rate_of=metalm,
    )
    of_minilm = ("a_minilm", DOCKED, 17.0, encoder(DOCKED), _minilm(setting))
    docked = arm("a_minilm", "MetaLM with a real encoder: MiniLM, docked onto GPT's decoder", *of_minilm)
    shuffled = arm(
        "a_shuffled",
        "the same, trained on shuffled answers",
        *of_minilm,
        train="a_shuffled_train",
        rate_of=docked,
    )
    ours, real, larger = Series(metalm, "test"), Series(docked, "test"), Series(large, "test")
    return Claim(
        letter="a",
        title="Two texts compared",
        says="Multitask finetuning, natural language inference: MetaLM is far better than GPT.",
        how=(
            "VitaminC: does a passage of Wikipedia bear a claim out? Nearly all claims have two answers, by "
            "the passage. Decoder and encoder of four layers are pretrained from the start on the training "
            "side's texts; or a real encoder is docked onto such a decoder. Then all is trained on the pairs."
        ),
        paper=(("NLI, GPT", "65.0"), ("MetaLM", "79.1")),
        sets=("bigbench", "minilm"),
        shared=(*pretraining(setting)[0], *_other_encoders(setting), *_examples_of_all_arms(setting)),
        arms=(metalm, gpt, large, docked, shuffled, detecting),
        comparisons=(
            Comparison("MetaLM above GPT with the equal decoder", ours, Series(gpt, "test")),
            Comparison("MetaLM above GPT with as many layers", ours, larger),
            Comparison("MetaLM with a real encoder above GPT with as many layers", real, larger),
        ),
        chance=(ChanceCheck(Series(shuffled, "test"), SHARE_OF_TRUE),),
        reported=(Series(detecting, "test"),),
    )


def _task(setting: Setting) -> Path:
    return setting.data / "bigbench/tasks/bb_vitaminc.yaml"


def _minilm(setting: Setting) -> str:
    return f"model.encoders.text.pretrained.path={setting.data / 'minilm/encoder'}"


def _worded(setting: Setting) -> Path:
    """The task with all but the answer encoded."""
    return setting.shared("a_tasks") / _task(setting).name


def finetuning(
    setting: Setting, start: str, claim: str, steps: Mapping[str, int], *, train: str | None = None
) -> tuple[str, ...]:
    """Overrides of a run that goes on from a pretrained model of this claim, which other claims share.

    Args:
        setting: of the reproduction.
        start: the pretrained model.
        claim: whose examples are trained on and evaluated.
        steps: by scale.
        train: other examples to train on.
    """
    return (
        f"initialize.decoder={setting.shared(start)}",
        f"data.tokenizer={setting.shared('a_tokenizer')}",
        f"data.sources.tasks.path={setting.shared(train or f'{claim}_train')}",
        f"data.evaluation.tasks.path={setting.shared(f'{claim}_validation')}",
        f"training.steps={steps[setting.scale]}",
    )


def pretraining(setting: Setting) -> tuple[tuple[Job, ...], tuple[str, ...]]:
    """Texts, tokenizer and pretrained models, which other claims share; and where a run finds the former."""
    task = _task(setting)
    texts, examples = setting.shared("a_text.jsonl"), setting.shared("a_worded.jsonl")
    tokenizer, shards = setting.shared("a_tokenizer"), setting.shared("a_shards")
    where = ("--data", setting.data)
    prepared = [
        tool("vary_task", "texts", task, *where, "--fields", "passage,claim", "--out", texts),
        tool("vary_task", "worded", task, *where, "--out", examples),
        tool("vary_task", "encoded", task, "--out", _worded(setting).parent),
        tool("train_tokenizer", texts, examples, "--vocab-size", 4096, "--out", tokenizer),
        tool("prepare_text", texts, "--tokenizer", tokenizer, "--processes", 1, "--out", shards),
    ]
    data = (f"data.tokenizer={tokenizer}", f"data.sources.text.path={shards}")
    jobs = [shared_job("a_shards", prepared)]
    for name, pipeline, more, minutes in (
        ("a_text", "a_text", (), 7.5),
        ("a_text_large", "a_text", (AS_MANY_LAYERS,), 15.0),
        ("a_pretrained", "a_pretrain", (), 9.5),
    ):
        command = setting.train(pipeline, setting.shared(name), 1, *data, *more)
        jobs.append(shared_job(name, [command], "a_shards", minutes=minutes))
    return tuple(jobs), data


def _other_encoders(setting: Setting) -> Iterator[Job]:
    """MetaLM that goes on from an encoder which has judged tokens, and GPT's decoder with MiniLM docked."""
    data = pretraining(setting)[1]
    encoder = setting.train("a_encoder", setting.shared("a_encoder"), 1, *data)
    yield shared_job("a_encoder", [encoder], "a_shards", minutes=7.0)
    start = (
        f"initialize.encoders={setting.shared('a_encoder')}",
        'initialize.new=["encoders.text.connector.*"]',
    )
    detected = setting.train("a_pretrain", setting.shared(DETECTED), 1, *data, *start)
    yield shared_job(DETECTED, [detected], "a_encoder", minutes=9.5)
    onto = f"initialize.decoder={setting.shared('a_text')}"
    docked = setting.train("a_dock", setting.shared(DOCKED), 1, *data, onto, _minilm(setting))
    yield shared_job(DOCKED, [docked], "a_text", minutes=1.5)


def _examples_of_all_arms(setting: Setting) -> Iterator[Job]:
    task, worded, most = _task(setting), _worded(setting), TRAINED_ON[setting.scale]
    yield shared_job("a_train", [setting.examples("a_train", [worded], "train", most=most)], "a_shards")
    yield shared_job(
        "a_validation", [setting.examples("a_validation", [worded], "validation", most=1000)], "a_shards"
    )
    mixed = setting.shared("a_shuffled_task")
    shuffled = [
        tool("vary_task", "shuffled", worded, "--data", setting.data, "--out", mixed),
        setting.examples("a_shuffled_train", [mixed / task.name], "train", most=most, data=mixed),
    ]
    yield shared_job("a_shuffled_train", shuffled, "a_shards")
