"""The mean work of a step: what its rows are expected to hold, from the config and three assumptions.

Documents of text fill a row (the most expensive case for attention), captions have a given mean length, and
examples have one image or clip, if an encoder reads them, and a text of which half is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping

from metalm.config import RunConfig
from metalm.config.model_schema import TEXT, EncoderConfig
from metalm.config.schema import SourceConfig
from metalm.model.flops import EncoderWork, Work
from metalm.objectives import build_objective

CAPTION_TOKENS = 24
"""Assumed mean length of a caption, where a plan is given no other."""

EXAMPLE_TOKENS = 128
"""Assumed mean length of the texts of an example, questions and answers together."""


def source_rows(config: RunConfig, caption_tokens: int = CAPTION_TOKENS) -> list[tuple[float, Work]]:
    """Of each source: its share of the rows, and the work of one."""
    sources = config.data.sources.values()
    objective = build_objective(config)
    rows = [objective.row_work(config, _source_row(config, source, caption_tokens)) for source in sources]
    weights = [source.weight for source in sources]
    if config.data.mixture_unit == "tokens":
        weights = [weight / row.positions for weight, row in zip(weights, rows, strict=True)]
    return [(weight / sum(weights), row) for weight, row in zip(weights, rows, strict=True)]


def mean_row(config: RunConfig, rows: list[tuple[float, Work]]) -> Work:
    """The mean of what `source_rows` gives."""
    encoders = {
        name: EncoderWork(
            *(
                sum(share * getattr(row.encoders[name], field) for share, row in rows)
                for field in ("elements", "pairs", "patches")
            )
        )
        for name in config.model.encoders
    }
    positions = sum(share * row.positions for share, row in rows)
    pairs = sum(share * row.pairs for share, row in rows)
    return Work(positions, pairs, encoders)


def scaled(work: Work, factor: float) -> Work:
    """The work of so many rows."""
    encoders = {
        name: EncoderWork(part.elements * factor, part.pairs * factor, part.patches * factor)
        for name, part in work.encoders.items()
    }
    return Work(work.positions * factor, work.pairs * factor, encoders)


def _source_row(config: RunConfig, source: SourceConfig, caption_tokens: int) -> Work:
    encoders, length = config.model.encoders, config.data.sequence_length
    readers = {modality: name for modality, name in source.readers.items() if name in encoders}
    busy = {name: EncoderWork(0.0, 0.0, 0.0) for name in encoders}
    if source.overflow is not None:
        return _row_of_examples(encoders, readers, length, busy)
    if media := [name for modality, name in readers.items() if modality != TEXT]:
        return _row_of_pairs(encoders[media[0]], media[0], readers.get(TEXT), length, caption_tokens, busy)
    if TEXT in readers:
        busy[readers[TEXT]] = _text_spans(config)
    return Work(length, length * (length + 1) / 2, busy)


def _row_of_examples(
    encoders: Mapping[str, EncoderConfig],
    readers: Mapping[str, str],
    length: int,
    busy: dict[str, EncoderWork],
) -> Work:
    media = next((name for modality, name in readers.items() if modality != TEXT), None)
    section = None if media is None else encoders[media].media
    patches = 0 if section is None else section.num_patches
    size = min(patches + EXAMPLE_TOKENS + 2, length)
    count = length / size
    asked = {name: 0.0 for name in readers.values()}  # elements of one span
    if TEXT in readers:
        reader = readers[TEXT]
        asked[reader] += min(EXAMPLE_TOKENS / 2, encoders[reader].max_text_positions)
    if media is not None:
        asked[media] += patches
    for name, span in asked.items():
        busy[name] = EncoderWork(count * span, count * span**2, count * patches if name == media else 0.0)
    return Work(length, count * size * (size + 1) / 2, busy)


def _text_spans(config: RunConfig) -> EncoderWork:
    spans = config.data.spans
    elements = spans.fraction * config.data.sequence_length
    return EncoderWork(
        elements, elements * (min(spans.min_length + 1, spans.max_length) + spans.max_length) / 2, 0.0
    )


def _row_of_pairs(
    encoder: EncoderConfig,
    name: str,
    text_reader: str | None,
    length: int,
    caption_tokens: int,
    busy: dict[str, EncoderWork],
) -> Work:
    """Of pairs whose prefix is encoded together with the image or clip, or not at all."""
    assert encoder.media is not None
    patches = encoder.media.num_patches
    size = min(patches + caption_tokens + 2, length)
    count = length // size
    prefix = min((caption_tokens - 1) / 2, encoder.max_text_positions) if text_reader == name else 0.0
    span = patches + prefix
    busy[name] = EncoderWork(count * span, count * span**2, count * patches)
    return Work(count * size, count * size * (size + 1) / 2, busy)
