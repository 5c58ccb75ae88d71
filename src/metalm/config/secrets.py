"""What may be shown of a config: the addresses of remote shards can hold passwords and signatures."""

from __future__ import annotations

import copy
from typing import Any

from metalm.config.schema import RunConfig
from metalm.shown_url import shown_url


def without_secrets(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, of each `url` only what names a place."""
    return redacted(config.model_dump(mode="json"))


def redacted(content: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a config, also of an older version, of each `url` only what names a place."""
    shown = copy.deepcopy(content)
    data = shown.get("data")
    for group in ("sources", "evaluation"):
        sources = data.get(group) if isinstance(data, dict) else None
        for source in sources.values() if isinstance(sources, dict) else ():
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                source["url"] = shown_url(source["url"])
    return shown
