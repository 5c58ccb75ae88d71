"""Documents with images that are longer than a row, in consecutive pieces that are not."""

from __future__ import annotations

from dataclasses import dataclass

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample

_SPECIAL = 2
"""`<s>` and `</d>` of every piece."""
_LETTERS_A_TOKEN = 16
"""More than most texts have."""


@dataclass(frozen=True)
class DocumentCutter:
    """Cuts between parts, and texts between words, or within a word that is longer than a piece.

    Nothing is lost but the blanks at the cuts.
    """

    tokenizer: Tokenizer
    positions: int
    """Of a piece, at most."""
    image_positions: int
    """Of an image: its vectors."""

    def cut(self, document: Example) -> list[Example]:
        """The pieces of a document, in their order.

        Raises:
            BadSample: `too_long`, an image or a single letter.
        """
        pieces: list[Example] = []
        parts: list[ExamplePart] = []
        room = whole = self.positions - _SPECIAL
        for part in document.parts:
            rest: ExamplePart | None = part
            while rest is not None:
                head, size, rest_after = self._head(rest, room, within_words=room == whole)
                if head is None:
                    if room == whole:
                        raise BadSample("too_long")
                    pieces.append(Example(tuple(parts)))
                    parts, room = [], whole
                    continue
                parts.append(head)
                room -= size
                rest = rest_after
        return [*pieces, Example(tuple(parts))] if parts else pieces

    def _head(
        self, part: ExamplePart, room: int, *, within_words: bool
    ) -> tuple[ExamplePart | None, int, ExamplePart | None]:
        """What of a part has room, its positions, and what is left of it."""
        if part.modality != TEXT:
            fits = self.image_positions <= room
            return (part if fits else None), self.image_positions, None
        assert isinstance(part.content, str)
        window, size = self._window(part.content, room)
        if size <= room:
            return part, size, None
        text = self._beginning(window, room, size, within_words=within_words)
        rest = part.content[len(text) :].strip()
        if not text.strip():
            return None, 0, part
        head = ExamplePart(text.rstrip(), is_trained=True)
        return head, self._size(text.rstrip()), ExamplePart(rest, is_trained=True) if rest else None

    def _window(self, text: str, room: int) -> tuple[str, int]:
        """A beginning of a text that has no room, with its tokens, or all of a text that has.

        A book is not tokenised anew for each of its pieces.
        """
        length = _LETTERS_A_TOKEN * max(room, 1)
        while (size := self._size(text[:length])) <= room and length < len(text):
            length *= 2
        return text[:length], size

    def _beginning(self, text: str, room: int, size: int, *, within_words: bool) -> str:
        """The longest beginning of a text of `size` tokens, to the end of a word, that has room.

        Args:
            within_words: where not even one word has, to any letter.
        """
        low, high = 0, min(len(text), 2 * len(text) * max(room, 0) // size + 16)
        while high - low > 1:
            middle = (low + high) // 2
            if self._size(text[:middle]) <= room:
                low = middle
            else:
                high = middle
        longest = low
        while low and not (text[low - 1].isspace() or text[low : low + 1].isspace()):
            low -= 1
        return text[:low] if text[:low].strip() or not within_words else text[:longest]

    def _size(self, text: str) -> int:
        return len(self.tokenizer.encode([text])[0])
