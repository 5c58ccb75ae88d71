"""lm-evaluation-harness, started as its users start it, on an exported folder and a task of this test."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conversion.cases import PROMPTS, pictures, prompt_text
from conversion.conftest import Workshop
from conversion.documents_by_reference import scored_by_reference, training_document
from distributed.ranks import run_command, run_program
from metalm.conversion.checkpoint_source import CheckpointSource, open_checkpoint
from metalm.data.documents.example import ExamplePart
from metalm.document import Document, Part
from metalm.modalities.image import encode_png

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install '.[evaluation]'",
)
REPOSITORY = Path(__file__).parents[2]
KIND = "deepnorm"
QUESTIONS = [
    ("the quick brown", [" fox", " dog", " fox jumps over the lazy dog."]),
    ("the quick brown fox\n\njumps", [" over", " lazy the"]),
]
CHOICE_TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING_TASK = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: context
metric_list: [{{metric: byte_perplexity}}]
"""
PICTURE_TASK = """
task: pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/images.jsonl}}}}
test_split: test
output_type: multiple_choice
num_fewshot: 0
doc_to_image: !function images.open_images
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
IMAGE_TASK = """
task: images
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/images.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_image: !function images.open_images
doc_to_text: prompt
doc_to_target: ""
generation_kwargs: {{until: ["</d>"], do_sample: false, max_gen_toks: 64}}
metric_list: [{{metric: exact_match}}]
"""
OPEN_IMAGES = """
from PIL import Image


def open_images(doc):
    return [Image.open(path) for path in doc["images"]]
"""


def evaluate(
    model: str, exported: Path, folder: Path, tasks: str, *options: str
) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task, in the order of its questions."""
    words = ["--model", model, "--tasks", tasks, "--batch_size", "2", "--device", "cpu", *options]
    words += ["--model_args", f"pretrained={exported},trust_remote_code=True,dtype=float32"]
    words += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    if model == "metalm":
        tool = REPOSITORY / "tools" / "evaluate_harness.py"
        code, output = run_program([str(tool), *words], timeout_s=280, **offline)
    else:
        code, output = run_command([sys.executable, "-m", "lm_eval", *words], timeout_s=280, **offline)
    assert code == 0, output[-4000:]
    samples = {}
    for task in tasks.split(","):
        (path,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        found = [json.loads(line) for line in path.read_text().splitlines()]
        samples[task] = sorted(found, key=lambda sample: sample["doc_id"])
    return samples


def log_likelihood(source: CheckpointSource, ids: np.ndarray, num_given: int) -> float:
    """Of all tokens behind the first `num_given` and `<s>`, by the checkpoint's own model."""
    parts = (Part("text", ids[:num_given], weight=0.0), Part("text", ids[num_given:]))
    return scored_by_reference(source, Document(parts, ends=False))[0]


def test_log_likelihoods_are_the_checkpoints(workshop: Workshop, tmp_path: Path) -> None:
    docs = [{"context": context, "choices": choices, "answer": 0} for context, choices in QUESTIONS]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "choices.yaml").write_text(CHOICE_TASK.format(folder=tmp_path))
    (tmp_path / "rolling.yaml").write_text(ROLLING_TASK.format(folder=tmp_path))
    samples = evaluate("hf", workshop.exported(KIND), tmp_path, "choices,rolling")
    source = open_checkpoint(workshop.run_folder(KIND))
    start, encode = source.tokenizer.start_id, lambda text: source.tokenizer.encode([text])[0]
    for (context, choices), sample in zip(QUESTIONS, samples["choices"], strict=True):
        given = len(encode(context))
        expected = [log_likelihood(source, encode(context + choice), given) for choice in choices]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-3)
    for (context, _), sample in zip(QUESTIONS, samples["rolling"], strict=True):
        # The harness begins with `<s>` itself, before what the tokenizer gives, and counts the second.
        expected = log_likelihood(source, np.concatenate(([start], encode(context))), 0)
        assert float(np.ravel(sample["resps"])[0]) == pytest.approx(expected, abs=1e-3)


def test_answers_to_images_are_the_training_models(workshop: Workshop, tokenizer, tmp_path: Path) -> None:
    names = ("image", "image and prefix", "images and spans")
    paths = []
    for number, pixels in enumerate(pictures()):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    docs = [
        {
            "prompt": prompt_text(PROMPTS[name]),
            "images": [paths[part.image] for part in PROMPTS[name] if part.image is not None],
        }
        for name in names
    ]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "images.yaml").write_text(IMAGE_TASK.format(folder=tmp_path))
    (tmp_path / "images.py").write_text(OPEN_IMAGES)
    samples = evaluate("hf-multimodal", workshop.exported(KIND), tmp_path, "images")["images"]
    greedy = workshop.training_model(KIND).greedy
    for name, sample in zip(names, samples, strict=True):
        assert sample["resps"][0][0] == tokenizer.decode(greedy[name])


def test_the_class_is_found_by_its_entry_point() -> None:
    from lm_eval.api.registry import get_model

    from metalm.conversion.evaluation_harness import HarnessModel

    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
    (point,) = (EntryPoint(*one, "lm_eval.models") for one in declared["lm_eval.models"].items())
    assert point.name == "metalm"
    assert point.load() is HarnessModel is get_model("metalm")


def test_tasks_run_with_turns_and_images(workshop: Workshop, tmp_path: Path) -> None:
    docs = [{"context": context, "choices": choices, "answer": 0} for context, choices in QUESTIONS]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    Image.fromarray(pictures()[1]).save(tmp_path / "1.png")
    doc = {"prompt": "<image>the fox", "images": [str(tmp_path / "1.png")], "choices": ["jumps", "dog"]}
    (tmp_path / "images.jsonl").write_text(json.dumps({**doc, "answer": 1}) + "\n")
    (tmp_path / "images.py").write_text(OPEN_IMAGES)
    for name, content in (("choices", CHOICE_TASK), ("pictures", PICTURE_TASK)):
        (tmp_path / f"{name}.yaml").write_text(content.format(folder=tmp_path))
    samples = evaluate(
        "metalm",
        workshop.exported(KIND),
        tmp_path,
        "choices,pictures",
        *("--apply_chat_template", "--fewshot_as_multiturn", "--num_fewshot", "1"),
    )
    source = open_checkpoint(workshop.run_folder(KIND))
    for sample, (context, choices) in zip(samples["choices"], QUESTIONS, strict=True):
        given = sample["arguments"]["gen_args_0"]["arg_0"]
        shown = re.fullmatch(r"<s><span>(.*?)</span>(.*?)\n\n<span>(.*?)</span>", given, re.DOTALL)
        assert shown is not None and shown[3] == context
        before = (ExamplePart(shown[1], is_encoded=True), ExamplePart(shown[2]), ExamplePart("\n\n"))
        expected = [
            scored_by_reference(
                source,
                training_document(
                    source,
                    *before,
                    ExamplePart(context, is_encoded=True),
                    ExamplePart(choice, is_trained=True),
                ),
            )[0]
            for choice in choices
        ]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-4)
    (sample,) = samples["pictures"]
    image = ExamplePart(encode_png(pictures()[1]), "image", is_encoded=True)
    expected = [
        scored_by_reference(
            source,
            training_document(
                source, image, ExamplePart("the fox", is_encoded=True), ExamplePart(choice, is_trained=True)
            ),
        )[0]
        for choice in doc["choices"]
    ]
    assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(expected, abs=1e-4)
