"""Examples: what task files and chats are rendered to, before their text is tokens and readers are known."""

from __future__ import annotations

from dataclasses import dataclass

from metalm.config.model_schema import TEXT


@dataclass(frozen=True)
class ExamplePart:
    """A text, an image or a clip of an example."""

    content: str | bytes | memoryview
    """Text, in which a blank line is the end-of-paragraph token `</s>`; of an image or a clip its file."""
    modality: str = TEXT
    is_encoded: bool = False
    """An encoder reads it, if the model has one for its modality. Images and clips always are."""
    is_trained: bool = False
    """Its tokens are learnt: answers, and with the last of them the end of the document."""
    is_end: bool = False
    """It is a blank line, `</s>`, behind an answer; the end of the document is learnt in its place."""
    suffix: str | None = None
    """Of an image or a clip that was checked and made ready for a shard: its member's. None: it was not."""


@dataclass(frozen=True)
class Example:
    """What becomes one document: parts in their order.

    Neighbouring encoded texts are one text, and encoded parts of one encoder one span; an image or a clip
    begins a new one. An encoded text that shall be a span of its own behind another stands behind an empty
    part that is not encoded.
    """

    parts: tuple[ExamplePart, ...]

    def prompt(self) -> Example:
        """The parts before the last ones that are trained on: what a model is given to find those."""
        end = len(self.parts)
        while end and not self.parts[end - 1].is_trained:
            end -= 1
        while end and self.parts[end - 1].is_trained:
            end -= 1
        return Example(self.parts[:end])
