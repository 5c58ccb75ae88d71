"""Conversations with an exported model: what was said is kept, and a mistake in a turn changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalm.conversion.generate import FolderModel, Hear
from metalm.data.documents.chats import BLANKS
from metalm.errors import ConfigError, DataError

IMAGE_COMMAND = "/image "
FORGET_COMMAND = "/forget"


@dataclass
class Conversation:
    """What was said so far to a model, and what it answered."""

    model: FolderModel
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def ask(
        self,
        text: str,
        images: Sequence[Path] = (),
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        hear: Hear | None = None,
    ) -> str:
        """Say something, and hear the answer: see `FolderModel.generate`. An error leaves all as it was.

        Raises:
            ConfigError: the conversation does not fit the model, or the model cannot go on from it.
            DataError: an image file is missing or is no image.
        """
        said = {"type": "text", "text": self.model.escape(text.strip(BLANKS))}
        content = [*({"type": "image"} for _ in images), said]
        asked = [*self.messages, {"role": "user", "content": content}]
        shown = [*self.images, *images]
        try:
            answer = self.model.generate(
                self.model.chat_prompt(asked),
                shown,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                hear=hear,
            )
        except (RuntimeError, IndexError) as error:  # out of memory, or past the last position
            raise ConfigError(f"the model cannot go on from this: {error}") from error
        answered = {"role": "assistant", "content": self.model.escape(answer.strip(BLANKS))}
        self.messages, self.images = [*asked, answered], shown
        return answer

    def forget(self) -> None:
        """Begin anew."""
        self.messages, self.images = [], []


def chat_with_folder(
    folder: Path,
    lines: Iterator[str],
    say: Callable[[str], None],
    *,
    hear: Hear | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device: str = "cpu",
) -> None:
    """A conversation of several turns, until `lines` ends.

    Args:
        folder: the exported model.
        lines: a turn each; `/image PATH` adds an image to the next turn, `/forget` starts anew.
        say: is told each answer, and each mistake in a turn.
        hear: is told each answer in pieces as it is made, and `say` then nothing but its end, an empty text.
        max_new_tokens: per answer.
        temperature: above 0, sample.
        device: that the model runs on.

    Raises:
        ConfigError: the folder is no exported model.
    """
    conversation = Conversation(FolderModel(folder, device))
    waiting: list[Path] = []
    for line in lines:
        turn = line.strip()
        if turn == FORGET_COMMAND:
            conversation.forget()
            waiting = []
            continue
        if turn.startswith(IMAGE_COMMAND):
            waiting.append(Path(turn.removeprefix(IMAGE_COMMAND).strip()))
            continue
        if not turn and not waiting:
            continue
        try:
            answer = conversation.ask(
                turn, waiting, max_new_tokens=max_new_tokens, temperature=temperature, hear=hear
            )
            say(answer if hear is None else "")
        except (ConfigError, DataError) as error:
            say(f"error: {error}")
        waiting = []
