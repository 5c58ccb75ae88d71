"""Make the demo data: text of Python's standard library, captioned drawings, chats about them, and boxes.

Needs no download.

Example: python tools/make_demo_data.py data/demo/raw
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.data.demo.dataset import (
    write_chats,
    write_instructions,
    write_pointing,
    write_pointing_text,
    write_scenes,
    write_text,
)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=20_000, help="training scenes (default: %(default)s)")
    parser.add_argument(
        "--evaluation-scenes",
        type=int,
        default=1_000,
        help="scenes of each other split (default: %(default)s)",
    )
    parser.add_argument(
        "--chats", type=int, default=2_000, help="most chats of a kind (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side (default: %(default)s)")
    parser.add_argument("--text-mib", type=float, default=12, help="most text, in MiB (default: %(default)s)")
    options = parser.parse_args()

    documents = write_text(options.out / "text", int(options.text_mib * 2**20))
    print(f"text: {documents['train']} training and {documents['heldout']} held-out documents", flush=True)
    counts = {
        "train": options.scenes,
        "heldout": options.evaluation_scenes,
        "unseen": options.evaluation_scenes,
    }
    for split, num_scenes in counts.items():
        write_scenes(
            options.out / "scenes", split, num_scenes, seed=options.seed, image_size=options.image_size
        )
        print(f"scenes: {num_scenes} in {split}", flush=True)
    for split in ("train", "heldout"):
        num_chats = min(options.chats, counts[split])
        write_chats(options.out / "chats", split, num_chats, seed=options.seed)
        print(f"chats: {num_chats} in {split}", flush=True)
        write_pointing(options.out, split, counts[split], seed=options.seed)
        print(f"pointing: {counts[split]} in {split}", flush=True)
    write_pointing_text(options.out / "pointing", min(options.chats, options.scenes), seed=options.seed)
    write_instructions(options.out / "chats", min(options.chats, options.scenes), seed=options.seed)


if __name__ == "__main__":
    run_tool(main)
