"""Convert a checkpoint to a Hugging Face folder, and prove that the folder is the same model.

Examples:
    python tools/convert_to_hf.py runs/demo exported/demo
    python tools/convert_to_hf.py runs/demo/checkpoints/step_00000600 out --dtype bfloat16
    python tools/convert_to_hf.py RUN/checkpoints/best out     of a run with checkpoint.keep_best
    python tools/convert_to_hf.py runs/finetuned out --adapter
"""

from __future__ import annotations

import re
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.errors import ConfigError
from metalm.progress import Phase

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as 500MB or 4GiB."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f"size {text!r} is not of the form 500MB or 4GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint), or a step folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    parser.add_argument("--max-shard-size", default="4GiB", help="of a weight file (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="where the run's tokenizer is now, if it was moved")
    parser.add_argument("--license", default="unknown", help="for the model card (default: %(default)s)")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="leave the adapter (LoRA, IA3) out of the weights, and write it to OUT/adapter for peft",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="the moving average of the weights, of a run with training.average",
    )
    parser.add_argument("--no-proof", action="store_true", help="do not compare logits with the checkpoint")
    options = parser.parse_args()

    with Phase("loading transformers"):
        from metalm.conversion.export import DTYPES, export_checkpoint

    result = export_checkpoint(
        options.checkpoint,
        options.out,
        dtype=DTYPES[options.dtype],
        max_shard_bytes=size_in_bytes(options.max_shard_size),
        tokenizer=options.tokenizer,
        with_proof=not options.no_proof,
        adapter_apart=options.adapter,
        average=options.average,
        license_name=options.license,
    )
    print(f"wrote {result.folder}")


if __name__ == "__main__":
    run_tool(main)
