"""Chats become examples: what is encoded, what is trained on, and what stands between turns."""

from __future__ import annotations

import pytest

from metalm.data.documents.chats import Medium, Turn, chat_example
from metalm.data.documents.example import Example, ExamplePart
from metalm.errors import BadSample

IMAGE, OTHER = Medium("image", b"one"), Medium("image", b"two")


def said(example: Example) -> list[tuple[str, object]]:
    def kind(part: ExamplePart) -> str:
        flags = {"encoded": part.is_encoded, "trained": part.is_trained, "end": part.is_end}
        return " ".join(name for name, is_set in flags.items() if is_set) or "plain"

    return [(kind(part), part.content) for part in example.parts]


def test_questions_are_encoded_and_answers_trained() -> None:
    turns = [
        Turn("system", ("Be brief. ",)), Turn("user", (" What?\n",)), Turn("assistant", ("A fox.\n",)),
        Turn("user", ("And ", "this?")), Turn("gpt", ("A dog.",)), Turn("user", ("left out",)),
    ]  # fmt: skip
    asked = [("encoded", "Be brief.\n\nWhat?"), ("encoded", "And this?")]
    expected = [asked[0], ("trained", "A fox."), ("end", "\n\n"), asked[1], ("trained", "A dog.")]
    assert said(chat_example(turns)) == expected
    expected[1:3] = [("plain", "A fox."), ("plain", "\n\n")]
    assert said(chat_example(turns, "last")) == expected


def test_turns_of_one_side_are_one() -> None:
    turns = [
        Turn("user", ("a", " ")), Turn("user", ("",)), Turn("tool", (" ", "b ")),
        Turn("assistant", ("c",)), Turn("assistant", ("d",)),
    ]  # fmt: skip
    assert said(chat_example(turns)) == [("encoded", "a\n\nb"), ("trained", "c\n\nd")]


def test_one_image_leads_its_turn_and_several_stay_where_they_are() -> None:
    answer = Turn("assistant", ("c",))
    one = chat_example([Turn("system", ("s",)), Turn("user", ("a ", IMAGE, "\nb")), answer])
    assert said(one) == [("encoded", b"one"), ("encoded", "s\n\na \nb"), ("trained", "c")]
    two = chat_example([Turn("system", ("s",)), Turn("user", (IMAGE, " a ", OTHER, "b")), answer])
    texts = [("encoded", "s"), ("encoded", b"one"), ("encoded", "a"), ("encoded", b"two"), ("encoded", "b")]
    assert said(two) == [*texts, ("trained", "c")]
    assert [part.modality for part in two.parts] == ["text", "image", "text", "image", "text", "text"]


@pytest.mark.parametrize(
    ("turns", "cause"),
    [
        ([], "no_answer"),
        ([Turn("user", ("a",))], "no_answer"),
        ([Turn("user", ("a",)), Turn("assistant", (" \n",))], "empty_answer"),
        ([Turn("user", ("a",)), Turn("assistant", ("b", IMAGE))], "media_in_answer"),
        ([Turn("narrator", ("a",)), Turn("assistant", ("b",))], "unknown_role"),
    ],
)
def test_chats_that_cannot_be_used_have_a_cause(turns: list[Turn], cause: str) -> None:
    with pytest.raises(BadSample, match=cause):
        chat_example(turns)
