"""Draws the attention mask of a batch with the state of each block, as a PNG.

Each --row is a batch row: lengths of its documents, then its spans as FIRST:LAST; padding fills the rest.

python tools/draw_mask.py mask.png --kind semi-causal --row 90 60 90 10:34 100:130 --row 200 20:70 120:150
"""

import argparse
from pathlib import Path

import torch

from metalm.kernels import IntervalMask
from metalm.kernels.mask_picture import LEGEND, mask_image

KINDS = {
    "causal": "decoder: causal inside documents, spans too",
    "semi-causal": "decoder: causal inside documents, bidirectional inside spans",
    "encoder": "encoder: each span sees itself, nothing outside spans",
}
EXAMPLE_ROWS = [["90", "60", "90", "10:34", "100:130"], ["200", "20:70", "120:150"]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("png", type=Path, help="file to write")
    parser.add_argument("--row", nargs="+", action="append", dest="rows", metavar="LENGTH or FIRST:LAST")
    parser.add_argument("--kind", choices=KINDS, default="semi-causal", help=str(KINDS))
    parser.add_argument("--length", type=int, help="positions of a row; the longest row's by default")
    parser.add_argument("--block-q", type=int, default=16)
    parser.add_argument("--block-k", type=int, default=16)
    return parser.parse_args()


def build_mask(rows: list[list[str]], kind: str, length: int | None) -> IntervalMask:
    """The mask of rows given as on the command line."""
    documents = [[int(word) for word in row if ":" not in word] for row in rows]
    spans = [[tuple(map(int, word.split(":"))) for word in row if ":" in word] for row in rows]
    length = length or max(map(sum, documents))
    document_start = torch.full((len(rows), length), -1)
    span_start, span_end = torch.zeros(len(rows), length), torch.zeros(len(rows), length)
    for row in range(len(rows)):
        first = 0
        for document in documents[row]:
            document_start[row, first : first + document] = first
            first += document
        for first, last in spans[row]:
            span_start[row, first:last] = first
            span_end[row, first:last] = last
    if kind == "encoder":
        return IntervalMask.packed_spans(span_start, span_end).validate()
    bidirectional = kind == "semi-causal"
    mask = IntervalMask.semi_causal(document_start, span_end, bidirectional_spans=bidirectional)
    return mask.validate()


def main() -> None:
    arguments = parse_arguments()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    mask = build_mask(arguments.rows or EXAMPLE_ROWS, arguments.kind, arguments.length)
    figure, axes = pyplot.subplots(
        1, mask.batch_size, figsize=(6 * mask.batch_size, 6.8), squeeze=False, layout="constrained"
    )
    for row, axis in enumerate(axes[0]):
        axis.imshow(
            mask_image(mask, row, arguments.block_q, arguments.block_k).numpy(), interpolation="nearest"
        )
        axis.set_title(f"row {row}: {int(mask.visible_pairs()[row])} visible pairs")
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    patches = [
        Patch(color=(red / 255, green / 255, blue / 255), label=name)
        for name, (red, green, blue) in LEGEND.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    figure.suptitle(f"{KINDS[arguments.kind]} (blocks of {arguments.block_q} x {arguments.block_k})")
    figure.savefig(arguments.png, dpi=100)
    print(f"wrote {arguments.png}: {mask.batch_size} rows of {mask.num_queries} queries")


if __name__ == "__main__":
    main()
