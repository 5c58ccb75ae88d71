"""Rows to the inputs of the shipped model, which says by span tensors what its encoders read and where.

The processor comes to the same inputs from marked prompts; here they come from what training lays out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalm.config.model_schema import EncoderConfig
from metalm.data.row import Row
from metalm.modalities import Media, modality_of_encoder


def model_inputs(
    rows: Sequence[Row], config: Any, encoders: Mapping[str, EncoderConfig]
) -> dict[str, Tensor]:
    """Inputs of rows of one document each, padded on the left as generation wants it.

    Args:
        rows: open, of parts that the model's encoders read.
        config: `MetaLMConfig` of the model.
        encoders: what its encoders read, by name.

    Returns:
        `input_ids` and `attention_mask` [B, S] int64, the span tensors where there are spans, and where there
        are images or clips what their encoders are fed, float32, row after row: see `Media.exported_media`.
    """
    longest = max(len(row.tokens) for row in rows)
    names = list(config.encoders)
    columns = {
        name: np.zeros((len(rows), longest), np.int64)
        for name in ("input_ids", "attention_mask", "span_input_ids", "span_encoders", "span_numbers")
    }
    columns["input_ids"][:] = config.pad_token_id
    media: dict[str, list[np.ndarray]] = {}
    for b, row in enumerate(rows):
        first = longest - len(row.tokens)
        columns["input_ids"][b, first:] = row.tokens
        columns["attention_mask"][b, first:] = 1
        of_row: list[tuple[int, str, np.ndarray]] = []  # where an image or clip begins, and what is fed
        spans = sorted(
            (int(start), int(end), name, number)
            for name, found in row.spans.items()
            for number, (start, end) in enumerate(found.bounds)
        )
        for span_number, (start, end, name, number) in enumerate(spans, start=1):
            place = slice(first + start, first + end)
            read = _read_by(row, name, number, config)
            columns["input_ids"][b, place] = config.image_token_id
            columns["span_input_ids"][b, place] = read
            columns["span_encoders"][b, place] = names.index(name) + 1
            columns["span_numbers"][b, place] = span_number
        for name, found in row.spans.items():
            if found.media is not None:
                modality = modality_of_encoder(encoders[name])
                assert isinstance(modality, Media)
                starts = found.bounds[found.num_patches > 0, 0].tolist()
                fed = modality.exported_media(found.media, encoders[name])
                of_row += [
                    (start, modality.exported_name, one) for start, one in zip(starts, fed, strict=True)
                ]
        for _, argument, one in sorted(of_row, key=lambda one: one[0]):
            media.setdefault(argument, []).append(one)
    if not any(row.spans for row in rows):
        columns = {name: columns[name] for name in ("input_ids", "attention_mask")}
    inputs = {name: torch.from_numpy(column) for name, column in columns.items()}
    for argument, of_all in media.items():
        widest = max(one.shape[-1] for one in of_all)
        wide = [np.pad(one, [(0, 0)] * (one.ndim - 1) + [(0, widest - one.shape[-1])]) for one in of_all]
        inputs[argument] = torch.from_numpy(np.stack(wide))
    return inputs


def _read_by(row: Row, name: str, number: int, config: Any) -> np.ndarray:
    """What an encoder reads at each position of a span: patches are the image token."""
    spans = row.spans[name]
    start, end = spans.bounds[number]
    num_patches = int(spans.num_patches[number])
    if spans.ids is None:
        read = row.tokens[start:end].astype(np.int64)
    else:
        lengths = spans.bounds[:, 1] - spans.bounds[:, 0] - spans.num_patches
        first = int(lengths[:number].sum())
        offset = config.vocab_size if config.own_token_offset is None else config.own_token_offset
        read = np.concatenate(
            (np.zeros(num_patches, np.int64), spans.ids[first : first + lengths[number]] + offset)
        )
    read[:num_patches] = config.image_token_id
    return read
