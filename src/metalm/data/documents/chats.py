"""Chats to examples: the one place that says how turns follow each other.

    <s> [system, user] answer </s> [user] answer </d>          [...]: an encoder reads it

- What the system, the user and tools say is encoded, what the assistant says is trained on. Turns of one
  side that follow each other are one, with a blank line between them; so the system stands in front of the
  user.
- A turn with one image or clip begins with it, and its text follows as one. With several, each stands where
  it was, and texts between them are encoded by themselves. BLANKS around a text go.
- `</s>` stands behind an answer that is not the last. What is learnt in its place is `</d>`, so that answers
  end by `</d>` wherever they stand. Where the decoder reads the user's text itself, `</s>` stands behind
  that, too (see `ExampleMaker`).

The chat template of exported models (`conversion/chat_template.py`) lays messages out in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.tokenizer import BLANK_LINE
from metalm.errors import BadSample

BLANKS = " \t\r\n"

TrainedAnswers = Literal["all", "last"]

ASKING_ROLES = ("system", "developer", "user", "human", "tool", "function", "observation")
ANSWERING_ROLES = ("assistant", "gpt", "model", "chatgpt", "bot")


@dataclass(frozen=True)
class Medium:
    """An image or a clip of a turn."""

    modality: str
    content: bytes


Content = str | Medium


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    contents: tuple[Content, ...]
    is_trained: bool = True
    """Of an answer: whether it may be trained on."""


def chat_example(turns: Sequence[Turn], train: TrainedAnswers = "all") -> Example:
    """The example of a chat, up to the last answer that may be trained on.

    Args:
        train: on all answers that may be, or on the last one alone. Of several turns in a row that are one
            answer, all must be.

    Raises:
        BadSample: `unknown_role`, `media_in_answer`, `empty_answer` or `no_answer`.
    """
    sides = _sides(turns)
    while sides and not sides[-1].is_trained:
        sides.pop()
    if not sides:
        raise BadSample("no_answer")
    parts: list[ExamplePart] = []
    for number, side in enumerate(sides, start=1):
        is_last = number == len(sides)
        if not side.is_answer:
            parts += _asked(side.said)
            continue
        is_trained = side.is_trained and (is_last or train == "all")
        parts.append(ExamplePart(_answer(side.said), is_trained=is_trained))
        if not is_last:
            parts.append(ExamplePart(BLANK_LINE, is_end=is_trained))
    return Example(tuple(parts))


_Said = list[tuple[Content, ...]]
"""What one side says until the other does, by turn."""


@dataclass
class _Side:
    is_answer: bool
    is_trained: bool
    said: _Said


def _sides(turns: Sequence[Turn]) -> list[_Side]:
    """What is asked and what is answered, in turn."""
    sides: list[_Side] = []
    for turn in turns:
        is_answer = turn.role in ANSWERING_ROLES
        if not is_answer and turn.role not in ASKING_ROLES:
            raise BadSample("unknown_role")
        if not sides or sides[-1].is_answer != is_answer:
            sides.append(_Side(is_answer, is_answer, []))
        sides[-1].is_trained &= turn.is_trained
        sides[-1].said.append(turn.contents)
    return sides


def _answer(said: _Said) -> str:
    if any(isinstance(content, Medium) for contents in said for content in contents):
        raise BadSample("media_in_answer")
    (text,) = _runs(said) or [""]
    if not text:
        raise BadSample("empty_answer")
    assert isinstance(text, str)
    return text


def _asked(said: _Said) -> list[ExamplePart]:
    media = [content for contents in said for content in contents if isinstance(content, Medium)]
    runs: list[Content] = list(_runs(said))
    if len(media) == 1:
        texts: _Said = [tuple(one for one in contents if isinstance(one, str)) for contents in said]
        runs = [*media, *_runs(texts)]
    return [
        ExamplePart(run, TEXT, is_encoded=True)
        if isinstance(run, str)
        else ExamplePart(run.content, run.modality, is_encoded=True)
        for run in runs
    ]


def _runs(said: _Said) -> list[Content]:
    """Images and clips as they come, and what is said between them as one text without blanks around it."""
    runs: list[Content] = []
    for contents in said:
        begins = True
        for content in contents:
            if isinstance(content, Medium) or not runs or isinstance(runs[-1], Medium):
                runs.append(content)
            elif begins:
                runs[-1] = _joined(runs[-1], content)
            else:
                runs[-1] += content
            begins = begins and isinstance(content, str) and not content.strip(BLANKS)
    stripped = [run.strip(BLANKS) if isinstance(run, str) else run for run in runs]
    return [run for run in stripped if run]


def _joined(text: str, following: str) -> str:
    """With a blank line between two texts that are not blank."""
    if not text.strip(BLANKS) or not following.strip(BLANKS):
        return text + following
    return text.rstrip(BLANKS) + BLANK_LINE + following.lstrip(BLANKS)
