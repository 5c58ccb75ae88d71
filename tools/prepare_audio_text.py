"""Prepare audio with captions: audio2dataset folders or tables to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_audio_text.py audiocaps.csv --audio-folder clips --resample 16000 --out caps
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.pair_arguments import add_pair_arguments, run_preparation
from metalm.modalities import MEDIA


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="folder of tars, or of .wav, .flac, .ogg, .mp3, .m4a files and .txt; .csv, .tsv, .jsonl, "
        ".parquet",
    )
    parser.add_argument(
        "--audio-folder", type=Path, help="paths are relative to it (default: the folder of the table)"
    )
    add_pair_arguments(parser, MEDIA["audio"])
    options = parser.parse_args()
    run_preparation(parser, options, MEDIA["audio"], options.audio_folder)


if __name__ == "__main__":
    run_tool(main)
