"""Claim g (the authors' outlook): an encoder is added to a trained interface, which loses nothing of text."""

from __future__ import annotations

from metalm.reproduction.arms import Arm, Scoring, Setting
from metalm.reproduction.claim import Claim, Comparison, Series, jobs_for
from metalm.reproduction.claims.frozen_decoder import frozen_decoder
from metalm.reproduction.claims.questions_about_images import questions_about_images

START = "b_metalm/seed_1"
"""The job whose model the encoder is added to."""
EXAMPLES = ("f_train_10", "f_validation")
STEPS_ON_GPU = 2000


def added_encoder(setting: Setting) -> Claim:
    """The claim with its arms."""
    films = setting.shared("b_tasks") / "vader_films.yaml"
    images = setting.data / "easy-vqa/tasks/easy_vqa.yaml"
    text = Scoring("films", (films,), limit=500, readers="text=text")
    asked = Scoring("images", (images,), limit=500, readers="image=pairs,text=pairs")
    chosen_on = Scoring("validation", (images,), "validation", limit=200, readers="image=pairs,text=pairs")
    start = setting.out / START
    needs = (START, *(f"shared/{name}" for name in EXAMPLES))

    def arm(name: str, about: str, *more: str) -> Arm:
        return Arm(
            name,
            about,
            "g_add",
            (
                f"initialize.decoder={start}",
                f"initialize.encoders={start}",
                f"model.encoders.text.pretrained.path={setting.data / 'minilm/encoder'}",
                f"data.tokenizer={setting.shared('text_tokenizer')}",
                f"data.sources.tasks.path={setting.shared(EXAMPLES[0])}",
                f"data.evaluation.tasks.path={setting.shared(EXAMPLES[1])}",
                *more,
                *setting.steps_on_gpu(STEPS_ON_GPU),
            ),
            (text, asked),
            needs,
            rates=(1e-3, 3e-3),
            chosen_on=chosen_on,
            minutes=5.4,
        )

    added = arm("g_added", "an image encoder added, the rest as it was")
    tuned = arm(
        "g_tuned", "the same, but the decoder is trained on images, too", "model.decoder.trained_layers=all"
    )
    return Claim(
        letter="g",
        title="An encoder added to a trained interface",
        says="Encoders can be added to the interface over time (section 5).",
        how=(
            "A model of claim b, which judges film reviews, gets an encoder of images and questions that "
            "learns easy-VQA at 10% of its questions, with the rest frozen or the decoder trained. Film "
            "reviews are asked again afterwards."
        ),
        paper=(("none: the authors' outlook", ""),),
        sets=("vader", "minilm", "easy-vqa"),
        shared=jobs_for(needs, (frozen_decoder(setting), questions_about_images(setting)), setting),
        arms=(added, tuned),
        comparisons=(
            Comparison("text kept by adding, lost by tuning", Series(added, "films"), Series(tuned, "films")),
        ),
        reported=(Series(added, "images"), Series(tuned, "images")),
    )
