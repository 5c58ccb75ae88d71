"""Documents as training makes them, and what the checkpoint's own model says to them, in float32."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from metalm.conversion.checkpoint_source import CheckpointSource
from metalm.conversion.reference import reference_logits
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.row import Row, lay_out
from metalm.document import Document


def reference(source: CheckpointSource, document: Document) -> tuple[Row, torch.Tensor]:
    """A document's row, and the logits [tokens, vocabulary] of the checkpoint's own model."""
    row = lay_out([document], source.tokenizer)
    batch = collate(
        [row],
        model_config=source.config.model,
        sequence_length=len(row.tokens),
        tp_size=1,
        pad_id=source.tokenizer.pad_id,
    )
    return row, reference_logits(source.config.model, partial(source.read, dtype=torch.float32), batch)[0]


def scored_by_reference(source: CheckpointSource, document: Document) -> tuple[float, bool]:
    """The likelihood of what is weighted, and whether it is greedy, token after token."""
    row, logits = reference(source, document)
    total, is_greedy = 0.0, True
    for at in np.flatnonzero(row.loss_weights):
        token = int(row.tokens[at + 1])
        total += float(logits[at].log_softmax(-1)[token])
        is_greedy = is_greedy and int(logits[at].argmax()) == token
    return total, is_greedy


def training_document(source: CheckpointSource, *parts: ExamplePart) -> Document:
    """An open document as training makes it: texts longer than their encoder reads in several spans."""
    maker = Corpus(source.config).example_maker(
        {"image": "vision", "text": "vision" if any(one.modality == "image" for one in parts) else "text"},
        overflow="split",
    )
    return maker.make(Example(parts), is_open=True).document.decoded(maker.read)
