"""Messages through the exported chat template are the tokens that chats have in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from jinja2 import TemplateError

from conversion.cases import pictures, run_config
from conversion.conftest import Workshop
from metalm.config import RunConfig
from metalm.config.pretrained_folder import fill_in_pretrained
from metalm.config.schema import Overflow, SourceConfig
from metalm.conversion.generate import load_processor
from metalm.conversion.hf_config import write_configs
from metalm.conversion.tokenizer_files import write_tokenizer
from metalm.data.corpus import Corpus
from metalm.data.documents.chats import Medium, Turn, chat_example
from metalm.data.documents.example import Example
from metalm.data.row import Row, lay_out
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import BadSample
from metalm.modalities.boxes import box_text
from metalm.modalities.image import encode_png
from reference.encoder_tokenizer import save_tokenizer
from reference.pretrained import save_pretrained

READERS = {
    "apart": {"image": "vision", "text": "text"},
    "joint": {"image": "vision", "text": "vision"},
    "image alone": {"image": "vision"},
}
LONGEST = 6
WORDS = ["fox", "the dog", " ", "\n", "\n\n", "\n\n\n", " brown"]
TEXTS = strategies.lists(strategies.sampled_from(WORDS), max_size=4).map("".join)
PARTS = strategies.lists(TEXTS | strategies.integers(0, 2), max_size=4)
MESSAGES = strategies.lists(
    strategies.tuples(strategies.sampled_from(["system", "user", "tool"]), PARTS)
    | strategies.tuples(strategies.just("assistant"), TEXTS),
    max_size=6,
)

SIDES = strategies.lists(strategies.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted)
CORNERS = strategies.tuples(SIDES, SIDES).map(
    lambda sides: [sides[0][0] / 1000, sides[1][0] / 1000, sides[0][1] / 1000, sides[1][1] / 1000]
)


class Chats:
    """One assignment of readers: its exported processor, and its documents."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        config: RunConfig,
        readers: dict[str, str],
        overflow: Overflow = "split",
    ) -> None:
        data = config.data.model_copy(
            update={"sources": {"chats": SourceConfig(path=Path("x"), readers=readers, overflow=overflow)}}
        )
        encoders = {
            name: one.model_copy(update={"max_text_positions": LONGEST})
            for name, one in config.model.encoders.items()
        }
        model = config.model.model_copy(update={"encoders": encoders})
        self.config = config.model_copy(update={"data": data, "model": model})
        write_configs(self.config, tokenizer, torch.float32, folder)
        write_tokenizer(tokenizer, folder, 512)
        self.processor = load_processor(folder)
        self.tokenizer = tokenizer
        self.maker = Corpus(self.config).example_maker(readers, overflow=overflow)

    def row(self, example: Example) -> Row:
        document = self.maker.make(example, is_open=True).document
        return lay_out([document.decoded(self.maker.read)], self.tokenizer)

    def check(self, messages: list[dict[str, Any]], example: Example) -> None:
        """That they have the same tokens, spans and pictures."""
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
        images = [part["image"] for content in contents for part in content if part["type"] == "image"]
        inputs = self.processor(text=prompt, images=images or None)
        row = self.row(example)
        ids = inputs["input_ids"][0].numpy().copy()
        if "span_numbers" in inputs:
            docked = inputs["span_numbers"][0].numpy() > 0
            read = inputs["span_input_ids"][0].numpy()
            placeholder = self.tokenizer.paragraph_id
            own = [spans.ids for spans in row.spans.values() if spans.ids is not None]
            if own:
                assert (read[docked] - self.config.model.vocab_size).tolist() == np.concatenate(own).tolist()
                read = row.tokens
            ids[docked] = np.where(read == self.tokenizer.image_id, placeholder, read)[docked]
            numbers, encoders = (inputs[f"span_{name}"][0].numpy() for name in ("numbers", "encoders"))
            names = sorted(self.config.model.encoders)
            found = []
            for number in sorted(set(numbers[numbers > 0])):
                places = np.flatnonzero(numbers == number)
                found.append((names[encoders[places[0]] - 1], [places[0], places[-1] + 1]))
            expected = [(name, bounds) for name in row.spans for bounds in row.spans[name].bounds.tolist()]
            assert sorted(found, key=lambda one: one[1]) == sorted(expected, key=lambda one: one[1])
        else:
            assert not row.spans
        assert ids.tolist() == row.tokens.tolist()


@pytest.fixture(scope="module", params=READERS)
def chats(
    request: pytest.FixtureRequest, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Chats:
    folder = tmp_path_factory.mktemp("exported")
    config = run_config("deepnorm", workshop.tokenizer_folder)
    return Chats(folder, load_tokenizer(workshop.tokenizer_folder), config, READERS[request.param])


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(drawn=MESSAGES)
def test_any_chat_has_the_tokens_of_training(chats: Chats, drawn: list[tuple[str, Any]]) -> None:
    messages: list[dict[str, Any]] = []
    turns: list[Turn] = []
    for role, said in [*drawn, ("user", ["fox"]), ("assistant", "dog")]:
        if isinstance(said, str):
            messages.append({"role": role, "content": said})
            turns.append(Turn(role, (said,)))
            continue
        images = {n: pictures()[n] for n in said if isinstance(n, int)}
        content = [
            {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": images[one]}
            for one in said
        ]
        messages.append({"role": role, "content": content})
        contents = (one if isinstance(one, str) else Medium("image", encode_png(images[one])) for one in said)
        turns.append(Turn(role, tuple(contents)))
    try:
        example = chat_example(turns)
    except BadSample as bad:
        assert bad.cause == "empty_answer"
        return
    chats.check(messages, example)
    chats.check(messages[:-1], example.prompt())


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(asked=CORNERS, answered=CORNERS)
def test_boxes_have_the_tokens_of_training(chats: Chats, asked: list[float], answered: list[float]) -> None:
    texts = [box_text(corners) for corners in (asked, answered)]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "box", "box": asked}]},
        {"role": "assistant", "content": [{"type": "box", "box": answered}]},
        {"role": "user", "content": "fox"},
    ]
    turns = [Turn("user", ("the ", texts[0])), Turn("assistant", (texts[1],)), Turn("user", ("fox",))]
    chats.check(messages, chat_example([*turns, Turn("assistant", ("dog",))]).prompt())


@pytest.mark.parametrize("corners", [[0, 0, 1], [0.5, 0, 0.5, 1], [0, 0, 640, 480], [0, -0.5, 1, 1]])
def test_what_is_no_box_is_refused(chats: Chats, corners: list[float]) -> None:
    messages = [{"role": "user", "content": [{"type": "box", "box": corners}]}]
    with pytest.raises(TemplateError, match="a box is left, top, right and bottom"):
        chats.processor.apply_chat_template(messages, add_generation_prompt=True)


def test_boxes_of_answers_are_pixels_of_their_images(chats: Chats) -> None:
    answers = ["<box> 0 8 16 32 </box>", "a <box> 1 2 3 4 </box><box> 4 4 8 8 </box>", "<box> 1", "none"]
    process = chats.processor.post_process_boxes
    assert process(answers, target_sizes=[(64, 320), (32, 32), (1, 1), (1, 1)]) == [
        [(0, 16, 160, 64)],
        [(1, 2, 3, 4), (4, 4, 8, 8)],
        None,
        [],
    ]
    assert process(answers[0]) == [[(0, 0.25, 0.5, 1)]]
    with pytest.raises(ValueError, match="zip"):
        process(answers, target_sizes=[(64, 320)])


@pytest.mark.parametrize("overflow", ["split", "cut_left", "cut_right"])
@pytest.mark.parametrize("has_own_tokenizer", [False, True])
def test_texts_longer_than_the_encoder_go_where_they_go_in_training(
    workshop: Workshop, tmp_path: Path, overflow: Overflow, has_own_tokenizer: bool
) -> None:
    config = run_config("deepnorm", workshop.tokenizer_folder)
    if has_own_tokenizer:
        save_pretrained("bert", tmp_path / "bert")
        save_tokenizer(tmp_path / "bert")
        content = config.model_dump(mode="json")
        content["model"]["encoders"]["text"] = {"pretrained": {"path": str(tmp_path / "bert")}}
        fill_in_pretrained(content)
        config = RunConfig.model_validate(content)
    (tmp_path / "exported").mkdir()
    tokenizer = load_tokenizer(workshop.tokenizer_folder)
    chats = Chats(tmp_path / "exported", tokenizer, config, READERS["apart"], overflow)
    text = "the quick brown fox jumps over the lazy dog"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "fox"}]
    turns = [Turn(message["role"], (message["content"],)) for message in messages]
    chats.check(messages, chat_example(turns))


def test_what_a_chat_looks_like(workshop: Workshop, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "the"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "fox"}, {"type": "image", "image": pictures()[0]}],
        },
        {"role": "assistant", "content": "brown\n"},
        {"role": "user", "content": "dog"},
    ]
    expected = {
        "apart": "<image><span>the\n\nfox</span>brown\n\n<span>dog</span>",
        "joint": "<span><image>the\n\nfox</span>brown\n\n<span>dog</span>",
        "image alone": "<image>the\n\nfox\n\nbrown\n\ndog\n\n",
    }
    tokenizer = load_tokenizer(workshop.tokenizer_folder)
    config = run_config("deepnorm", workshop.tokenizer_folder)
    for name, prompt in expected.items():
        processor = Chats(tmp_path, tokenizer, config, READERS[name]).processor
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
