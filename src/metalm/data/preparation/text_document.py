"""Documents of a corpus: what they are made of, and why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from metalm.data.preparation.tally import Place

UNKNOWN_SUBSET = "unknown"
"""Of documents without a name of one."""
MAX_TEXT_BYTES = 256 << 20
"""A longer document is skipped: it would have to be held in memory whole."""


@dataclass(frozen=True)
class Document:
    """One document of a corpus."""

    text: str
    subset: str
    num_bytes: int
    """Of the text in UTF-8."""


class TextRecord(NamedTuple):
    """A record of a file, be it a document or not."""

    key: int
    """What its sample is named by: its offset or number in the file."""
    place: Place
    document: Document | str | None
    """Or why there is none; None: nothing stands there."""
    share: float
    """How much of the stretch has been read; of a file that is read from its beginning, of the file."""


@dataclass(frozen=True)
class TextFields:
    """Where records have what documents are made of: keys or columns; a dot stands before one within one."""

    text: str = "text"
    subset: str = "meta.pile_set_name"

    def document_of(self, record: Any) -> Document | str:
        """The document of a record, or why there is none, as it is counted."""
        return make_document(value_at(record, self.text), value_at(record, self.subset))


PILE_FIELDS = TextFields()
"""Where the Pile has them."""


def value_at(record: Any, path: str) -> Any:
    """What a record has at a path such as `meta.pile_set_name`, or by that whole name; None: nothing."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def make_document(text: Any, subset: Any) -> Document | str:
    """The document of a text, or why there is none."""
    if not isinstance(text, str):
        return "missing_text"
    if not text.strip():
        return "empty_text"
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError:  # an escaped half of a surrogate pair
        return "invalid_unicode"
    return Document(text, subset if isinstance(subset, str) else UNKNOWN_SUBSET, num_bytes)
