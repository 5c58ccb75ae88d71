"""What the embeddings of our special tokens start as in a model whose tokenizer lacked them."""

from __future__ import annotations

from collections.abc import Set

import tokenizers
import torch
from torch import Tensor

from metalm.data.tokenizer import BLANK_LINE, Tokenizer


def extend_embedding(
    table: Tensor,
    tokenizer: Tokenizer,
    new_ids: Set[int],
    vocab_size: int,
    start_id: int | None,
    end_id: int | None,
) -> Tensor:
    """Rows for new tokens, each from the rows of the tokens that meant the same.

    A blank line's row is the mean of the tokens that spelt it; without such tokens, the mean of all. A table
    may have rows beyond its own tokenizer's tokens, which were never trained: new tokens' are written over.

    Args:
        table: [old vocabulary, D], of the embedding or of the output layer.
        tokenizer: with our special tokens.
        new_ids: of those that the foreign tokenizer lacks.
        vocab_size: rows of the answer.
        start_id: the foreign token before a text.
        end_id: the foreign token after a text.

    Returns:
        [vocab_size, D]; the rows of the foreign tokenizer's tokens are as they were.
    """
    old_size = table.shape[0]
    model = tokenizers.Tokenizer.from_buffer(tokenizer.definition)
    newlines: list[int] = model.encode(BLANK_LINE, add_special_tokens=False).ids
    meanings = {
        tokenizer.start_id: [] if start_id is None else [start_id],
        tokenizer.paragraph_id: newlines,
        tokenizer.document_id: [] if end_id is None else [end_id],
    }
    extended = torch.cat((table, table.mean(dim=0).expand(vocab_size - old_size, -1)))
    for own in new_ids:
        known = [source for source in meanings.get(own, []) if source < old_size]
        extended[own] = (table[known] if known else table).mean(dim=0)
    return extended
