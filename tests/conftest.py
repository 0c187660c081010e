"""What holds for every test: the random numbers that it asks torch for do not depend on the tests before it."""

import pytest
import torch
from hypothesis import settings

# The same examples in every run, whatever ran before, and no limit of time on a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
