"""What makes whole documents of the samples of a source: pairs and examples are two ways of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from metalm.data.sources import Source
from metalm.data.storage.index import SampleLocation
from metalm.document import Document, Part

NUM_DRAWS = 2
"""Random numbers in [0, 1) that a document may depend on."""


class Made(NamedTuple):
    """A document that is not decoded yet, and what was left out of it."""

    document: Document
    truncated_captions: int = 0
    overflowed_tokens: int = 0
    """Of texts longer than their encoder reads."""


class DocumentMaker(Protocol):
    """Makes documents that are not cut. What `look` returns waits for its row as it is read again."""

    @property
    def max_vectors(self) -> int:
        """Positions of the largest image or clip; 0: there is none."""
        ...

    def look(self, source: Source, location: SampleLocation) -> Any:
        """What is read of a sample, for `finish`.

        Args:
            source: the one that it makes documents of, open for a lane.

        Raises:
            BadSample: it cannot be used.
        """
        ...

    def finish(self, seen: Any, draws: Sequence[float]) -> Made:
        """The document of what `look` returned.

        Args:
            draws: NUM_DRAWS random numbers in [0, 1); zeros for a held-out sample.
        """
        ...

    def read(self, part: Part) -> np.ndarray:
        """An image or a clip as its encoder is fed it: see `Document.decoded`.

        Raises:
            BadSample: it cannot be decoded.
        """
        ...
