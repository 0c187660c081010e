"""The benchmarks at their smallest sizes: every section measures and reports all its figures."""

import math

import pytest

from nntk_dist.spec import KernelSpec
from scripts.benchmarks import SECTIONS, perturb

pytestmark = pytest.mark.bench


def test_scaling():
    answers = {cell.key: cell.compute()["figures"] for cell in SECTIONS["scaling"](quick=True)}
    figures = {figure["what"]: figure for found in answers.values() for figure in found}
    assert list(answers) == ["workers", "overhead, tiles of a second", "overhead, tiles of 10 ms", "cluster"]
    assert all(math.isfinite(figure["value"]) for figure in figures.values())
    asked = {what: (figure["least"], figure["most"]) for what, figure in figures.items()}
    assert asked == {
        "two workers of one thread over twice one, features": (0.9, None),
        "two workers of one thread over twice one, gram": (0.9, None),
        "scheduling overhead, tiles of a second, two workers": (None, 0.03),
        "scheduling overhead, tiles of 10 ms, two workers": (None, None),
        "tiles a second, dispatched, done and in the ledger": (500, None),
        "the driver's own memory (USS) at the end over that at a tenth": (None, 1.1),
    }
    overhead = figures["scheduling overhead, tiles of a second, two workers"]
    spent, wall = (overhead["details"][name] for name in ("seconds in tiles", "wall seconds"))
    assert 4.0 <= spent <= 2 * wall  # four tiles of a second each, or longer if other processes took a core
    assert overhead["value"] == pytest.approx(1 - spent / (2 * wall))
    memory = figures["the driver's own memory (USS) at the end over that at a tenth"]["details"]
    assert list(memory) == [f"{kind} at {share}, MB" for share in ("10%", "50%", "100%") for kind in ("USS", "RSS")]


@pytest.mark.parametrize("options", perturb._OPTIONS.values(), ids=perturb._OPTIONS)
def test_every_option_of_full_sizes_is_one_of_a_kernel(options):
    assert KernelSpec(estimator="weight", draws=16, blocks=4, **options).draws == 16
