"""Coverage: how often intervals of nominal 95 % hold the exact kernel, over many seeds.

Units with four parameters have many flips and few draws; two-layer networks have contractions and sketches. The seed
moves draws, noise and sketch. Coverage is counted entry by entry: its mean over the entries, and its extremes, which
scatter by 0.7 % or more with a thousand seeds.

Axes: T seeds, n examples, S draws.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from nntk_dist.sampling.laws import radial_names
from nntk_dist.spec import KernelSpec
from scripts.studies.agreement import DESIGNS, unit_kernel
from scripts.studies.cells import Answer, Cell
from tests.harness.many_seeds import Problem, runs
from tests.harness.projecting import sketch_of_formed, sketch_of_gradients
from tests.harness.tools import all_rows, estimates_of, prepared_features
from tests.oracles import brute_force, two_layer
from tests.oracles.cases import case
from tests.oracles.statistics import covered

Array = np.ndarray
BLOCKS = 8
NOMINAL, BOUNDS = 0.95, (0.92, 0.98)
SEEDS, QUICK_SEEDS = 1000, 100
SKETCH = 64  # so short that most of the variance is its own


@dataclass(frozen=True)
class Question:
    """What is repeated under every seed; `contraction` is None for a unit."""

    subject: str
    kind: str
    estimator: str
    design: str
    distribution: str = "gaussian"
    draws: int = 256
    gamma: float = 1.5
    contraction: str | None = None

    @property
    def key(self) -> str:
        parts = (self.subject, self.kind, self.estimator, self.design, self.distribution, str(self.draws))
        return ", ".join((*parts, self.contraction) if self.contraction else parts)


def questions() -> list[Question]:
    """Units under every design and law, networks under every contraction."""
    result = [Question("sign unit", "nonlocal", "weight", design) for design in DESIGNS]
    for design in DESIGNS:
        result += [Question("relu unit", "nonlocal", estimator, design) for estimator in ("weight", "autodiff")]
    for law in (*(name for name in radial_names() if name != "gaussian"), "lowrank"):
        estimators = ("weight",) if law == "lowrank" else ("weight", "autodiff")
        result += [Question("relu unit", "nonlocal", each, "iid", law) for each in estimators]
    # More draws for heavy tails, enough that block means are formed instead of a metric.
    result += [Question("relu unit", "nonlocal", "weight", "iid", law, draws=2048) for law in ("fractional", "lowrank")]
    result.append(Question("sign unit", "nonlocal", "weight", "iid", draws=8192))
    for design in DESIGNS:
        result.append(Question("sign unit", "covariance", "weight", design))
        result.append(Question("relu unit", "averaged", "autodiff", design))
    for contraction, design in (("layered", "iid"), ("means", "antithetic"), ("sketch", "antithetic")):
        options: dict[str, Any] = {"gamma": 1.0, "contraction": contraction}
        result.append(Question("sign network", "nonlocal", "activation", design, draws=128, **options))
        result.append(Question("relu network", "nonlocal", "autodiff", design, draws=16, **options))
    return result


def cells(*, quick: bool) -> list[Cell]:
    """A cell for each question; `quick` asks them of few seeds, and of the units alone."""
    seeds = QUICK_SEEDS if quick else SEEDS
    asked = [each for each in questions() if not (quick and each.contraction)]
    return [
        Cell(each.key, {**vars(each), "seeds": seeds, "blocks": BLOCKS}, partial(_answer, each, seeds))
        for each in asked
    ]


def _answer(question: Question, seeds: int) -> Answer:
    centre, stderr, exact = (_network if question.contraction else _unit)(question, range(seeds))
    entries = np.triu_indices(len(exact))
    share = covered(centre, exact, stderr, BLOCKS, NOMINAL).mean(0)[entries]
    return {
        "lowest": float(share.min()),
        "highest": float(share.max()),
        "mean": float(share.mean()),
        "relative_stderr": float(np.sqrt(np.mean(stderr**2)) / np.diag(exact).mean()),
    }


def _unit(question: Question, seeds: range) -> tuple[Array, Array, Array]:
    """Estimates, standard errors and the truth of a unit."""
    problem = Problem(question.subject.split()[0], 4, question.kind, question.gamma, question.distribution)
    result = runs(problem, question.estimator, seeds, draws=question.draws, blocks=BLOCKS, design=question.design)
    exact = unit_kernel(problem)[0] if question.kind == "nonlocal" else problem.exact()
    return result.centre, result.stderr, exact


def _network(question: Question, seeds: range) -> tuple[Array, Array, Array]:
    """The same for a two-layer network, with passes under every seed; sketches use formed block means."""
    unit = question.subject.split()[0]
    model, x = case(f"{unit}_mlp").build(), case(f"{unit}_mlp").inputs(3)
    spec = KernelSpec(
        gamma=question.gamma,
        estimator=question.estimator,
        variance_reduction="none",
        design=question.design,
        draws=question.draws,
        blocks=BLOCKS,
        contraction=question.contraction or "auto",
        sketch=SKETCH if question.contraction == "sketch" else "auto",
    )
    own, _ = prepared_features(model, x, spec)
    sketching = question.contraction == "sketch"
    drawn, _ = prepared_features(model, x, replace(spec, contraction="means", sketch="auto")) if sketching else (own, 0)
    results = []
    for seed in seeds:
        features, reader = reseeded(drawn, seed), reseeded(own, seed)
        rows = all_rows(features, x)
        if sketching:
            project = sketch_of_formed if question.estimator == "activation" else sketch_of_gradients
            rows = project(features, rows, reader.sketch)
        results.append(estimates_of(reader, rows, rows, replace(spec, seed=seed)))
    centre, stderr = (torch.stack([result[name] for result in results]).numpy() for name in ("unbiased", "stderr"))
    parameters = [parameter.detach().numpy() for parameter in model.parameters()]
    w, b, v = parameters[:3]
    gradient = two_layer.nonlocal_gradient(unit, x.numpy(), w, b, v, question.gamma)
    exact = brute_force.rows_of(gradient, "trace")
    return centre, stderr, exact @ exact.T


def reseeded(features: Any, seed: int) -> Any:
    """The same features under other draws and another sketch."""
    changes = {"drawing": replace(features.drawing, seed=seed)}
    if features.sketch is not None:
        changes["sketch"] = replace(features.sketch, seed=seed)
    return replace(features, **changes)
