"""Models pretrained on the texts of VitaminC, and the arms that several claims finetune from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.jobs import Job, shared_job, tool, with_needs

RATES = (3e-4, 1e-3)
_AS_MANY_LAYERS = "model.decoder.num_layers=8"
"""Of GPT as MetaLM has in decoder and encoder together."""


@dataclass(frozen=True)
class Start:
    """A pretrained model, and what finetunes it."""

    job: str
    """Below `shared/`."""
    about: str
    """For people."""
    pipeline: str
    has_encoder: bool = True
    has_minilm: bool = False
    is_large: bool = False

    def overrides(self, setting: Setting) -> Iterator[str]:
        """Of its finetuning, beside its decoder."""
        if self.has_encoder:
            yield f"initialize.encoders={setting.shared(self.job)}"
        if self.has_minilm:
            yield _minilm(setting)
        if self.is_large:
            yield _AS_MANY_LAYERS


GPT = Start("a_text", "GPT with the equal decoder", "a_gpt", has_encoder=False)
LARGE_GPT = Start("a_text_large", "GPT with as many layers in all", "a_gpt", has_encoder=False, is_large=True)
METALM = Start("a_pretrained", "MetaLM", "a_metalm")
"""Its encoder was first pretrained by replaced-token detection, as the paper's."""
DOCKED = Start(
    "a_docked", "MetaLM with a real encoder: MiniLM, docked onto GPT's decoder", "a_minilm", has_minilm=True
)


@dataclass(frozen=True)
class Finetuning:
    """What the arms of a claim are finetuned on, and what they are asked."""

    setting: Setting
    letter: str
    """Of the claim, whose examples are `shared/LETTER_train` and `shared/LETTER_validation`."""
    steps: int
    scorings: tuple[Scoring, ...]
    chosen_on: Scoring
    overrides: tuple[str, ...] = ()

    def arm(
        self,
        name: str,
        start: Start,
        minutes: float,
        *,
        about: str | None = None,
        train: str | None = None,
        rate_of: Arm | None = None,
    ) -> Arm:
        """An arm that goes on from a pretrained model.

        Args:
            name: of the arm.
            start: the model.
            minutes: of one run with its scores, on one core.
            about: default: that of the model.
            train: other examples than the claim's, below `shared/`.
            rate_of: another arm, whose learning rate it takes; default: it tries its own.
        """
        setting, train = self.setting, train or f"{self.letter}_train"
        validation = f"{self.letter}_validation"
        return Arm(
            name,
            about or start.about,
            start.pipeline,
            (
                f"initialize.decoder={setting.shared(start.job)}",
                f"data.tokenizer={setting.shared('a_tokenizer')}",
                f"data.sources.tasks.path={setting.shared(train)}",
                f"data.evaluation.tasks.path={setting.shared(validation)}",
                f"training.steps={self.steps}",
                *self.overrides,
                *start.overrides(setting),
            ),
            self.scorings,
            (f"shared/{start.job}", f"shared/{train}", f"shared/{validation}"),
            rates=() if rate_of else RATES,
            chosen_on=None if rate_of else self.chosen_on,
            rate_of=rate_of,
            minutes=minutes,
        )


def vitaminc(setting: Setting) -> Path:
    """The task file."""
    return setting.data / "bigbench/tasks/bb_vitaminc.yaml"


def encoded_vitaminc(setting: Setting) -> Path:
    """The task with all but the answer encoded."""
    return setting.shared("a_tasks") / vitaminc(setting).name


def where_texts_are(setting: Setting) -> tuple[str, ...]:
    """Overrides of pretraining."""
    return (
        f"data.tokenizer={setting.shared('a_tokenizer')}",
        f"data.sources.text.path={setting.shared('a_shards')}",
    )


def pretraining(setting: Setting, *starts: Start) -> tuple[Job, ...]:
    """Texts and tokenizer, and the models, with those that they go on from."""
    names = [f"shared/{start.job}" for start in starts] or ["shared/a_shards"]
    return with_needs(names, _jobs(setting))


def _jobs(setting: Setting) -> Iterator[Job]:
    task, data = vitaminc(setting), where_texts_are(setting)
    texts, examples = setting.shared("a_text.jsonl"), setting.shared("a_worded.jsonl")
    tokenizer, shards = setting.shared("a_tokenizer"), setting.shared("a_shards")
    where = ("--data", setting.data)
    prepared = [
        tool("vary_task", "texts", task, *where, "--fields", "passage,claim", "--out", texts),
        tool("vary_task", "worded", task, *where, "--out", examples),
        tool("vary_task", "encoded", task, "--out", encoded_vitaminc(setting).parent),
        tool("train_tokenizer", texts, examples, "--vocab-size", 4096, "--out", tokenizer),
        tool("prepare_text", texts, "--tokenizer", tokenizer, "--processes", 1, "--out", shards),
    ]
    yield shared_job("a_shards", prepared)

    def pretrained(job: str, pipeline: str, minutes: float, needs: str, *more: str) -> Job:
        command = setting.train(pipeline, setting.shared(job), 1, *data, *more)
        return shared_job(job, [command], needs, minutes=minutes)

    yield pretrained(GPT.job, "a_text", 5.0, "a_shards")
    yield pretrained(LARGE_GPT.job, "a_text", 9.0, "a_shards", _AS_MANY_LAYERS)
    yield pretrained("a_encoder", "a_encoder", 5.8, "a_shards")
    has_judged = f"initialize.encoders={setting.shared('a_encoder')}"
    connector = 'initialize.new=["encoders.text.connector.*"]'
    yield pretrained(METALM.job, "a_pretrain", 6.3, "a_encoder", has_judged, connector)
    onto = f"initialize.decoder={setting.shared(GPT.job)}"
    yield pretrained(DOCKED.job, "a_dock", 0.7, GPT.job, onto, _minilm(setting))


def _minilm(setting: Setting) -> str:
    return f"model.encoders.text.pretrained.path={setting.data / 'minilm/encoder'}"
