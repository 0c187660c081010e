"""The search for enough draws: its next look, its end, its messages and its refusals.

Axes: S draws.
"""

import math

import numpy as np
import pytest

from nntk_dist.errors import NNTKError
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.required_draws import Look, blocks_to_look_at, draws_for, next_draws, verdict
from nntk_dist.statistics.standard_errors import Calibration


def look(draws: int, bound: float, pair_share: float = 0.0, sketch_share: float = 0.0) -> Look:
    return Look(draws, bound / 1.5, bound, pair_share, sketch_share)


@pytest.mark.parametrize("pair_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sketch_share", [0.0, 0.2])
def test_the_prediction_inverts_the_law_of_the_noise(pair_share, sketch_share):
    """Noise at S draws: (1 − k)((1 − w)/S + w/S²) + k, scaled to the look's."""
    wanted = 5_000.0

    def noise(draws: float) -> float:
        ratio = 1_000.0 / draws
        return (1 - sketch_share) * ((1 - pair_share) * ratio + pair_share * ratio**2) + sketch_share

    rtol = 0.3 * math.sqrt(noise(wanted) / noise(1_000.0))
    assert draws_for(look(1_000, 0.3, pair_share, sketch_share), rtol) == pytest.approx(wanted)


def test_searches_find_the_draws_that_a_law_asks_for():
    rng = np.random.default_rng(0)
    for _ in range(50):
        single, pairs = rng.uniform(0, 10), rng.uniform(0, 1e4)
        looks: list[Look] = []
        draws: int | None = 16
        while draws is not None:
            noise = single / draws + pairs / draws**2
            looks.append(look(draws, math.sqrt(noise), pairs / draws**2 / noise))
            draws = next_draws(looks, rtol=0.05, max_draws=10**9, unit=8)
        found = looks[-1].draws
        assert looks[-1].reaches(0.05)
        assert found % 8 == 0
        smallest = found
        while single / (smallest - 8) + pairs / (smallest - 8) ** 2 <= 0.05**2:
            smallest -= 8
        assert found <= max(1.1 * smallest + 8, 16)  # the law is known after the first look
        assert len(looks) <= 16


def test_steps_are_neither_tiny_nor_leaps():
    assert next_draws([look(1000, 0.0501)], rtol=0.05, max_draws=10**6, unit=8) == 1104
    assert next_draws([look(1000, 0.1)], rtol=0.05, max_draws=10**6, unit=8) == 2640  # 4^0.7 times as many
    assert next_draws([look(1000, 50.0)], rtol=0.05, max_draws=10**6, unit=8) == 4000
    assert next_draws([look(1000, math.inf)], rtol=0.05, max_draws=10**6, unit=8) == 4000
    assert next_draws([look(1000, math.inf, 0.5, 0.5)], rtol=0.05, max_draws=10**6, unit=8) == 4000


def test_searches_end():
    assert next_draws([look(16, 0.04)], rtol=0.05, max_draws=100, unit=8) is None
    assert next_draws([look(64, 0.06)], rtol=0.05, max_draws=70, unit=8) is None  # 72 would be too many
    assert next_draws([look(64, 5.0)], rtol=0.05, max_draws=100, unit=8) == 96
    # the sketch alone contributes 0.1 to a bound of 0.2
    assert next_draws([look(64, 0.2, 0.5, 0.25)], rtol=0.05, max_draws=10**6, unit=8) is None
    assert next_draws([look(64, 0.2, 0.5, 0.25)], rtol=0.11, max_draws=10**6, unit=8) is not None


def test_a_look_in_more_blocks_is_one_at_fewer():
    """In theory, U of R blocks has the variance V1/S + V2/S²·R/(R − 1), which is linear in both parts."""
    for k in (0.0, 0.3):
        seen = Calibration(0.6, 0.02, 9, bound=0.03, pair_share=0.25, sketch_share=k)
        same = Look.of(64, seen, looked_at=8, blocks=8)
        assert (same.relative_error, same.bound) == (0.02, 0.03)
        fewer = Look.of(64, seen, looked_at=32, blocks=4)
        grown = k + (1 - k) * (0.75 + 0.25 * (4 / 3) / (32 / 31))
        assert fewer.relative_error == pytest.approx(0.02 * math.sqrt(grown))
        assert fewer.bound == pytest.approx(0.03 * math.sqrt(grown))


@pytest.mark.parametrize(
    ("draws", "blocks", "group", "expected"),
    [(8, 8, 1, 8), (24, 8, 1, 24), (40, 8, 1, 20), (256, 8, 1, 32), (256, 8, 2, 32), (48, 8, 2, 24), (200, 50, 1, 50)],
)
def test_blocks_that_are_looked_at_hold_whole_groups(draws, blocks, group, expected):
    assert blocks_to_look_at(draws, blocks, group) == expected
    assert draws % (expected * group) == 0


def test_verdicts():
    options = {"rtol": 0.05, "max_draws": 256}
    assert verdict(look(64, 0.04), **options) == "rtol 0.05 is reached: bound 0.04 with 64 draws"
    assert "not reached: bound 0.06 with 256 draws, and max_draws is 256" in verdict(look(256, 0.06), **options)
    assert "the sketch's own error stays; make sketch larger" in verdict(look(64, 0.2, 0.5, 0.25), **options)
    assert "and max_draws is 256" in verdict(look(256, math.inf), **options)


def test_looks_survive_the_ledger():
    one = look(64, 0.2, 0.5, 0.25)
    assert Look.from_numbers(one.numbers | {"another": 1.0}) == one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0}, r"rtol is 0; allowed: None, or a number above 0 and below 1"),
        ({"rtol": 1.5}, r"rtol is 1\.5; allowed: None, or a number above 0 and below 1"),
        ({"rtol": math.nan}, r"rtol is nan; allowed"),
        ({"rtol": True}, r"rtol is True; allowed"),
        ({"rtol": "5%"}, r"rtol is '5%'; allowed"),
        ({"rtol": 0.1, "kind": "local"}, r"rtol is 0\.1; allowed for kind local, which has no draws: none"),
        (
            {"rtol": 0.1, "blocks": 2, "design": "orthogonal"},
            r"rtol is 0\.1; allowed for blocks 2, which give no error bars: none \(or take 4 blocks or more\)",
        ),
        ({"rtol": 0.1, "draws": 512, "max_draws": 256}, r"draws is 512, the start of the search for rtol; .* 256"),
        ({"max_draws": 0}, r"max_draws is 0; allowed: a whole number, 1 or more"),
        ({"max_draws": 2.5}, r"max_draws is 2\.5; allowed: a whole number"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(NNTKError, match=message):
        KernelSpec(**options)
