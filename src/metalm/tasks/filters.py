"""What values of fields go through by name, where a task file says `field|filter`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metalm.modalities.boxes import box_text


def _question(text: str) -> str:
    return text if text.endswith("?") else f"{text}?"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


FILTERS: dict[str, Callable[[Any], Any]] = {
    "breaks": lambda text: re.sub(r"<br\s*/?>", "\n", text),  # of HTML
    "escapes": lambda text: text.replace("\\n", "\n").replace('\\"', '"'),
    "spaces": lambda text: text.replace("_", " "),
    "ascii": lambda text: re.sub(r"[^\x00-\x7f]+", " ", text),
    "one_line": lambda text: " ".join(text.split()),
    "unbracketed": lambda text: " ".join(re.sub(r"\[.*?\]", " ", text).split()),
    "lower": str.lower,
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "upper_first": lambda text: text[:1].upper() + text[1:],
    "no_stop": lambda text: text.rstrip().rstrip("."),
    "question": _question,
    "sentence": _sentence,
    "hashes": lambda text: text.split("#"),
    "commas": lambda text: [part.strip() for part in text.split(",")],
    "digits12": lambda number: number.zfill(12),
    "no_last": lambda text: text.rpartition("-")[0],
}
"""Of texts, by name; of a list, each of its items goes through them."""

LIST_FILTERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda items: ", ".join(map(as_text, items)),
    "lines": lambda items: "\n".join(f"- {as_text(item)}" for item in items),
    "first": lambda items: items[0] if items else "",
    "keys": list,  # of a mapping
    "box": box_text,  # of left, top, right and bottom
    "boxes": lambda items: "".join(map(box_text, items)),
}
"""Of lists, and mappings, as a whole."""

NAMES = (*FILTERS, *LIST_FILTERS)


def as_text(value: Any) -> str:
    """A value as it stands in a text: `true`, `1`, nothing for null.

    Raises:
        ValueError: it is, or holds, a mapping, bytes or nan.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    if isinstance(value, (dict, bytes)) or value != value:
        raise ValueError(f"{repr(value)[:80]} is no text")
    return str(value)


def apply(filters: Iterable[str], value: Any, maps: Mapping[str, Mapping[str, str]]) -> Any:
    """A value through filters, those of a task's `maps` included.

    Raises:
        LookupError: a map has no such value.
        ValueError: a value is not of the kind that a filter takes.
    """
    for name in (name.strip() for name in filters):
        if name in LIST_FILTERS:
            if not isinstance(value, (list, dict)):
                raise ValueError(f"{name} is for lists, not for {value!r}")
            value = LIST_FILTERS[name](value)
        elif isinstance(value, list):
            value = [_apply_one(name, as_text(item), maps) for item in value]
        else:
            value = _apply_one(name, as_text(value), maps)
    return value


def _apply_one(name: str, text: str, maps: Mapping[str, Mapping[str, str]]) -> Any:
    if name in maps:
        if text not in maps[name]:
            raise LookupError(f"maps.{name} has no {text!r}")
        return maps[name][text]
    return FILTERS[name](text)
