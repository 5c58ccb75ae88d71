"""What may be shown of the address of remote shards, which can hold passwords and signatures."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit


def shown_url(template: str) -> str:
    """The `url` of a source without the user and the query of an address, or the words of a command."""
    if template.startswith("pipe:"):
        return "pipe:... {shard}"
    try:
        parts = urlsplit(template)
    except ValueError:  # it is no address, which the config's own check says
        return "..."
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def shown_override(override: str) -> str:
    """`section.key=value` without what may be secret: of a `url` as above, of what holds one nothing."""
    key, sign, value = override.partition("=")
    if key.endswith(".url"):
        return f"{key}{sign}{shown_url(value)}"
    return f"{key}{sign}..." if "://" in value or "pipe:" in value else override
