"""What holds for every test: the random numbers that it asks torch for do not depend on the tests before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
