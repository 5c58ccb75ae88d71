"""The model class of lm-evaluation-harness, asked in this process as the harness asks it."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conversion.cases import NEW_TOKENS, PROMPTS, pictures, prompt_images, prompt_text
from conversion.conftest import Workshop
from conversion.documents_by_reference import reference, scored_by_reference, training_document
from metalm.conversion.checkpoint_source import CheckpointSource, open_checkpoint
from metalm.conversion.export_answerer import ExportAnswerer
from metalm.conversion.harness_prompts import HarnessPrompts, image_files
from metalm.data.corpus import Corpus
from metalm.data.documents.chats import Medium, Turn, chat_example
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.row import Row, lay_out
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from metalm.errors import ConfigError, DataError
from metalm.modalities.image import decode_image, encode_png

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install '.[evaluation]'",
)
KIND = "deepnorm"


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


def test_generation_stops_at_the_texts_given(workshop: Workshop, tokenizer: Tokenizer) -> None:
    harness = harness_model(workshop)

    def answer(context: str, **how: Any) -> str:
        (found,) = harness.generate_until([asked("generate_until", context, how)], disable_tqdm=True)
        return found

    whole = answer("the quick", max_gen_toks=40, do_sample=False, temperature=0.7)
    end = whole[9:12]
    assert answer("the quick", until=["no such text", end], max_gen_toks=40) == whole[: whole.find(end)]
    assert whole.startswith(short := answer("the quick", until=end[0], max_new_tokens=2))
    assert len(short) < len(whole)
    inputs = workshop.processor(KIND)(text="<span>the quick</span>", return_tensors="pt")
    tokens = workshop.hf_model(KIND).generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=12)
    beams = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    assert answer("the quick", num_beams=3, max_gen_toks=12) == beams != whole[: len(beams)]
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(answer("the quick", do_sample=True, temperature=2.0, top_k=200, max_gen_toks=12))
    assert drawn[0] == drawn[1] != whole[: len(drawn[0])]
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


def chat_row(
    workshop: Workshop, said: list[tuple[str, list[str | int]]], *, encoded: bool
) -> tuple[Row, Example]:
    """The row that the class makes of a chat whose next turn is the model's, and the chat's example."""
    exported = workshop.exported(KIND)
    prompts = HarnessPrompts(ExportAnswerer(exported, batch_size=1, device="cpu"), encoded=encoded)
    pngs = [encode_png(pixels) for pixels in pictures()]
    messages = [
        {"role": role, "content": "".join(one if isinstance(one, str) else "<image>" for one in content)}
        for role, content in said
    ]
    images = [
        Image.open(io.BytesIO(pngs[one])) for _, content in said for one in content if isinstance(one, int)
    ]
    document = prompts.prompt(prompts.chat(messages), {"image": image_files(images)}).decoded(prompts.read)
    turns = [
        Turn(role, tuple(one if isinstance(one, str) else Medium("image", pngs[one]) for one in content))
        for role, content in [*said, ("assistant", ["x"])]
    ]
    tokenizer = open_checkpoint(workshop.run_folder(KIND)).tokenizer
    return lay_out([document], tokenizer), chat_example(turns).prompt()


@pytest.mark.parametrize("chat", CHATS)
def test_shots_as_turns_are_laid_out_as_a_training_row(workshop: Workshop, chat: str) -> None:
    found, example = chat_row(workshop, CHATS[chat], encoded=True)
    source = open_checkpoint(workshop.run_folder(KIND))
    expected = lay_out([training_document(source, *example.parts)], source.tokenizer)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert list(found.spans) == list(expected.spans)
    for name, spans in expected.spans.items():
        assert found.spans[name].bounds.tolist() == spans.bounds.tolist()
        assert found.spans[name].num_patches.tolist() == spans.num_patches.tolist()
        assert np.array_equal(found.spans[name].media, spans.media)


def test_turns_that_are_not_encoded_are_those_of_a_model_without_encoders(workshop: Workshop) -> None:
    found, example = chat_row(workshop, CHATS["text"], encoded=False)
    source = open_checkpoint(workshop.run_folder(KIND))
    made = Corpus(source.config).example_maker({}, overflow="split").make(example, is_open=True)
    expected = lay_out([made.document], source.tokenizer)
    assert not found.spans
    assert found.tokens.tolist() == expected.tokens.tolist()


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


def test_images_of_every_kind_become_files_that_training_reads(tmp_path: Path) -> None:
    pixels = pictures()[1]
    image, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    (tmp_path / "whole.png").write_bytes(encode_png(pixels))
    given = [image, encode_png(pixels), tmp_path / "whole.png", str(tmp_path / "turned.png")]
    files = image_files([*given, Image.open(tmp_path / "turned.png")])
    upright = np.rot90(pixels, -1)
    for file, expected in zip(files, [pixels, pixels, pixels, upright, upright], strict=True):
        assert np.array_equal(decode_image(file), expected)
    with pytest.raises(DataError, match="image .*/none.png cannot be read"):
        image_files(str(tmp_path / "none.png"))
    with pytest.raises(DataError, match="an image is a dict: PIL images, paths and bytes are read"):
        image_files([{}])


def test_what_does_not_fit_is_refused_by_name(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="2 processes"):
            HarnessModel(folder)
    damaged = {"visual": [encode_png(pictures()[0])[:-30]]}
    with pytest.raises(DataError, match="an image"):
        harness.loglikelihood([asked("loglikelihood", "the", " fox", damaged)], disable_tqdm=True)
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
