"""Add the five special tokens to a tokenizer made elsewhere, so that runs can be trained with it.

Reads any tokenizer.json of Hugging Face (GPT-2, Llama, Qwen, ...) and models of SentencePiece. All tokens
keep their ids.

Examples:
    python tools/complete_tokenizer.py Qwen2.5-0.5B --out data/tokenizer
    python tools/complete_tokenizer.py llama/tokenizer.model --out data/tokenizer
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.progress import Phase


def main() -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder, tokenizer.json or SentencePiece's .model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer; must not exist")
    options = parser.parse_args()

    with Phase("loading transformers"):
        from metalm.conversion.completed_tokenizer import changed_texts, complete_tokenizer

    tokenizer = complete_tokenizer(options.source, options.out)
    print(f"{options.out}: {tokenizer.size} ids, fingerprint {tokenizer.fingerprint}")
    if changed := changed_texts(tokenizer):
        print("it does not give back every text as it was; changed are, for example:")
        for text in changed[:3]:
            ids = tokenizer.encode([text])[0]
            print(f"    {text!r} to {tokenizer.decode(ids)!r}")


if __name__ == "__main__":
    run_tool(main)
