"""Conversations with an exported model: what was said is kept, and a mistake in a turn changes nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from metalm.conversion.generate import FolderModel, Hear, read_image
from metalm.data.documents.chats import BLANKS
from metalm.errors import ConfigError, DataError
from metalm.modalities import MEDIA
from metalm.modalities.boxes import boxes_in, pointed_at
from metalm.modalities.image import decode_image, encode_png

COMMANDS = {f"/{one.noun}": one.name for one in MEDIA.values()}
"""What a line begins with that names a file, `/image` and `/clip`, and the modality of that."""
FORGET_COMMAND = "/forget"


class Shown(NamedTuple):
    """An image or a clip."""

    modality: str
    path: Path


@dataclass
class Conversation:
    """What was said so far to a model, and what it answered."""

    model: FolderModel
    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def ask(
        self,
        text: str,
        media: Sequence[Shown] = (),
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        hear: Hear | None = None,
    ) -> str:
        """Say something, and hear the answer: see `FolderModel.generate`. An error leaves all as it was.

        Args:
            media: images and clips, which stand before the text.

        Raises:
            ConfigError: the conversation does not fit the model, or the model cannot go on from it.
            DataError: a file is missing, or is no image or clip.
        """
        said = {"type": "text", "text": self.model.escape(text.strip(BLANKS))}
        content = [*({"type": one.modality} for one in media), said]
        asked = [*self.messages, {"role": "user", "content": content}]
        shown = [*self.shown, *media]
        images, clips = ([one.path for one in shown if one.modality == name] for name in ("image", "audio"))
        try:
            answer = self.model.generate(
                self.model.chat_prompt(asked),
                images,
                clips,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                hear=hear,
            )
        except (RuntimeError, IndexError) as error:  # out of memory, or past the last position
            raise ConfigError(f"the model cannot go on from this: {error}") from error
        answered = {"role": "assistant", "content": self.model.escape(answer.strip(BLANKS))}
        self.messages, self.shown = [*asked, answered], shown
        return answer

    def pointed(self, answer: str) -> bytes | None:
        """The image that was shown last with the boxes of an answer, as PNG; None where there is none.

        Raises:
            DataError: its file is there no more.
        """
        boxes = boxes_in(answer)
        images = [one.path for one in self.shown if one.modality == "image"]
        if not boxes or not images:
            return None
        return encode_png(pointed_at(decode_image(read_image(images[-1])), boxes))

    def forget(self) -> None:
        """Begin anew."""
        self.messages, self.shown = [], []


def chat_with_folder(
    folder: Path,
    lines: Iterator[str],
    say: Callable[[str], None],
    *,
    hear: Hear | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device: str = "cpu",
    pictures: Path | None = None,
) -> None:
    """A conversation of several turns, until `lines` ends.

    Args:
        folder: the exported model.
        lines: a turn each; `/image PATH` and `/clip PATH` add to the next turn, `/forget` starts anew.
        say: is told each answer, and each mistake in a turn.
        hear: is told each answer in pieces as it is made, and `say` then nothing but its end, an empty text.
        max_new_tokens: per answer.
        temperature: above 0, sample.
        device: that the model runs on.
        pictures: folder for the images that answers point at, with their boxes; default: a temporary one.

    Raises:
        ConfigError: the folder is no exported model.
    """
    conversation = Conversation(FolderModel(folder, device))
    waiting: list[Shown] = []
    num_pictures = 0
    for line in lines:
        turn = line.strip()
        if turn == FORGET_COMMAND:
            conversation.forget()
            waiting = []
            continue
        command, _, named = turn.partition(" ")
        if command in COMMANDS:
            if path := _path(named):
                waiting.append(Shown(COMMANDS[command], path))
            else:
                say(f"error: {command} needs the path of a file behind it")
            continue
        if not turn and not waiting:
            continue
        try:
            answer = conversation.ask(
                turn, waiting, max_new_tokens=max_new_tokens, temperature=temperature, hear=hear
            )
            say(answer if hear is None else "")
            if (picture := conversation.pointed(answer)) is not None:
                pictures = pictures or Path(tempfile.mkdtemp(prefix="metalm-chat-"))
                num_pictures += 1
                say(f"picture: {_written(picture, pictures, num_pictures)}")
        except (ConfigError, DataError) as error:
            say(f"error: {error}")
        waiting = []


def _path(named: str) -> Path | None:
    """A path as it is typed, in quotes, with `~` or with backslashes before blanks; None: there is none."""
    named = named.strip()
    if len(named) > 1 and named[0] == named[-1] and named[0] in "'\"":
        named = named[1:-1]
    return Path(os.path.expanduser(named.replace("\\ ", " "))) if named else None  # noqa: PTH111


def _written(picture: bytes, folder: Path, number: int) -> Path:
    """
    Raises:
        ConfigError: the folder cannot be written to.
    """
    path = folder / f"{number}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return path
