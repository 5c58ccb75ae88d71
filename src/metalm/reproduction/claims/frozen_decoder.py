"""Claim b (Table 3): a docked encoder finetunes a frozen decoder better than the decoder finetunes itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Series
from metalm.reproduction.jobs import Job, shared_job, tool

DOMAINS = ("films", "products", "tweets", "news")
OTHERS = DOMAINS[1:]
QUESTIONS = {"cpu": 1000, "gpu": 2019}
STEPS_ON_GPU = 600
"""About four epochs, instead of one."""
FINETUNED_BY = {"b_without": "b_gpt", "b_docked": "b_metalm", "b_docked_random": "b_random"}
"""What finetunes each pretrained model."""
WITHOUT_ENCODER = ("model.encoders=null", "initialize.new=[]", "training.optimizer.learning_rates=null")
TRAINED_AS_A_WHOLE = (
    "model.encoders.text.trained_layers=all",
    "training.optimizer.learning_rates.encoders.text=1e-3",
)
"""An encoder of random weights, which has nothing to keep."""
SHARE_OF_POSITIVE = 1030 / 2019
"""Among the snippets of films that are tested on."""


def frozen_decoder(setting: Setting) -> Claim:
    """The claim with its arms."""
    films = _worded(setting, "films")
    tested = Scoring("films", (films,), limit=QUESTIONS[setting.scale])
    chosen_on = Scoring("validation", (films,), "validation", limit=500)

    def arm(
        name: str,
        about: str,
        pretrained: str,
        minutes: float,
        *,
        trained_on: str = "films",
        rates: tuple[float, ...] = (),
        rate_of: Arm | None = None,
    ) -> Arm:
        held_out = "others" if trained_on == "others" else "films"
        return Arm(
            name,
            about,
            FINETUNED_BY[pretrained],
            _overrides(setting, pretrained, trained_on, held_out),
            (tested,),
            (f"shared/{pretrained}", f"shared/{trained_on}_train", f"shared/{held_out}_validation"),
            rates=rates,
            chosen_on=chosen_on if rates else None,
            rate_of=rate_of,
            minutes=minutes,
        )

    gpt = arm("b_gpt", "GPT: the same decoder, all of it trained", "b_without", 0.8, rates=(3e-4, 1e-3, 3e-3))
    metalm = arm(
        "b_metalm",
        "MetaLM: decoder frozen, MiniLM docked, its last two layers and the connector trained",
        "b_docked",
        1.7,
        rates=(1e-4, 3e-4, 1e-3),
    )
    random = arm(
        "b_random",
        "MetaLM, but its encoder began with random weights, and all of it is trained",
        "b_docked_random",
        2.5,
        rates=(3e-4, 1e-3, 3e-3),
    )
    gpt_others = arm(
        "b_gpt_others",
        "GPT, trained on products, tweets and news",
        "b_without",
        0.9,
        trained_on="others",
        rate_of=gpt,
    )
    metalm_others = arm(
        "b_metalm_others",
        "MetaLM, trained on products, tweets and news",
        "b_docked",
        1.7,
        trained_on="others",
        rate_of=metalm,
    )
    shuffled = arm(
        "b_shuffled",
        "MetaLM, trained on shuffled labels",
        "b_docked",
        1.7,
        trained_on="shuffled",
        rate_of=metalm,
    )
    return Claim(
        letter="b",
        title="One task, the decoder frozen",
        says=(
            "With the decoder frozen and only encoder and connector trained, MetaLM is better than a GPT "
            "that is trained as a whole."
        ),
        how=(
            "Sentiment of film reviews (mean ratings of VADER's raters). A small decoder is pretrained on "
            "the training side's texts, and in the end, with and without MiniLM, a real bidirectional "
            "encoder, docked, on the questions with answers drawn at random, too. "
            "Transfer: trained on the answers of product reviews, tweets and news, tested on films, whose "
            "texts are among those of pretraining, and at the learning rates that film reviews have chosen."
        ),
        paper=(("GPT, MNLI matched / mismatched", "87.7 / 87.6"), ("MetaLM", "91.1 / 91.0")),
        sets=("vader", "minilm"),
        shared=tuple(_shared(setting)),
        arms=(gpt, metalm, gpt_others, metalm_others, shuffled, random),
        comparisons=(
            Comparison("MetaLM above GPT", Series(metalm, "films"), Series(gpt, "films")),
            Comparison("MetaLM above random weights", Series(metalm, "films"), Series(random, "films")),
            Comparison(
                "MetaLM above GPT on a domain whose answers neither was trained on",
                Series(metalm_others, "films"),
                Series(gpt_others, "films"),
            ),
        ),
        chance=(ChanceCheck(Series(shuffled, "films"), SHARE_OF_POSITIVE),),
    )


def _task(setting: Setting, domain: str) -> Path:
    return setting.data / "vader/tasks" / f"vader_{domain}.yaml"


def _worded(setting: Setting, domain: str) -> Path:
    """The task with all but the answer encoded."""
    return setting.shared("b_tasks") / f"vader_{domain}.yaml"


def _encoder(setting: Setting, pretrained: str) -> str:
    """Where the encoder that is docked in a pretrained model came from."""
    folder = (
        setting.shared("random_encoder") if pretrained.endswith("random") else setting.data / "minilm/encoder"
    )
    return f"model.encoders.text.pretrained.path={folder}"


def _overrides(setting: Setting, pretrained: str, trained_on: str, held_out: str) -> tuple[str, ...]:
    start = setting.shared(pretrained)
    docked = (
        (f"initialize.encoders={start}", _encoder(setting, pretrained)) if pretrained != "b_without" else ()
    )
    return (
        f"initialize.decoder={start}",
        *docked,
        f"data.tokenizer={setting.shared('text_tokenizer')}",
        f"data.sources.tasks.path={setting.shared(f'{trained_on}_train')}",
        f"data.evaluation.tasks.path={setting.shared(f'{held_out}_validation')}",
        *setting.steps_on_gpu(STEPS_ON_GPU),
    )


def _shared(setting: Setting) -> Iterator[Job]:
    """Texts, tokenizer, pretrained models, and examples."""
    texts, worded = setting.shared("text.jsonl"), setting.shared("worded.jsonl")
    tokenizer, shards = setting.shared("text_tokenizer"), setting.shared("text_shards")
    tasks = [_task(setting, domain) for domain in DOMAINS]
    where = ("--data", setting.data)
    prepared = [
        tool("vary_task", "texts", *tasks, *where, "--out", texts),
        tool("vary_task", "worded", *tasks, *where, "--out", worded),
        tool("vary_task", "encoded", *tasks, "--out", setting.shared("b_tasks")),
        tool("train_tokenizer", texts, worded, "--vocab-size", 2048, "--out", tokenizer),
        tool("prepare_text", texts, "--tokenizer", tokenizer, "--processes", 1, "--out", shards),
    ]
    minilm = setting.data / "minilm/encoder"
    drawn = tool("randomise_encoder", minilm, "--out", setting.shared("random_encoder"))
    yield shared_job("text_shards", prepared, minutes=0.1)
    yield shared_job("random_encoder", [drawn])
    encoded = [_worded(setting, domain) for domain in DOMAINS]
    answers_drawn = setting.shuffled_examples("guessed_train", "guessed_tasks", encoded)
    yield shared_job("guessed_train", answers_drawn, "text_shards")
    data = (f"data.tokenizer={tokenizer}", f"data.sources.text.path={shards}")
    trained = setting.train("text", setting.shared("text"), 1, *data)
    yield shared_job("text", [trained], "text_shards", minutes=2.2)
    docking = (
        *data,
        f"data.sources.guessed.path={setting.shared('guessed_train')}",
        f"initialize.decoder={setting.shared('text')}",
    )
    needs = ("text", "guessed_train")
    without = setting.train("b_dock", setting.shared("b_without"), 1, *docking, *WITHOUT_ENCODER)
    yield shared_job("b_without", [without], *needs, minutes=0.4)
    docked = setting.train("b_dock", setting.shared("b_docked"), 1, *docking, _encoder(setting, "b_docked"))
    yield shared_job("b_docked", [docked], *needs, minutes=0.7)
    random = (_encoder(setting, "b_docked_random"), *TRAINED_AS_A_WHOLE)
    docked = setting.train("b_dock", setting.shared("b_docked_random"), 1, *docking, *random)
    yield shared_job("b_docked_random", [docked], *needs, "random_encoder", minutes=1.2)
    films, others = [_worded(setting, "films")], [_worded(setting, domain) for domain in OTHERS]
    for split in ("train", "validation"):
        yield shared_job(f"films_{split}", [setting.examples(f"films_{split}", films, split)], "text_shards")
        yield shared_job(
            f"others_{split}", [setting.examples(f"others_{split}", others, split)], "text_shards"
        )
    shuffled = setting.shuffled_examples("shuffled_train", "shuffled_task", films)
    yield shared_job("shuffled_train", shuffled, "text_shards")
