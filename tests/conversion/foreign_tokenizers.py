"""Tokenizers as other families have them, trained on a few words."""

from __future__ import annotations

import json
import random

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from metalm.conversion.completed_tokenizer import PROBES

WORDS = ["fox", "dogs", "jumps", "over", "naïve", "数据", "3.14", "lazy", "s>", "</", "d>", "<s>"]

SIZE = 400
"""Ids that are trained for."""


def words(num_texts: int) -> list[str]:
    stream = random.Random(1)
    return [" ".join(stream.choices(WORDS, k=12)) + "." for _ in range(num_texts)]


def byte_level(texts: list[str], size: int, *special: str) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model


def like_gpt2(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    return byte_level(texts, size, "<|endoftext|>")


def like_qwen(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    """Its text is normalised, and it has added tokens that are not special."""
    model = byte_level(texts, size, "<|endoftext|>", "<|im_start|>")
    model.normalizer = normalizers.NFC()
    model.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return model


def like_llama3(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    """It begins texts with a token of its own."""
    model = byte_level(texts, size, "<|begin_of_text|>", "<|end_of_text|>")
    begin = ("<|begin_of_text|>", model.token_to_id("<|begin_of_text|>"))
    model.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return model


def like_llama2(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    """Blanks are letters, bytes stand in for unknown ones, and two special tokens have the names of ours."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    definition = json.loads(model.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    # Of a pair that a long corpus would have merged: text must not become the special token by it.
    merges = definition["model"]["merges"]
    vocabulary = definition["model"]["vocab"]
    if "<s" not in vocabulary:
        vocabulary["<s"] = len(vocabulary)
        merges.append(["<", "s"])
    merges.append(["<s", ">"])
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def like_mistral(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    """Blanks are letters as in Llama 2, by a pre-tokenizer, which puts one in front of a text alone."""
    model = like_llama2(texts, size)
    model.normalizer = normalizers.Sequence([])
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Sequence([first])])
    return model


def like_gemma(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    """It has a token of its own for blank lines, and a longer one."""
    model = like_llama2(texts, size)
    model.normalizer = normalizers.Replace(" ", "▁")
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    definition = json.loads(model.to_str())
    vocabulary = definition["model"]["vocab"]
    for piece in ("\n", "\n\n", "\n\n\n"):
        vocabulary.setdefault(piece, len(vocabulary))
    definition["model"]["merges"] += [["\n", "\n"], ["\n\n", "\n"]]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def like_t5(texts: list[str], size: int = SIZE) -> tokenizers.Tokenizer:
    """The most likely pieces of each word; `</s>` is one of them, and two blank lines' breaks are another."""
    model = tokenizers.Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({*"\n\r\t", *"".join((*PROBES, *texts))})
    trainer = trainers.UnigramTrainer(
        vocab_size=len(alphabet) + 60,
        initial_alphabet=alphabet,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    definition = json.loads(model.to_str())
    definition["model"]["vocab"].append(["\n\n", -3.0])
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


FORMS = {
    "gpt2": like_gpt2,
    "qwen": like_qwen,
    "llama3": like_llama3,
    "llama2": like_llama2,
    "metaspace": like_mistral,
    "gemma": like_gemma,
    "unigram": like_t5,
}
