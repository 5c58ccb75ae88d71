"""Train the byte-level BPE tokenizer that encoders and decoder share.

Example: python tools/train_tokenizer.py raw/train.jsonl --captions raw/captions.jsonl --out data/tokenizer
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import mebibytes, positive
from metalm.data.preparation.text_arguments import add_text_arguments, text_fields
from metalm.data.preparation.tokenizer_training import training_texts
from metalm.data.tokenizer import train_tokenizer


def main() -> None:
    parser = ToolParser(__doc__)
    add_text_arguments(parser)
    parser.add_argument(
        "--captions", type=Path, action="append", default=[], help="table of images and captions"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument(
        "--vocab-size", type=positive, default=64_000, help="ids in all (default: %(default)s)"
    )
    parser.add_argument(
        "--sample-mib",
        type=mebibytes,
        default=1024,
        help="text to train on, evenly from all files (default: 1024)",
    )
    options = parser.parse_args()

    texts = training_texts(
        options.inputs,
        options.captions,
        int(options.sample_mib * 2**20),
        fields=text_fields(options),
        from_tokenizer=options.from_tokenizer,
    )
    tokenizer = train_tokenizer(texts, options.vocab_size, options.out)
    print(f"{options.out}: {tokenizer.size} ids, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    run_tool(main)
