"""The benchmark of the solvers at its small sizes: every cell gets a finite ratio."""

import math

import pytest

from scripts.benchmarks import SECTIONS

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("index", [0, 1])
def test_small_sizes_are_measured(index):
    cell = SECTIONS["solvers"](quick=True)[index]
    (figure,) = cell.compute()["figures"]
    assert math.isfinite(figure["value"])
    assert figure["value"] > 0
    parts = ("pass_seconds", "read_seconds", "product_seconds") if index == 0 else ("sums_seconds", "product_seconds")
    seconds = [figure["details"][name] for name in parts]
    expected = (seconds[1] + seconds[2]) / seconds[0] if index == 0 else seconds[1] / seconds[0]
    assert figure["value"] == pytest.approx(expected)
    assert {cell.key for cell in SECTIONS["solvers"](quick=False)} == {"pass", "factor"}
