"""How Megatron marks what is split: all of its names, or an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from metalm.errors import FaultError
from metalm.parallel.sharding import Sharding, sharding_of

MARKS = {"tensor_model_parallel": True, "partition_dim": 1, "partition_stride": 2}


def test_a_parameter_is_split_as_its_marks_say() -> None:
    assert sharding_of(SimpleNamespace()) is None
    assert sharding_of(SimpleNamespace(**MARKS | {"tensor_model_parallel": False})) is None
    assert sharding_of(SimpleNamespace(**MARKS)) == Sharding(1, 2)


@pytest.mark.parametrize("name", MARKS)
def test_a_mark_by_another_name_is_an_error(name: str) -> None:
    with pytest.raises(FaultError, match=f"without {name}"):
        sharding_of(SimpleNamespace(**{key: value for key, value in MARKS.items() if key != name}))
