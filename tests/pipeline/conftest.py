"""Runs that several tests look at: made once a process, copied where a test changes them."""

import shutil

import pytest

from tests.pipeline.tools import finished


@pytest.fixture(scope="session")
def good_run(tmp_path_factory):
    """A finished run of the small configuration, for looking at only."""
    return finished(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture
def own_run(good_run, tmp_path):
    """A copy of the finished run at a place of its own."""
    return shutil.copytree(good_run, tmp_path / "run")
