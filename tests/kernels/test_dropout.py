"""The dropout pattern: known answers, rate, and what it depends on."""

import pytest
import torch
from torch import Tensor

from metalm.kernels import HiddenPattern, IntervalMask, interval_attention
from metalm.kernels import dropout as dropout_module
from metalm.kernels.dropout import _philox, attention_pattern, hidden_dropout, row_seeds
from metalm.kernels.native_philox import compiled_loop, native_keep


def keep(seeds: Tensor, head_offset: int = 0, num_heads: int = 4, first_key: int = 0) -> Tensor:
    sizes = {"batch_size": len(seeds), "num_queries": 64, "num_keys": 128, "device": seeds.device}
    pattern = attention_pattern(0.1, seeds, None, head_offset, **sizes)
    return pattern.keep_tile(slice(0, len(seeds)), num_heads, slice(0, 64), slice(first_key, 128))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        # Random123's known-answer vectors of philox4x32 with 10 rounds.
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answer(key: int, counter: int, words: tuple[int, ...]) -> None:
    zero = torch.full((1,), counter)
    assert tuple(int(word) for word in _philox(torch.full((1,), key), zero, zero, zero, zero)) == words


def test_the_compiled_generator_draws_what_pytorch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds of all 64 bits, packed spans, some of the heads, widths of any remainder."""
    seeds = torch.tensor([[2**62 + 5] * 24 + [-(2**61) - 7] * 16, [11] * 40])
    positions = torch.cat((torch.arange(24), torch.arange(16))).expand(2, 40)
    sizes = {"batch_size": 2, "num_queries": 40, "num_keys": 40, "device": seeds.device}
    attention = attention_pattern(0.3, seeds, positions, 3, **sizes)
    hidden = HiddenPattern(0.3, seeds, positions, site=2**20)
    number = 0

    def draw() -> list[Tensor]:
        tiles = [(slice(0, 2), slice(0, 40), slice(5, 38)), (slice(1, 2), slice(7, 30), slice(0, 40))]
        kept = [attention.keep_tile(rows, 5, queries, keys) for rows, queries, keys in tiles]
        return kept + [hidden.keep(width) for width in (64, 301)]

    def count(*arguments: object) -> Tensor | None:
        nonlocal number
        number += 1
        return native_keep(*arguments)

    monkeypatch.setattr(dropout_module, "native_keep", count)
    compiled = draw()
    assert number == 4
    assert compiled_loop() is not None
    monkeypatch.setattr(dropout_module, "native_keep", lambda *arguments: None)
    for one, other in zip(compiled, draw(), strict=True):
        assert torch.equal(one, other)


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


def test_a_packed_span_drops_what_it_drops_alone() -> None:
    """Two spans in either order, at places that are multiples of 4, on every backend."""
    lengths, seeds = (7, 10), (11, 12)
    parts = [[torch.randn(1, 2, length, 8) for _ in range(3)] for length in lengths]

    def packed(order: tuple[int, ...], backend: str) -> dict[int, Tensor]:
        total = sum(-(-lengths[span] // 4) * 4 for span in order)
        start, end, positions = (torch.zeros(1, total, dtype=torch.int32) for _ in range(3))
        seed = torch.zeros(1, total, dtype=torch.int64)
        q, k, v = (torch.zeros(1, 2, total, 8) for _ in range(3))
        at, places = 0, {}
        for span in order:
            own = slice(at, at + lengths[span])
            start[:, own], end[:, own], seed[:, own] = own.start, own.stop, seeds[span]
            positions[0, at : at + -(-lengths[span] // 4) * 4] = torch.arange(-(-lengths[span] // 4) * 4)
            for whole, part in zip((q, k, v), parts[span], strict=True):
                whole[:, :, own] = part
            places[span], at = own, at + -(-lengths[span] // 4) * 4
        out = interval_attention(
            q,
            k,
            v,
            IntervalMask(start, end, total),
            dropout=0.4,
            dropout_seed=seed,
            dropout_positions=positions,
            backend=backend,
        )
        return {span: out[:, :, own] for span, own in places.items()}

    for backend in ("dense", "tiled", "triton"):
        both, turned = packed((0, 1), backend), packed((1, 0), backend)
        for span in (0, 1):
            alone = interval_attention(
                *parts[span],
                IntervalMask.padded(torch.tensor([lengths[span]]), lengths[span]),
                dropout=0.4,
                dropout_seed=torch.tensor([seeds[span]]),
                backend="dense",
            )
            torch.testing.assert_close(both[span], alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(turned[span], alone, atol=1e-5, rtol=0)


def test_hidden_dropout_keeps_the_mean_and_is_a_function_of_its_arguments() -> None:
    hidden = torch.ones(64, 301, requires_grad=True)
    seeds, positions = torch.arange(64) // 8, torch.arange(64) % 8
    out = hidden_dropout(hidden, 0.1, seeds, positions, site=3)
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert abs(float((out > 0).double().mean()) - 0.9) < 4 * (0.09 / out.numel()) ** 0.5
    out.sum().backward()
    assert torch.equal(hidden.grad, out.detach())
    order = torch.randperm(64)
    assert torch.equal(hidden_dropout(hidden, 0.1, seeds[order], positions[order], site=3), out[order])
    for other in (
        hidden_dropout(hidden, 0.1, seeds + 100, positions, site=3),
        hidden_dropout(hidden, 0.1, seeds, positions + 8, site=3),
        hidden_dropout(hidden, 0.1, seeds, positions, site=4),
    ):
        assert 0.1 < ((other > 0) != (out > 0)).double().mean() < 0.3


@pytest.mark.parametrize(
    ("seed", "positions", "message"),
    [
        (torch.zeros(1, 7, dtype=torch.int64), None, r"dropout_seed has shape \[1, 7\], expected \[1, 20\]"),
        (3, torch.zeros(2, 20, dtype=torch.int32), r"dropout_positions has shape \[2, 20\]"),
    ],
)
def test_refuses_seeds_and_positions_of_other_queries(seed, positions, message: str) -> None:
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(ValueError, match=message):
        options = {"dropout": 0.1, "dropout_seed": seed, "dropout_positions": positions}
        interval_attention(q, q, q, IntervalMask.causal(20), **options)


@pytest.mark.parametrize(("width", "dtype"), [(301, torch.float32), (1500, torch.float16)])
def test_the_fused_hidden_dropout_equals_the_plain_one(width: int, dtype: torch.dtype) -> None:
    """[S, B, D] with seeds of the rows and positions along them, as the decoder has them."""
    pytest.importorskip("triton")
    hidden, grad = (torch.randn(5, 3, width, dtype=dtype) for _ in range(2))
    seeds, positions = torch.tensor([[2**40 + 1, -7, 11]]), torch.arange(5)[:, None]
    found = []
    for backend in ("torch", "triton"):
        leaf = hidden.clone().requires_grad_()
        out = hidden_dropout(leaf, 0.3, seeds, positions, 5, backend=backend)
        out.backward(grad)
        found.append((out.detach(), leaf.grad))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, atol=0, rtol=1e-3 if dtype == torch.float16 else 1e-6)
        assert torch.equal(fused == 0, plain == 0)
