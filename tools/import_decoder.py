"""Make a pretrained language model the decoder that runs start from, at any tensor parallelism.

Reads folders of GPT-2, Llama, Mistral, Qwen2, GPT-NeoX (Pythia), OLMo and Gemma as transformers saves them
(safetensors).

Example:
    hf download openai-community/gpt2 --local-dir gpt2
    python tools/import_decoder.py gpt2 imported/gpt2
    metalm train pipelines/X.yaml, which has `extends: [..., ../imported/gpt2/decoder.yaml]`
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.progress import Phase


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="config.json, safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="must not exist")
    options = parser.parse_args()

    with Phase("loading transformers"):
        from metalm.conversion.import_decoder import import_decoder

    result = import_decoder(options.folder, options.out)
    print(f"wrote {result.folder}: {result.num_parameters:,} parameters, for {result.longest} positions")
    print(f"a pipeline starts from it with `extends: {result.pipeline}`")


if __name__ == "__main__":
    run_tool(main)
