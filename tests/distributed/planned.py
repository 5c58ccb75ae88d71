"""A model large enough that padding to equal parts is lost in it, for what plans are measured against."""

from __future__ import annotations

from distributed.tiny import micro_batches, tiny_config
from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from reference.rows import DOCUMENT, START, Document, PlainRow, Span

LENGTH, SPAN = 64, 32


def planned_config(*, tensor: int = 1, context: int = 1, **deepspeed: str) -> RunConfig:
    """Decoder of 4 x 128 and a text encoder of 2 x 96; micro-batches of 2 rows, two of them on 2 DP ranks."""
    content = tiny_config(
        "unused", tensor=tensor, context=context, micro_batch_size=2, **deepspeed
    ).model_dump()
    content["model"]["decoder"] |= {"num_layers": 4, "hidden_size": 128}
    text = content["model"]["encoders"]["text"] | {"hidden_size": 96, "max_text_positions": SPAN}
    content["model"]["encoders"] = {"text": text}
    sources = {"text": content["data"]["sources"]["text"]}
    # Every row has one span of 32 of its 64 positions.
    content["data"] |= {"sequence_length": LENGTH, "sources": sources}
    content["data"]["spans"] |= {"fraction": SPAN / LENGTH, "min_length": SPAN - 1, "max_length": SPAN}
    return RunConfig.model_validate(content)


def measured_batches(config: RunConfig, data_rank: int, data_size: int) -> list[SemiCausalBatch]:
    """Rows of one document with one span, as the config's mean row."""
    tokens = [START, *range(4, LENGTH + 2), DOCUMENT]
    row = PlainRow([Document(tokens, [Span("text", 8, 8 + SPAN)])], source=0)
    return micro_batches([row] * config.training.global_batch_size, config, data_rank, data_size)
