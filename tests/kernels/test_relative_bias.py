"""T5's buckets, and biases by distance."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from metalm.kernels import RelativeBias, t5_relative_buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (16, 20)])
def test_buckets_equal_those_of_transformers(
    bidirectional: bool, num_buckets: int, max_distance: int
) -> None:
    distance = torch.arange(-2100, 2100)
    expected = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(t5_relative_buckets(distance, num_buckets, max_distance, bidirectional), expected)


def test_by_distance_has_the_table_value_of_each_distance() -> None:
    table = torch.randn(2, 32)
    by_distance = RelativeBias(table).by_distance(num_queries=4, num_keys=6)
    assert by_distance.shape == (2, 9)
    for column, distance in enumerate(range(-3, 6)):
        assert torch.equal(by_distance[:, column], table[:, int(t5_relative_buckets(torch.tensor(distance)))])
