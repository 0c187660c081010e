"""The benchmark of tiles: its small sizes run, and how its figures are measured."""

import pytest

from scripts.benchmarks import SECTIONS, tile


@pytest.mark.bench
def test_the_quick_benchmark_answers_every_cell_with_a_figure():
    cells = SECTIONS["tile"](quick=True)
    assert len({cell.key for cell in cells}) == len(cells) >= 12
    for cell in cells:
        (figure,) = cell.compute()["figures"]
        assert figure["value"] > 0
        assert figure["details"]["tile"] > 0
        assert figure["least"] == cell.settings["least"]


@pytest.mark.bench
def test_layers_are_measured_by_the_products_that_their_formula_needs():
    setting = tile.Setting("layered", "sample", 8, 256, 1, 1)
    features = tile._features(setting)
    first, hidden, readout = 785 + 8 * 10 * 512, 64 * (513 + 512), 8 * 513
    assert tile._length_of_products(features, setting) == first + hidden + readout
