"""A tokenizer as a pretrained encoder has one: other tokens than ours, and special ones around a text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FIRST, LAST = "[CLS]", "[SEP]"


def save_tokenizer(folder: Path, *, words: list[str] | None = None) -> Tokenizer:
    """Write tokenizer.json: one token per byte or, given words to learn, one per word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 if words else 260,
        special_tokens=["[PAD]", FIRST, LAST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words or [], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}",
        special_tokens=[(FIRST, tokenizer.token_to_id(FIRST)), (LAST, tokenizer.token_to_id(LAST))],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
