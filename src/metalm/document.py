"""Documents of parts: the contract between what is learnt from and how it is laid out.

Whatever the model learns from or is asked is a document: a list of parts, each with a reader (an encoder,
or none: the decoder reads it itself) and a weight (whether its tokens are trained on). Pretraining text is
one text of weight 1 of which random runs get a reader; a pair is an image and a prefix with a reader, and
the rest; a prompt is a document that is cut before its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from metalm.config.model_schema import TEXT

ReadPart = Callable[["Part"], np.ndarray]


@dataclass(frozen=True)
class Part:
    """A run of a document that one reader reads, of one modality."""

    modality: str
    tokens: np.ndarray
    """[n] int, what stands at its positions, for the position before each to predict: of text its ids in
    the tokenizer that decoder and shards share; of an image or clip `</s>`, once per vector."""
    reader: str | None = None
    """Name of the encoder; None: the decoder."""
    weight: float = 1.0
    """Of the losses of the positions that predict its tokens."""
    content: np.ndarray | bytes | memoryview | None = None
    """What the reader reads where that is not `tokens`: ids [n] of an encoder with a tokenizer of its own;
    of an image or clip the bytes of its file, and once it is decoded what the encoder is fed."""

    targets: np.ndarray | None = None
    """[n] int, what the positions before its tokens predict, where that is not its tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_media(self) -> bool:
        """Whether it is an image, a clip or the like: it then begins a span."""
        return self.modality != TEXT

    @property
    def is_decoded(self) -> bool:
        """Whether it can be laid out as it is."""
        return not isinstance(self.content, (bytes, memoryview))

    @property
    def decoded_content(self) -> np.ndarray:
        """What its encoder is fed, where that is not `tokens`."""
        assert isinstance(self.content, np.ndarray)
        return self.content


@dataclass(frozen=True)
class Document:
    """`<s>` parts `</d>`, or the stretch of one that stands in a row.

    Neighbouring parts of one encoder form one span, in which an image or clip comes first: another one begins
    the next span. Parts of no tokens are allowed; one of the decoder keeps the spans beside it apart.
    """

    parts: tuple[Part, ...]
    begins: bool = True
    """With `<s>`, rather than behind the stretch in the row before."""
    ends: bool = True
    """With `</d>`; its weight is that of the last part."""

    def __len__(self) -> int:
        return sum(map(len, self.parts)) + self.begins + self.ends

    @property
    def last_weight(self) -> float:
        """Of its last part, and of what follows that."""
        return self.parts[-1].weight if self.parts else 1.0

    def prompt(self, num_parts: int) -> Document:
        """The first parts of the document, left open for the decoder to go on."""
        return replace(self, parts=self.parts[:num_parts], ends=False)

    def cut(self, length: int) -> Document:
        """Its first `length` positions, less than all, left open for what follows in the next row.

        Where the cut lies between two parts, what follows is taken to have the weight of the first.
        """
        parts: list[Part] = []
        room = length - self.begins
        for part in self.parts:
            if room <= 0:
                break
            if len(part) > room:
                targets = None if part.targets is None else part.targets[:room]
                part = replace(part, tokens=part.tokens[:room], targets=targets)
            parts.append(part)
            room -= len(part)
        return replace(self, parts=tuple(parts), ends=False)

    def decoded(self, read: ReadPart) -> Document:
        """The document with its images and clips as their encoders are fed them.

        Raises:
            BadSample: one cannot be decoded.
        """
        if all(part.is_decoded for part in self.parts):
            return self
        parts = (part if part.is_decoded else replace(part, content=read(part)) for part in self.parts)
        return replace(self, parts=tuple(parts))
