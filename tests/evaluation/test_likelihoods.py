"""Documents that begin alike are read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from metalm.document import Document, Part
from metalm.evaluation.likelihoods import MOST_ENDINGS, Ending, Likelihood, by_beginning, likelihoods

END = 2


def text(*tokens: int, weight: float = 0.0, reader: str | None = None) -> Part:
    return Part("text", np.array(tokens), reader, weight)


def question(*options: tuple[int, ...], image: bytes = b"jpeg", ends: bool = False) -> list[Document]:
    picture = Part("image", np.array([1, 1]), "vision", 0.0, image)
    asked = (picture, text(5, 6, reader="text"), text(7))
    return [Document((*asked, text(*option, weight=1.0)), ends=ends) for option in options]


def test_options_of_a_question_share_its_beginning() -> None:
    documents = [*question((8,), (9, 10)), *question((8,), image=b"other"), *question((11,))]
    found = by_beginning(documents, END)
    assert [one.documents for one in found] == [[0, 1, 3], [2]]
    assert [one.tokens for one in found[0].endings] == [[8], [9, 10], [11]]
    assert found[0].beginning == documents[0].prompt(3)


def test_an_end_is_trained_on_like_what_stands_before_it() -> None:
    (found,) = by_beginning(question((8, 9), ends=True), END)
    assert found.endings == [Ending([8, 9, END], [1.0, 1.0, 1.0])]


def test_who_reads_a_part_tells_beginnings_apart() -> None:
    parts = [text(5, reader="text"), text(5), text(5, reader="vision")]
    documents = [Document((part, text(6, weight=1.0)), ends=False) for part in parts]
    assert [one.documents for one in by_beginning(documents, END)] == [[0], [1], [2]]


def test_what_is_not_trained_on_behind_an_answer_belongs_to_the_ending() -> None:
    document = Document((text(4), text(5, weight=1.0), text(6), text(7, weight=0.5)), ends=False)
    (found,) = by_beginning([document], END)
    assert found.endings == [Ending([5, 6, 7], [1.0, 0.0, 0.5])]


def test_many_endings_of_a_beginning_are_read_in_several_rows() -> None:
    documents = question(*((8 + number,) for number in range(MOST_ENDINGS + 3)))
    first, second = by_beginning(documents, END)
    assert first.documents == list(range(MOST_ENDINGS))
    assert second.documents == list(range(MOST_ENDINGS, MOST_ENDINGS + 3))
    assert second.beginning == first.beginning


def test_what_begins_shorter_than_it_ends_is_read_by_itself() -> None:
    documents = [Document((text(3), text(*range(4, 4 + n), weight=1.0)), ends=False) for n in (1, 1, 2, 2)]
    assert [one.documents for one in by_beginning(documents, END)] == [[0, 1], [2], [3]]


class UnsureRows:
    """Rows of 7 and 8 tokens, of a model of 8 positions to which all of 16 tokens are as likely."""

    lengths = (7, 8)

    def read(self, length: int) -> Tensor:
        return torch.zeros(2, 16)

    def next_losses(
        self,
        tokens: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
    ) -> Tensor:
        assert all(0 <= place < 8 for of_row in places for place in of_row)
        return torch.full((2, len(tokens[0])), float(np.log(16)))


def test_a_row_as_long_as_any_can_be_is_not_read_on() -> None:
    none, two = Ending([], []), Ending([3, 4], [1.0, 1.0])
    found = likelihoods(UnsureRows(), [[none, two], [none, none]], [0, 2])  # type: ignore[arg-type]
    assert [[one.num_tokens for one in of_row] for of_row in found] == [[0, 2], [0, 0]]
    assert np.isclose(found[0][1].total, -2 * np.log(16))
    assert found[1] == [Likelihood(0, 0)] * 2
