"""Prepare audio with captions: audio2dataset folders or tables to shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_audio_text.py audiocaps.csv --audio-folder clips --resample 16000 --out caps
"""

from __future__ import annotations

import functools
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.config.pretrained_audio import SAMPLING_RATES
from metalm.data.preparation.clips import prepare_clip
from metalm.data.preparation.pair_arguments import add_pair_arguments, run_preparation


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="folder of tars, or of .wav, .flac or .ogg files with .txt beside them; .csv, .tsv or .jsonl",
    )
    parser.add_argument(
        "--audio-folder", type=Path, help="paths are relative to it (default: the folder of the table)"
    )
    parser.add_argument(
        "--resample", type=int, metavar="HERTZ", help="store clips of higher sampling rates at this, as FLAC"
    )
    parser.add_argument("--max-seconds", type=float, help="cut longer clips, and store them as FLAC")
    add_pair_arguments(parser, "audio_text")
    options = parser.parse_args()
    if options.resample is not None and options.resample not in SAMPLING_RATES:
        parser.error(f"--resample must be from {SAMPLING_RATES[0]} to {SAMPLING_RATES[-1]}")
    settings = {"sampling_rate": options.resample, "max_seconds": options.max_seconds}
    run_preparation(
        parser,
        options,
        "audio_text",
        convert=functools.partial(prepare_clip, **settings),
        settings=settings,
        media_folder=options.audio_folder,
    )


if __name__ == "__main__":
    run_tool(main)
