"""How the report formats numbers, and which points it plots if there are many."""

import numpy as np
import pytest

from pipeline.report.formatting import duration, number, percent, size
from pipeline.report.plots.spectrum import log_spaced


def test_many_eigenvalues_are_thinned_and_the_ends_kept():
    indices = log_spaced(1_000_000)
    assert len(indices) <= 300
    assert indices[0] == 0
    assert indices[-1] == 999_999
    assert (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(log_spaced(12), np.arange(12))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.0), "0"),
        (number(-0.5), "−0.5"),
        (number(1e-4), "10⁻⁴"),
        (number(2.5e-7), "2.5 × 10⁻⁷"),
        (number(-3e12), "−3 × 10¹²"),
        (number(1234.4), "1,234"),
        (number(9830.2, 4), "9,830"),
        (number(float("inf")), "∞"),
        (number(float("-inf")), "−∞"),
        (number(float("nan")), "not a number"),
        (percent(0.97777), "97.8 %"),
        (duration(0.5), "0.50 s"),
        (duration(75), "75 s"),
        (duration(150), "2 min 30 s"),
        (duration(7260), "2 h 1 min"),
        (size(0), "0 bytes"),
        (size(1023), "1023 bytes"),
        (size(1536), "1.5 KiB"),
        (size(3 << 40), "3.0 TiB"),
    ],
)
def test_numbers_read_well(shown, expected):
    assert shown == expected
