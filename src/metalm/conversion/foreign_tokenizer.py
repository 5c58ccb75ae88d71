"""Another model's tokenizer with the five special tokens of ours, and what their embeddings start as."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from metalm.conversion.tokenizer_files import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from metalm.data.tokenizer import (
    BLANK_LINE,
    DOCUMENT,
    IMAGE,
    PAD,
    PARAGRAPH,
    SPECIAL_TOKENS,
    START,
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
)
from metalm.errors import DataError
from metalm.regular_files import read_regular


def complete_tokenizer(folder: Path, out: Path) -> Tokenizer:
    """Write a folder's tokenizer with our special tokens; those that it has keep their ids.

    Raises:
        DataError: there is no tokenizer.json, or raw text could forge a special token.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {TOKENIZER_NAME}; transformers writes one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = parse_tokenizer(read_regular(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    out.mkdir(parents=True)
    tokenizer.save(str(out / TOKENIZER_NAME))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": DOCUMENT,
        "pad_token": PAD,
        "extra_special_tokens": [PARAGRAPH, IMAGE],
        "clean_up_tokenization_spaces": False,
    }
    (out / TOKENIZER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    return load_tokenizer(out)


def extend_embedding(
    table: Tensor, tokenizer: Tokenizer, vocab_size: int, start_id: int | None, end_id: int | None
) -> Tensor:
    """Rows for the ids that a table lacks, each from the rows of the tokens that meant the same.

    A blank line's row is the mean of the tokens that spelt it; without such tokens, the mean of all.

    Args:
        table: [old vocabulary, D], of the embedding or of the output layer.
        tokenizer: with our special tokens.
        vocab_size: rows of the answer.
        start_id: the foreign token before a text.
        end_id: the foreign token after a text.

    Returns:
        [vocab_size, D]; the given rows are as they were.
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
    for own, sources in meanings.items():
        known = [source for source in sources if source < old_size]
        if own >= old_size and known:
            extended[own] = table[known].mean(dim=0)
    return extended
