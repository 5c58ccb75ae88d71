"""The folder of a preparation, which remembers what it was begun from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metalm.data.preparation.folder import require_equal_plans
from metalm.errors import ConfigError

TASK: dict[str, Any] = {"task": "sums", "version": 1, "templates": [{"id": "plain", "target": "x" * 400}]}


def refusal(old: dict[str, Any], new: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        require_equal_plans(Path("out"), old, new)
    return str(refused.value)


def test_the_values_that_changed_are_told_by_their_keys_and_positions() -> None:
    changed = {**TASK, "version": 2, "media": {"image": "a"}}
    assert "(tasks[1].media was None, is {'image': 'a'}; tasks[1].version was 1, is 2)" in refusal(
        {"tasks": [TASK, TASK], "seed": 0}, {"tasks": [TASK, changed], "seed": 0}
    )
    assert "(inputs[1] was None, is ['b', 2])" in refusal(
        {"inputs": [["a", 1]]}, {"inputs": [("a", 1), ("b", 2)]}
    )


def test_long_values_are_shortened_around_what_changed_in_them() -> None:
    told = refusal({"text": "a" * 400 + "old" + "b" * 400}, {"text": "a" * 400 + "new" + "b" * 400})
    assert "aaoldbb" in told and "aanewbb" in told and len(told) < 400
    told = refusal({"text": "a" * 400}, {"text": "a" * 400 + "!"})
    assert "aaa', is ..." in told and "aaa!')" in told


def test_of_many_changes_the_first_are_told() -> None:
    told = refusal({"inputs": list(range(100))}, {"inputs": list(range(1, 101))})
    assert "inputs[4] was 4, is 5; and 95 more)" in told and "inputs[5]" not in told
