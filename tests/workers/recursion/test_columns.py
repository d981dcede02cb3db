"""One value per parameter group becomes one per coordinate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra_pipe.workers.recursion.columns import Columns

VALUES = np.array([2.0, 3.0])


def columns(groups, dtype=torch.float64):
    return Columns(torch.tensor(groups, dtype=torch.int64), dtype, torch.device("cpu"))


def test_coordinates_get_their_group_s_value_and_frozen_ones_zero():
    spread = columns([0, 0, -1, 1, 0])
    assert spread.spread(VALUES).tolist() == spread.whole(VALUES).tolist() == [2, 2, 0, 3, 2]
    assert spread.spread(VALUES).dtype == torch.float64
    assert columns([0, 1], torch.float32).spread(VALUES).dtype == torch.float32
    assert list(spread.spans()) == [(slice(0, 2), 0), (slice(3, 4), 1), (slice(4, 5), 0)]


@pytest.mark.parametrize(("group", "value"), [(1, 3.0), (-1, 0.0)])
def test_one_number_is_enough_for_one_group(group, value):
    one = columns([group] * 3)
    assert one.spread(VALUES).tolist() == [value]
    assert one.whole(VALUES).tolist() == [value] * 3


def test_there_may_be_no_coordinates():
    none = columns([])
    assert none.spread(VALUES).tolist() == none.whole(VALUES).tolist() == []
    assert list(none.spans()) == []
