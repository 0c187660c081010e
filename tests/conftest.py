"""Settings for every test: torch's random numbers do not depend on the tests before it, and no model is probed for
jumps twice.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import nntk_dist.planning.decision
from tests.harness.probes import shared

# The same examples in every run, regardless of what ran before, and no deadline on a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _shared_probes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nntk_dist.planning.decision, "probe_jumps", shared(nntk_dist.planning.decision.probe_jumps))
        yield
