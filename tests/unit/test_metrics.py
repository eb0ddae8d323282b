"""What becomes of the metrics that a trainer logs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.odd_metrics import ODD, Odd
from verl_autoexport.milestones.metrics import numbers


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(type(odd)))
def test_an_odd_metric_loses_nothing_but_itself(odd):
    logged = {"odd": odd, Odd(ValueError): 1.0, 7: 2, "a": np.float32(0.5), "b": torch.tensor(3), "nan": float("nan")}
    found = numbers(logged)
    assert found.pop("nan") != 0
    assert found == {"7": 2.0, "a": 0.5, "b": 3.0}
