"""The mean work of a step: what its rows are expected to hold, from the config and some assumptions.

Documents of text fill a row (the most expensive case for attention). Of captions and examples the mean length
is assumed, and of examples how many images or clips they have, if an encoder reads them. Half of an example's
text is encoded, if an encoder reads that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from metalm.config import RunConfig
from metalm.config.model_schema import TEXT, EncoderConfig
from metalm.config.schema import SourceConfig
from metalm.model.flops import EncoderWork, Work
from metalm.objectives import build_objective


@dataclass(frozen=True)
class Assumed:
    """Means of what the data hold, where a plan is told no others."""

    caption_tokens: int = 24
    example_tokens: int = 128
    """Of the texts of an example, such as questions and answers, together."""
    example_media: int = 1
    """Images or clips of an example."""


USUAL = Assumed()


def source_rows(config: RunConfig, assumed: Assumed = USUAL) -> list[tuple[float, Work]]:
    """Of each source: its share of the rows, and the work of one."""
    sources = config.data.sources.values()
    objective = build_objective(config)
    rows = [objective.row_work(config, _source_row(config, source, assumed)) for source in sources]
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


def _source_row(config: RunConfig, source: SourceConfig, assumed: Assumed) -> Work:
    encoders, length = config.model.encoders, config.data.sequence_length
    readers = {modality: name for modality, name in source.readers.items() if name in encoders}
    busy = {name: EncoderWork(0.0, 0.0, 0.0) for name in encoders}
    if source.overflow is not None:
        return _row_of_examples(encoders, readers, length, assumed, busy)
    if media := [name for modality, name in readers.items() if modality != TEXT]:
        tokens = assumed.caption_tokens
        return _row_of_pairs(encoders[media[0]], media[0], readers.get(TEXT), length, tokens, busy)
    if TEXT in readers:
        busy[readers[TEXT]] = _text_spans(config)
    return Work(length, length * (length + 1) / 2, busy)


def _row_of_examples(
    encoders: Mapping[str, EncoderConfig],
    readers: Mapping[str, str],
    length: int,
    assumed: Assumed,
    busy: dict[str, EncoderWork],
) -> Work:
    media = next((name for modality, name in readers.items() if modality != TEXT), None)
    section = None if media is None else encoders[media].media
    patches = 0 if section is None else section.num_patches
    num_media = assumed.example_media
    size = min(num_media * patches + assumed.example_tokens + 2, length)
    count = length / size
    spans: dict[str, list[float]] = {name: [0.0] for name in readers.values()}  # elements of an example's
    if media is not None:
        spans[media] = [patches] * num_media
    if TEXT in readers:  # the text is encoded with the last image or clip, where one encoder reads both
        reader = readers[TEXT]
        spans[reader][-1] += min(assumed.example_tokens / 2, encoders[reader].max_text_positions)
    for name, sizes in spans.items():
        cut = count * num_media * patches if name == media else 0.0
        busy[name] = EncoderWork(count * sum(sizes), count * sum(one**2 for one in sizes), cut)
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
