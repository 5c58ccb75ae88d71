"""Draws are addressed, not consumed, and come from Philox's raw words."""

from __future__ import annotations

import hashlib

import numpy as np

from metalm.data.order.streams import Stream


def test_words_are_those_of_numpys_philox_at_the_address() -> None:
    purpose = int.from_bytes(hashlib.sha256(b"spans of prose").digest()[:8], "little")
    philox = np.random.Philox(key=np.array([9, purpose], np.uint64), counter=[0, 77, 3, 0])
    np.testing.assert_array_equal(Stream(9, "spans of prose", 3).words(77, 11), philox.random_raw(11))


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    used, fresh = Stream(1, "a", 2), Stream(1, "a", 2)
    used.words(5, 1000)
    used.words(2**40, 3)
    np.testing.assert_array_equal(used.words(6, 9), fresh.words(6, 9))


def test_seed_purpose_lane_and_ordinal_each_change_the_words() -> None:
    drawn = [
        tuple(Stream(seed, purpose, lane).words(ordinal, 2))
        for seed in (0, 2**70 + 1)
        for purpose in ("a", "b")
        for lane in (0, 1)
        for ordinal in (0, 2**33)
    ]
    assert len(set(drawn)) == len(drawn)


def test_uniforms_fill_the_unit_interval() -> None:
    values = Stream(1, "u").uniforms(0, 100_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002


def test_permutations_are_permutations() -> None:
    stream = Stream(1, "p")
    first, second = stream.permutation(0, 1000), stream.permutation(1, 1000)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    assert (first == second).mean() < 0.02
