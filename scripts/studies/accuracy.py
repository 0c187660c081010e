"""Does an asked accuracy hold, and at what price: 200 searches by `rtol`, against the smallest fixed number of draws
that would have done.

Networks are compared with a long run under other seeds, units with their closed form. What fixed numbers of draws
reach, in how many of 200 runs, is found by bisection over multiples of the blocks: it needs the truth, which a search
does not have.

Axes: T seeds, n examples, S draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision, decide, with_draws
from nntk_dist.planning.draw_search import find_draws
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.tile_estimates import tile_estimates
from scripts.studies.cells import Answer, Cell
from tests.harness.many_seeds import Problem
from tests.oracles.cases import Activate

RTOL, SHARE = 0.05, 0.9
_RUNS = 200
_REFERENCE = (4, 8192)  # runs of the reference and draws of each
_EXAMPLES = 24


@dataclass(frozen=True)
class Task:
    """A model, its examples and its kernel; `exact` is the closed form if there is one."""

    model: nn.Module
    x: Tensor
    spec: KernelSpec
    exact: Tensor | None = None

    def kernel(self, decision: Decision, seed: int) -> Tensor:
        """The unbiased kernel of all examples under one seed."""
        spec = replace(self.spec, seed=seed)
        features = make_feature_map(self.model, self.x, spec, decision)
        ids, draws = torch.arange(len(self.x)), range(features.num_draws)
        rows = features.compute(self.x, ids, draws, features.columns, batch=len(self.x))
        return tile_estimates(features, [(rows, rows)], spec.meeting, None, spec.scale)["unbiased"]


def cells(*, quick: bool) -> list[Cell]:
    """One cell for each task."""
    runs = 20 if quick else _RUNS
    tasks: dict[str, Callable[[], Task]] = {
        "relu network, autodiff": lambda: _network(torch.relu, "autodiff", 0.1),
        "sign network, activation": lambda: _network(torch.sign, "activation", 0.3),
        "relu unit, weight": lambda: _unit("relu"),
    }
    return [Cell(name, {"rtol": RTOL, "runs": runs}, partial(_answer, make, runs)) for name, make in tasks.items()]


def _answer(make: Callable[[], Task], runs: int) -> Answer:
    return _study(make(), runs)


def _network(activation: Callable[[Tensor], Tensor], estimator: str, gamma: float) -> Task:
    """10-32-32-3 in float32, initialised by torch from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = [nn.Linear(10, 32), Activate(activation), nn.Linear(32, 32), Activate(activation), nn.Linear(32, 3)]
        x = torch.randn(_EXAMPLES, 10)
    model = prepare_model(nn.Sequential(*layers), dtype=torch.float32, device="cpu")
    return Task(
        model,
        x,
        KernelSpec(gamma=gamma, estimator=estimator, variance_reduction="none", statistic="unbiased", rtol=RTOL),
    )


def _unit(unit: str) -> Task:
    """A unit of four parameters, by differences of outputs, in float64."""
    problem = Problem(unit, 4)
    model = prepare_model(problem.model(), dtype=torch.float64, device="cpu")
    spec = KernelSpec(
        gamma=problem.gamma, estimator="weight", variance_reduction="none", statistic="unbiased", rtol=RTOL
    )
    return Task(model, torch.from_numpy(problem.x), spec, torch.from_numpy(problem.exact()))


def _study(task: Task, runs: int) -> Answer:
    first = decide(task.model, task.x, task.spec, batch=len(task.x))

    def fixed(draws: int, seed: int) -> Tensor:
        return task.kernel(with_draws(first, task.spec, draws), seed)

    exact, uncertainty = task.exact, 0.0
    if exact is None:
        repeats, draws = _REFERENCE
        parts = torch.stack([fixed(draws, 10**6 + k) for k in range(repeats)])
        exact = parts.mean(0)
        spread = (parts - exact).square().sum((1, 2)).sum() / (repeats * (repeats - 1))
        uncertainty = float(spread.sqrt() / exact.norm())

    def error(kernel: Tensor) -> float:
        return float((kernel - exact).norm() / exact.norm())

    errors, found, bounds = [], [], []
    for seed in range(runs):
        spec = replace(task.spec, seed=seed)
        ids = torch.arange(len(task.x))
        decision, look = find_draws(task.model, [task.x], [ids], spec, first, batch=len(task.x))
        errors.append(error(task.kernel(decision, seed)))
        found.append(decision.num_draws)
        bounds.append(look.bound)

    def share(draws: int) -> float:
        return float(np.mean([error(fixed(draws, 10_000 + seed)) < RTOL for seed in range(runs)]))

    smallest, shares = _smallest(share, int(np.median(found)), task.spec.blocks)
    return {
        "below": int(np.sum(np.array(errors) < RTOL)),
        "runs": runs,
        "median_draws": float(np.median(found)),
        "draws_5_95": np.percentile(found, [5, 95]).tolist(),
        "median_error": float(np.median(errors)),
        "median_bound": float(np.median(bounds)),
        "smallest_fixed": smallest,
        "shares": shares,
        "reference_error": uncertainty,
    }


def _smallest(share: Callable[[int], float], start: int, unit: int) -> tuple[int, dict[str, float]]:
    """The smallest S, to about 6 %, at which runs of fixed S pass often enough; and what was found on the way."""
    shares: dict[str, float] = {}

    def passes(draws: int) -> bool:
        shares[str(draws)] = share(draws)
        return shares[str(draws)] >= SHARE

    high = max(unit, start // unit * unit)
    while not passes(high):
        high *= 2
    low = 0
    while high - low > max(unit, high // 16):
        middle = max(unit, (low + high) // 2 // unit * unit)
        if middle in (low, high):
            break
        if passes(middle):
            high = middle
        else:
            low = middle
    return high, dict(sorted(shares.items(), key=lambda item: int(item[0])))
