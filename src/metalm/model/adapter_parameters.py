"""How many parameters an adapter has, from the config alone."""

from __future__ import annotations

from metalm.config import DecoderConfig, EncoderConfig

_SPLIT_BY_ROWS = ("query_key_value", "feed_forward_in")
"""Maps of the decoder whose rows are split over tensor-parallel ranks; of the others the columns are."""


def count_decoder_adapter(config: DecoderConfig) -> tuple[int, int]:
    """Parameters that tensor parallelism splits, and those that it repeats."""
    sizes = _sizes(config).values()
    return config.num_layers * sum(s for s, _ in sizes), config.num_layers * sum(r for _, r in sizes)


def count_encoder_adapter(encoder: EncoderConfig) -> int:
    """Of an encoder of ours."""
    feed_forwards = sum(len(encoder.feed_forwards(number)) for number in range(encoder.num_layers))
    return sum(
        sum(size) * (feed_forwards if target.startswith("feed_forward") else encoder.num_layers)
        for target, size in _sizes(encoder).items()
    )


def encoder_adapter_layer(encoder: EncoderConfig) -> int:
    """What of the adapter of an encoder of ours one element passes in one layer: one of its feed-forwards."""
    return sum(map(sum, _sizes(encoder).values()))


def _sizes(config: DecoderConfig | EncoderConfig) -> dict[str, tuple[int, int]]:
    """By adapted map of one layer, the parameters that are split and repeated if it is tensor-parallel."""
    adapter = config.adapter
    if adapter is None:
        return {}
    hidden, wide = config.hidden_size, config.feed_forward_size
    queries, key_values = (
        heads * config.head_size for heads in (config.num_heads, 2 * config.key_value_heads)
    )
    maps = {
        "query_key_value": (queries + key_values, hidden),
        "attention_output": (hidden, queries),
        "feed_forward_in": (wide * (2 if config.is_gated else 1), hidden),
        "feed_forward_out": (hidden, wide),
    }
    sizes = {}
    for target in adapter.own_targets:
        rows, columns = maps[target]
        if adapter.kind == "ia3":
            sizes[target] = (key_values if target == "query_key_value" else columns, 0)
        else:
            split, whole = (rows, columns) if target in _SPLIT_BY_ROWS else (columns, rows)
            sizes[target] = (adapter.factor_rank * split, adapter.factor_rank * whole)
    return sizes
