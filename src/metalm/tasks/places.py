"""Where a value stands in a record: `question.choices.*.text`."""

from __future__ import annotations

from typing import Any, Final

NOTHING: Final = object()
"""There is no such place."""


def values_at(content: Any, place: str) -> Any:
    """What stands at a place of nested lists and mappings; `*` makes a list of what stands at all of one.

    A key that holds dots is found whole first.

    Returns:
        `NOTHING` where a key or an index is not there.
    """
    if isinstance(content, dict) and place in content:
        return content[place]
    key, _, rest = place.partition(".")
    if key == "*":
        if not isinstance(content, (list, dict)):
            return NOTHING
        items = content if isinstance(content, list) else list(content.values())
        found = [values_at(item, rest) for item in items] if rest else list(items)
        return NOTHING if any(item is NOTHING for item in found) else found
    if isinstance(content, dict):
        inner = content.get(key, NOTHING)
    elif isinstance(content, list) and key.isdecimal() and int(key) < len(content):
        inner = content[int(key)]
    else:
        return NOTHING
    return values_at(inner, rest) if rest and inner is not NOTHING else inner
