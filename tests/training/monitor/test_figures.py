from __future__ import annotations

from statistics import fmean

import pytest

from metalm.training.monitor.figures import Figure, reduce_over_ranks


def test_each_figure_says_how_the_ranks_values_become_one() -> None:
    ranks = [
        {
            "rows": Figure(3, sum),
            "epoch": Figure(2, min),
            "memory": Figure(1.5, max),
            "wait": Figure(0.2, fmean),
        },
        {
            "rows": Figure(4, sum),
            "epoch": Figure(1, min),
            "memory": Figure(2.5, max),
            "wait": Figure(0.4, fmean),
        },
        {"memory": Figure(9.0, max)},
    ]
    assert reduce_over_ranks(ranks) == {
        "rows": 7,
        "epoch": 1,
        "memory": 9.0,
        "wait": pytest.approx(0.3),
    }


def test_a_name_says_nothing_of_how_ranks_are_added_up() -> None:
    ranks = [{"text/epoch": Figure(2, sum), "encoder_imbalance/x": Figure(1, sum)}] * 2
    assert reduce_over_ranks(ranks) == {"text/epoch": 4, "encoder_imbalance/x": 2}
