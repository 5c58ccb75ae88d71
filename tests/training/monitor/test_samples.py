"""Samples as people see them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metalm.evaluation.generation import Sample
from metalm.modalities.image import caption_picture
from metalm.training.monitor.samples import SamplesShown
from metalm.training.monitor.sink import About, Sink


class Board(Sink):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.pictures: dict[str, np.ndarray] = {}
        self.texts: dict[str, str] = {}

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None: ...

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.pictures[name] = pixels

    def write_text(self, step: int, name: str, text: str) -> None:
        self.texts[name] = text


def test_an_image_has_the_question_and_the_boxes_of_answer_and_reference() -> None:
    board, black = Board(), np.zeros((48, 48, 3), np.uint8)
    answer, right = "<box> 0 0 9 9 </box>", "<box> 8 8 20 20 </box>"
    SamplesShown(board).show(
        3,
        [Sample("chats", "image", black, right, answer, "where?"), Sample("pairs", "image", black, "a", "b")],
    )
    lines = ["asked: where?", f"generated: {answer}", f"reference: {right}"]
    np.testing.assert_array_equal(board.pictures["chats/0"], caption_picture(black, lines))
    colours = {tuple(pixel) for pixel in board.pictures["chats/0"][:256].reshape(-1, 3)}
    assert len(colours) == 3  # black, and one of each box
    assert not board.pictures["pairs/1"][:256].any()
    assert board.texts["captions/chats"] == "\n".join(["image 0", *lines])
    assert board.texts["captions/pairs"] == "image 1\ngenerated: b\nreference: a"
