"""lm-evaluation-harness, started as its users start it, on an exported folder and a task of this test."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import tomllib
from functools import cache, partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conversion.cases import NEW_TOKENS, PROMPTS, pictures, prompt_images, prompt_text
from conversion.conftest import Workshop
from distributed.ranks import run_command, run_program
from metalm.conversion.checkpoint_source import CheckpointSource, open_checkpoint
from metalm.conversion.export_answerer import ExportAnswerer
from metalm.conversion.harness_prompts import HarnessPrompts, image_files
from metalm.conversion.reference import reference_logits
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.documents.chats import Medium, Turn, chat_example
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.row import Row, lay_out
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from metalm.errors import ConfigError
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
    row = lay_out([Document((Part("text", ids),), ends=False)], source.tokenizer)
    batch = collate(
        [row],
        model_config=source.config.model,
        sequence_length=len(row.tokens),
        tp_size=1,
        pad_id=source.tokenizer.pad_id,
    )
    logits = reference_logits(source.config.model, partial(source.read, dtype=torch.float32), batch)[0]
    targets = torch.from_numpy(row.tokens[1 + num_given :].astype(np.int64))
    return float(logits[num_given:-1].log_softmax(-1).gather(1, targets[:, None]).sum())


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


def asked(kind: str, *arguments: Any) -> Any:
    """A request of the harness."""
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


@cache
def harness_model(workshop: Workshop, *, encoded: bool = True) -> Any:
    from metalm.conversion.evaluation_harness import HarnessModel

    return HarnessModel(
        str(workshop.exported(KIND)), encoded=encoded, batch_size=2, device="cpu", dtype="float32"
    )


def reference(source: CheckpointSource, document: Document) -> tuple[Row, torch.Tensor]:
    """A document's row, and the logits [tokens, vocabulary] of the checkpoint's own model."""
    row = lay_out([document], source.tokenizer)
    batch = collate(
        [row],
        model_config=source.config.model,
        sequence_length=len(row.tokens),
        tp_size=1,
        pad_id=source.tokenizer.pad_id,
    )
    return row, reference_logits(source.config.model, partial(source.read, dtype=torch.float32), batch)[0]


def scored_by_reference(source: CheckpointSource, document: Document) -> tuple[float, bool]:
    """The likelihood of what is weighted, and whether it is greedy, token after token."""
    row, logits = reference(source, document)
    total, is_greedy = 0.0, True
    for at in np.flatnonzero(row.loss_weights):
        token = int(row.tokens[at + 1])
        total += float(logits[at].log_softmax(-1)[token])
        is_greedy = is_greedy and int(logits[at].argmax()) == token
    return total, is_greedy


def training_document(source: CheckpointSource, *parts: ExamplePart) -> Document:
    """An open document as training makes it: texts longer than their encoder reads in several spans."""
    maker = Corpus(source.config).example_maker(
        {"image": "vision", "text": "vision" if any(one.modality == "image" for one in parts) else "text"},
        overflow="split",
    )
    return maker.make(Example(parts), is_open=True).document.decoded(maker.read)


def asked_and_answered(context: str, continuation: str) -> tuple[ExamplePart, ExamplePart]:
    """Blanks at the end of the context are the continuation's."""
    kept = context.rstrip()
    return (
        ExamplePart(kept, is_encoded=True),
        ExamplePart(context[len(kept) :] + continuation, is_trained=True),
    )


SENTENCE = "the quick brown fox jumps over the lazy dog. "
PAIRS = [
    ("the quick brown", " fox"),
    ("the quick brown fox jumps over the lazy dog. the quick brown fox\n\n", "jumps"),
    ("the lazy ", "dog"),
    ("", "the quick"),
]


def greedy_pair(source: CheckpointSource) -> tuple[str, str]:
    """A context that is encoded, and the text of the one token that the model finds most likely behind it."""
    for context in ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]:
        _, logits = reference(source, training_document(source, ExamplePart(context, is_encoded=True)))
        token = int(logits[-1].argmax())
        text = source.tokenizer.decode([token])
        if source.tokenizer.encode([text])[0].tolist() == [token]:
            return context, text
    raise AssertionError("no context is followed by a token of text")


def test_contexts_are_encoded_and_continuations_plain(workshop: Workshop) -> None:
    source = open_checkpoint(workshop.run_folder(KIND))
    pairs = [*PAIRS, greedy_pair(source)]
    answers = harness_model(workshop).loglikelihood(
        [asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True
    )
    for pair, (total, is_greedy) in zip(pairs, answers, strict=True):
        expected = scored_by_reference(source, training_document(source, *asked_and_answered(*pair)))
        assert (total, is_greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert [is_greedy for _, is_greedy in answers][-1:] == [True]


def test_without_encoding_it_is_as_hf(workshop: Workshop) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = harness_model(workshop, encoded=False)
    options = {"pretrained": str(workshop.exported(KIND)), "trust_remote_code": True, "dtype": "float32"}
    theirs = HFLM(**options, device="cpu", batch_size=2)
    pairs = [asked("loglikelihood", *pair) for pair in PAIRS]
    found, expected = (one.loglikelihood(pairs, disable_tqdm=True) for one in (ours, theirs))
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    how = {"until": ["\n"], "max_gen_toks": 9}
    prompts = [asked("generate_until", context, dict(how)) for context, _ in PAIRS if context]
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs.generate_until(
        prompts, disable_tqdm=True
    )
    theirs.add_bos_token = False
    texts = [asked("loglikelihood_rolling", text) for text in ("the quick brown fox", "over the lazy dog.")]
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4
    )


def test_every_token_of_a_long_text_counts_once(workshop: Workshop) -> None:
    text = SENTENCE * 18
    source = open_checkpoint(workshop.run_folder(KIND))
    (found,) = harness_model(workshop).loglikelihood_rolling([asked("loglikelihood_rolling", text)], True)
    longest = source.config.data.sequence_length
    ids = source.tokenizer.encode([text])[0]
    tokens = np.concatenate(([source.tokenizer.start_id], ids)).astype(np.int32)
    assert longest < len(ids) < 2 * longest - 2
    expected = 0.0
    for first, num_given in ((0, 1), (len(tokens) - longest, 2 * longest - len(tokens))):
        part = Part("text", tokens[first : first + longest])
        row, logits = reference(source, Document((part,), begins=False, ends=False))
        targets = torch.from_numpy(row.tokens[num_given:].astype(np.int64))
        expected += float(logits[num_given - 1 : -1].log_softmax(-1).gather(1, targets[:, None]).sum())
    assert found == pytest.approx(expected, abs=1e-3)


def test_marked_contexts_go_on_as_in_training(workshop: Workshop, tokenizer: Tokenizer) -> None:
    how = {"until": [], "max_gen_toks": NEW_TOKENS}
    requests = [
        asked("generate_until", f"<s>{prompt_text(parts)}", how, {"visual": images})
        for parts in PROMPTS.values()
        for images in [[Image.fromarray(pixels) for pixels in prompt_images(parts)]]
    ]
    greedy = workshop.training_model(KIND).greedy
    expected = [tokenizer.decode(greedy[name]) for name in PROMPTS]
    assert harness_model(workshop).generate_until(requests, disable_tqdm=True) == expected


def test_generation_stops_at_the_texts_given(workshop: Workshop) -> None:
    harness = harness_model(workshop)

    def answer(context: str, **how: Any) -> str:
        (found,) = harness.generate_until([asked("generate_until", context, how)], disable_tqdm=True)
        return found

    whole = answer("the quick", max_gen_toks=40, do_sample=False, temperature=0.7)
    end = whole[9:12]
    assert answer("the quick", until=["no such text", end], max_gen_toks=40) == whole[: whole.find(end)]
    assert whole.startswith(short := answer("the quick", until=end[0], max_new_tokens=2))
    assert len(short) < len(whole)
    beams = answer("the quick", num_beams=3, max_gen_toks=12)
    assert (
        answer("the quick", num_beams=3, max_gen_toks=12, until=beams[4:6]) == beams[: beams.find(beams[4:6])]
    )
    with pytest.raises(ConfigError, match="generation_kwargs has typical_p: metalm knows"):
        answer("the quick", typical_p=0.3)
    with pytest.raises(ConfigError, match="max_gen_toks is 128, the model has 128 positions"):
        answer("the quick", max_gen_toks=128)


CHATS: dict[str, list[tuple[str, list[str | int]]]] = {
    "text": [
        ("system", ["jumps over"]),
        ("user", ["the fox\\</d>"]),
        ("assistant", [" yes </span>"]),
        ("user", [" lazy <span> dog.\n"]),
        ("assistant", ["no"]),
        ("user", [SENTENCE * 2]),
    ],
    "images": [("user", ["the", 1, " fox"]), ("assistant", ["yes"]), ("user", [0, "b", 2, "lazy"])],
}


@pytest.mark.parametrize("chat", CHATS)
def test_shots_as_turns_are_laid_out_as_a_training_row(workshop: Workshop, chat: str) -> None:
    exported, source = workshop.exported(KIND), open_checkpoint(workshop.run_folder(KIND))
    prompts = HarnessPrompts(ExportAnswerer(exported, batch_size=1, device="cpu"), encoded=True)
    pngs = [encode_png(pixels) for pixels in pictures()]
    said = CHATS[chat]
    context = harness_model(workshop).apply_chat_template(
        [
            {"role": role, "content": "".join(one if isinstance(one, str) else "<image>" for one in content)}
            for role, content in said
        ]
    )
    images = [Image.open(io.BytesIO(pngs[one])) for _, content in said for one in content if one in (0, 1, 2)]
    document = prompts.prompt(context, image_files(images)).decoded(prompts.read)
    turns = [
        Turn(role, tuple(one if isinstance(one, str) else Medium("image", pngs[one]) for one in content))
        for role, content in said
    ]
    example = chat_example([*turns, Turn("assistant", ("x",))]).prompt()
    found, expected = (
        lay_out([one], source.tokenizer) for one in (document, training_document(source, *example.parts))
    )
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert list(found.spans) == list(expected.spans)
    for name, spans in expected.spans.items():
        assert found.spans[name].bounds.tolist() == spans.bounds.tolist()
        assert found.spans[name].num_patches.tolist() == spans.num_patches.tolist()
        assert np.array_equal(found.spans[name].media, spans.media)


def test_a_begun_answer_keeps_its_blanks(workshop: Workshop) -> None:
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps over "}]
    context = harness_model(workshop).apply_chat_template(messages, add_generation_prompt=False)
    assert context == "<s><span>the fox</span>jumps over "


def test_contexts_too_long_for_a_row_lose_their_beginning(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    harness, source = harness_model(workshop), open_checkpoint(workshop.run_folder(KIND))
    context, continuation = SENTENCE * 20, "fox"
    ids, answer = source.tokenizer.encode([context.rstrip(), " " + continuation])
    room, longest = source.config.data.sequence_length - 1 - len(answer), 12
    assert len(ids) > room
    parts = []
    for first in range(0, len(ids), longest):
        kept = ids[first : first + longest][max(len(ids) - room - first, 0) :]
        parts += [Part("text", kept[:0], weight=0.0), Part("text", kept, "text", weight=0.0)]
    expected, _ = scored_by_reference(source, Document((*parts, Part("text", answer)), ends=False))
    before = harness.get_model_info()["metalm_cut_contexts"]
    requests = [asked("loglikelihood", one, continuation) for one in ("the ", context)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    assert found[1][0] == pytest.approx(expected, abs=1e-4)
    assert harness.get_model_info()["metalm_cut_contexts"] == before + 1
    assert "1 context(s)" in caplog.text
    with pytest.raises(ConfigError, match="a continuation has 2[0-9]{2} tokens, which do not fit the 128"):
        harness.loglikelihood([asked("loglikelihood", "the", context)], disable_tqdm=True)


def test_what_does_not_fit_is_refused_by_name(workshop: Workshop) -> None:
    from metalm.conversion.evaluation_harness import HarnessModel

    folder, harness = str(workshop.exported(KIND)), harness_model(workshop)
    for options, message in (
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"encoded": "no"}, "encoded is 'no'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_length": 3}, "model_args has max_length"),
        ({"device": "gpu"}, "device 'gpu'"),
    ):
        with pytest.raises(ConfigError, match=message):
            HarnessModel(folder, **options)
    image = {"visual": [Image.fromarray(pictures()[0])]}
    for context, further, message in (
        ("<image> or <image>", [image], r"marks 2 image\(s\) by <image>, the task gives 1"),
        ("<s><span>the", [], "<span> has no counterpart"),
        ("<s>the</d>", [], "</d> is out of place"),
        ("<s><span:none>the</span>", [], "no encoder 'none'; the model has: text, vision"),
        ("the", [{"audio": [1]}], "clips"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness.loglikelihood([asked("loglikelihood", context, " fox", *further)], disable_tqdm=True)


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
