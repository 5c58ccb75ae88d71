"""The dropout pattern: known answers, rate, and what it depends on."""

import pytest
import torch
from torch import Tensor

from metalm.kernels import IntervalMask, interval_attention
from metalm.kernels.dropout import _philox, keep_tile, row_seeds


def keep(seeds: Tensor, head_offset: int = 0, num_heads: int = 4, first_key: int = 0) -> Tensor:
    return keep_tile(seeds, 0.1, head_offset, num_heads, slice(0, 64), slice(first_key, 128))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        # Random123's known-answer vectors of philox4x32 with 10 rounds.
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answer(key: int, counter: int, words: tuple[int, ...]) -> None:
    zero = torch.full((1,), counter)
    assert tuple(int(word) for word in _philox(torch.full((1,), key), zero, zero, zero)) == words


def test_keeps_the_right_share() -> None:
    share = keep(torch.arange(32)).double().mean()
    assert abs(float(share) - 0.9) < 4 * (0.09 / (32 * 4 * 64 * 128)) ** 0.5


def test_rows_and_heads_differ() -> None:
    kept = keep(torch.tensor([1, 2])).flatten(0, 1)
    for one in range(8):
        for other in range(one):
            assert 0.1 < (kept[one] != kept[other]).double().mean() < 0.3


def test_a_rank_with_some_of_the_heads_drops_what_one_rank_would() -> None:
    seeds = torch.tensor([7])
    sharded = [keep(seeds, head_offset=offset, num_heads=2) for offset in (0, 2)]
    assert torch.equal(torch.cat(sharded, 1), keep(seeds))


def test_any_tile_shows_the_same_pattern() -> None:
    assert torch.equal(keep(torch.tensor([7]), first_key=37), keep(torch.tensor([7]))[..., 37:])


def test_seeds_per_row_do_not_depend_on_the_batch() -> None:
    q, k, v = (torch.randn(3, 2, 20, 8) for _ in range(3))
    mask, seeds = IntervalMask.causal(20), torch.tensor([11, 12, 13])
    together = interval_attention(q, k, v, mask, dropout=0.2, dropout_seed=seeds)
    for row in range(3):
        one = slice(row, row + 1)
        alone = interval_attention(q[one], k[one], v[one], mask, dropout=0.2, dropout_seed=seeds[one])
        torch.testing.assert_close(alone, together[one])


def test_without_a_seed_the_generator_decides() -> None:
    q = torch.randn(1, 2, 20, 8)
    mask = IntervalMask.causal(20)
    torch.manual_seed(1)
    first = interval_attention(q, q, q, mask, dropout=0.5)
    second = interval_attention(q, q, q, mask, dropout=0.5)
    torch.manual_seed(1)
    again = interval_attention(q, q, q, mask, dropout=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_refuses_seeds_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"dropout_seed has shape \[2\]"):
        row_seeds(torch.tensor([1, 2]), 3, torch.device("cpu"))
