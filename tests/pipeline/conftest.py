"""Runs that several tests share: made once per process, copied for tests that change them."""

import shutil
from collections.abc import Iterator

import pytest

import pipeline.planning.projection
from tests.pipeline.tools import finished


@pytest.fixture(autouse=True, scope="package")
def _short_measurement() -> Iterator[None]:
    """Measure the machine's speed by small products: no test depends on its accuracy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.planning.projection, "_RATE_EDGE", 64)
        yield


@pytest.fixture(scope="session")
def good_run(tmp_path_factory):
    """A finished run of the small configuration that tests only read."""
    return finished(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """A function that returns a finished run of the small configuration with changes; tests only read it."""
    made = {}

    def run_of(*sets: str):
        if sets not in made:
            made[sets] = finished(tmp_path_factory.mktemp("shared") / "run", *sets)
        return made[sets]

    return run_of


@pytest.fixture
def own_run(good_run, tmp_path):
    """A separate copy of the finished run."""
    return shutil.copytree(good_run, tmp_path / "run")
