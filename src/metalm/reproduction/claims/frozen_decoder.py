"""Claim b (Table 3): a docked encoder finetunes a frozen decoder better than the decoder finetunes itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import ChanceCheck, Claim, Comparison, Series
from metalm.reproduction.jobs import Job, shared_job, tool

DOMAINS = ("films", "products", "tweets", "news")
OTHERS = DOMAINS[1:]
QUESTIONS = {"cpu": 1000, "gpu": 2019}
STEPS_ON_GPU = 600
"""About four epochs, instead of one."""
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
    gpt = Arm(
        "b_gpt",
        "GPT: the same decoder, all of it trained",
        "b_gpt",
        _paths(setting, "b_without", "films"),
        (tested,),
        _needs("b_without", "films"),
        rates=(3e-4, 1e-3, 3e-3),
        chosen_on=chosen_on,
        minutes=1.2,
    )
    metalm = Arm(
        "b_metalm",
        "MetaLM: decoder frozen, MiniLM docked, its last two layers and the connector trained",
        "b_metalm",
        _paths(setting, "b_docked", "films"),
        (tested,),
        _needs("b_docked", "films"),
        rates=(1e-4, 3e-4, 1e-3),
        chosen_on=chosen_on,
        minutes=3.0,
    )
    random = Arm(
        "b_random",
        "the same, but the encoder began with random weights, and all of it is trained",
        "b_random",
        _paths(setting, "b_docked_random", "films"),
        (tested,),
        _needs("b_docked_random", "films"),
        rates=(3e-4, 1e-3, 3e-3),
        chosen_on=chosen_on,
        minutes=5.0,
    )
    gpt_others = Arm(
        "b_gpt_others",
        "GPT, trained on products, tweets and news",
        "b_gpt",
        _paths(setting, "b_without", "others"),
        (tested,),
        _needs("b_without", "others"),
        rate_of=gpt,
        minutes=1.2,
    )
    metalm_others = Arm(
        "b_metalm_others",
        "MetaLM, trained on products, tweets and news",
        "b_metalm",
        _paths(setting, "b_docked", "others"),
        (tested,),
        _needs("b_docked", "others"),
        rate_of=metalm,
        minutes=3.0,
    )
    shuffled = Arm(
        "b_shuffled",
        "MetaLM, trained on shuffled labels",
        "b_metalm",
        _paths(setting, "b_docked", "shuffled"),
        (tested,),
        _needs("b_docked", "shuffled"),
        rate_of=metalm,
        minutes=3.0,
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
            "Transfer: trained on product reviews, tweets and news, tested on films."
        ),
        paper=(("GPT, MNLI matched / mismatched", "87.7 / 87.6"), ("MetaLM", "91.1 / 91.0")),
        sets=("vader", "minilm"),
        shared=tuple(_shared(setting)),
        arms=(gpt, metalm, gpt_others, metalm_others, shuffled, random),
        comparisons=(
            Comparison("MetaLM above GPT", Series(metalm, "films"), Series(gpt, "films")),
            Comparison("MetaLM above random weights", Series(metalm, "films"), Series(random, "films")),
            Comparison(
                "MetaLM above GPT on a domain that none of them has seen",
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


def _paths(setting: Setting, pretrained: str, trained_on: str) -> tuple[str, ...]:
    start = setting.shared(pretrained)
    held_out = "others" if trained_on == "others" else "films"
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


def _needs(pretrained: str, trained_on: str) -> tuple[str, ...]:
    held_out = "others" if trained_on == "others" else "films"
    return (f"shared/{pretrained}", f"shared/{trained_on}_train", f"shared/{held_out}_validation")


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
    yield shared_job("text_shards", prepared, minutes=0.5)
    yield shared_job("random_encoder", [drawn], minutes=0.2)
    guessed = setting.shared("guessed_tasks")
    answers_drawn = [
        tool("vary_task", "shuffled", *map(partial(_worded, setting), DOMAINS), *where, "--out", guessed),
        setting.examples("guessed_train", [guessed / task.name for task in tasks], "train", data=guessed),
    ]
    yield shared_job("guessed_train", answers_drawn, "text_shards")
    data = (f"data.tokenizer={tokenizer}", f"data.sources.text.path={shards}")
    trained = setting.train("text", setting.shared("text"), 1, *data)
    yield shared_job("text", [trained], "text_shards", minutes=4.5)
    docking = (
        *data,
        f"data.sources.guessed.path={setting.shared('guessed_train')}",
        f"initialize.decoder={setting.shared('text')}",
    )
    needs = ("text", "guessed_train")
    without = setting.train("b_dock", setting.shared("b_without"), 1, *docking, *WITHOUT_ENCODER)
    yield shared_job("b_without", [without], *needs, minutes=1.0)
    docked = setting.train("b_dock", setting.shared("b_docked"), 1, *docking, _encoder(setting, "b_docked"))
    yield shared_job("b_docked", [docked], *needs, minutes=2.0)
    random = (_encoder(setting, "b_docked_random"), *TRAINED_AS_A_WHOLE)
    docked = setting.train("b_dock", setting.shared("b_docked_random"), 1, *docking, *random)
    yield shared_job("b_docked_random", [docked], *needs, "random_encoder", minutes=3.0)
    films, others = [_worded(setting, "films")], [_worded(setting, domain) for domain in OTHERS]
    for split in ("train", "validation"):
        yield shared_job(f"films_{split}", [setting.examples(f"films_{split}", films, split)], "text_shards")
        yield shared_job(
            f"others_{split}", [setting.examples(f"others_{split}", others, split)], "text_shards"
        )
    mixed = setting.shared("shuffled_task")
    shuffled = [
        tool("vary_task", "shuffled", *films, *where, "--out", mixed),
        setting.examples("shuffled_train", [mixed / films[0].name], "train", data=mixed),
    ]
    yield shared_job("shuffled_train", shuffled, "text_shards")
