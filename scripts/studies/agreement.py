"""Agreement: every estimator, design and distribution against closed forms, quadrature or brute force.

A cell is one model under one law; it holds every estimator and design that is valid there, one estimate of many draws
each, with the library's own standard errors. The reference is exact if theory has it (units, two-layer networks under
radial laws, the quantised network under the Gaussian) and otherwise `tests.oracles.sampling`: the definition, drawn
very often by NumPy, with a standard error that is added to the estimate's. Agreement is asked of all entries at a
corrected 0.1 %, and the comparison must have been able to fail: every standard error at most 2 % of the mean diagonal,
local and nonlocal kernel ten standard errors apart or more, wherever theory does not say that they are equal.

Axes: n examples, S draws, R blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist import nonlocal_kernel
from nntk_dist.models.builders import build_model
from nntk_dist.sampling.laws import LAWS as ALL_LAWS
from scripts.studies.cells import Answer, Cell
from tests.harness.many_seeds import Problem, runs
from tests.oracles import brute_force, closed_forms, quantised, radial, sampling, two_layer
from tests.oracles.cases import case
from tests.oracles.statistics import critical_value

Array = np.ndarray
BLOCKS = 32
LARGEST_ERROR, LEAST_SEPARATION = 0.02, 10.0
LAWS = tuple(ALL_LAWS.locations)
DESIGNS = ("iid", "antithetic", "orthogonal")
UNITS = closed_forms.UNITS
BRUTE_FORCE_DRAWS, _BRUTE_FORCE_SEED = 1 << 18, 77


@dataclass(frozen=True)
class Subject:
    """A model with its examples and range, and draws of each estimator that is valid for it."""

    make: Callable[[], nn.Module]
    x: Tensor
    gamma: float
    draws: dict[str, int]
    nu: float | None = None  # Student's, if the default has too few moments for the depth

    def options(self, law: str) -> dict[str, Any]:
        """Options of a law."""
        return {"nu": self.nu} if law == "student" and self.nu is not None else {}


def _case(name: str, gamma: float, **draws: int) -> Subject:
    return Subject(case(name).build, case(name).inputs(3), gamma, draws)


def _transformer() -> nn.Module:
    """Three tokens and a class token of four numbers, one block."""
    arguments = {"dim": 4, "depth": 1, "heads": 2, "hidden": 6, "activation": "relu"}
    return build_model("transformer", arguments, input_shape=(3, 3), num_outputs=2, seed=0).double().eval()


def _convnet() -> nn.Module:
    """Overlapping and strided patches, 34 parameters; fewer vectors than numbers in them, so that noise reaches all."""
    layers = [nn.Conv2d(1, 2, 2, stride=2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2)]
    model = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _normal_inputs(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


_QUANTISED_INPUTS = torch.tensor([[0.8, 0.6], [-0.5, 0.9], [1.0, -0.7]], dtype=torch.float64)
NETWORKS = {
    "sign network": _case("sign_mlp", 1.5, weight=1 << 17, activation=1 << 15),
    "relu network": _case("relu_mlp", 1.5, weight=1 << 18, autodiff=4096, activation=1 << 15),
    "quantised network": Subject(quantised.QuantisedNetwork, _QUANTISED_INPUTS, 0.9, {"weight": 1 << 18}),
    "convnet": Subject(
        _convnet, _normal_inputs(1, 4, 4), 0.35, {"weight": 1 << 16, "autodiff": 3072, "activation": 1 << 14}
    ),
    "transformer": Subject(
        _transformer, _normal_inputs(3, 3), 0.1, {"weight": 1 << 17, "autodiff": 1280, "activation": 1 << 13}, nu=20.0
    ),
}
# The factor on the draws of `autodiff` for a law whose radii vary most.
_MORE_GRADIENTS = {
    ("relu network", "fractional"): 3,
    ("convnet", "fractional"): 3,
    ("convnet", "student"): 2,
    ("transformer", "fractional"): 15,
}
NAMES = (*(f"{unit} unit" for unit in UNITS), *NETWORKS)


def cells(*, quick: bool) -> list[Cell]:
    """A cell for each model and law; `quick` takes the small models under two laws."""
    names = [name for name in NAMES if not quick or name.endswith("unit") or name == "quantised network"]
    laws = ("gaussian", "sphere") if quick else LAWS
    return [_cell(name, law) for name in names for law in laws]


def _cell(name: str, law: str) -> Cell:
    draws = {estimator: draws_of(name, law, estimator) for estimator, _ in valid(name, law)}
    gamma = NETWORKS[name].gamma if name in NETWORKS else unit_problem(name, law).gamma
    settings = {"model": name, "law": law, "gamma": gamma, "draws": draws, "blocks": BLOCKS, "seed": 0}
    if name in NETWORKS:
        settings |= NETWORKS[name].options(law)
    return Cell(f"{name}, {law}", settings, lambda: _answer(name, law))


def _answer(name: str, law: str) -> Answer:
    truth = reference(name, law)
    methods = [examine(name, law, estimator, design, truth) for estimator, design in valid(name, law)]
    return {"reference": truth.kind, "methods": methods}


# What is valid --------------------------------------------------------------------------------------------------------


def valid(name: str, law: str) -> list[tuple[str, str]]:
    """Estimators and designs that are valid for a model under a law."""
    if name in NETWORKS:
        estimators = tuple(NETWORKS[name].draws)
    else:
        estimators = ("weight",) if name == "sign unit" else ("weight", "autodiff")
    pairs = [(estimator, design) for estimator in estimators for design in DESIGNS]
    if law == "lowrank":
        return [(e, design) for e, design in pairs if e == "weight" and design != "orthogonal"]
    return [(e, design) for e, design in pairs if e != "activation" or (law == "gaussian" and design != "orthogonal")]


def draws_of(name: str, law: str, estimator: str) -> int:
    """The draws that give enough power; most fractional draws are short and rarely flip a sign."""
    if name in NETWORKS:
        return NETWORKS[name].draws[estimator] * (_MORE_GRADIENTS.get((name, law), 1) if estimator == "autodiff" else 1)
    if estimator == "autodiff":
        return 1 << 16
    return 1 << 19 if (name, law) == ("sign unit", "fractional") else 1 << 18


# References -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A kernel, its standard error (0 if it is exact), its source, and the local kernel if it differs."""

    kernel: Array
    stderr: Array
    kind: str
    local: Array | None


@cache
def reference(name: str, law: str) -> Reference:
    """The kernel that estimates are compared with."""
    if name not in NETWORKS:
        problem = unit_problem(name, law)
        kernel, kind = unit_kernel(problem)
        return Reference(kernel, np.zeros_like(kernel), kind, problem.local())
    subject = NETWORKS[name]
    local = brute_force.local_kernel(subject.make(), subject.x, subject.x)
    gradient = _network_gradient(name, law)
    if gradient is not None:
        rows = brute_force.rows_of(gradient, "trace")
        return Reference(rows @ rows.T, np.zeros((3, 3)), "quadrature", local)
    options: dict[str, Any] = {"draws": BRUTE_FORCE_DRAWS, "blocks": BLOCKS, "seed": _BRUTE_FORCE_SEED}
    kernel, stderr = sampling.nonlocal_kernel(
        subject.make(), subject.x, law, subject.gamma, **options, **subject.options(law)
    )
    return Reference(kernel, stderr, "brute force", local)


def _network_gradient(name: str, law: str) -> Array | None:
    """g(x) by quadrature, if there is one."""
    subject = NETWORKS[name]
    parameters = [parameter.detach().numpy() for parameter in subject.make().parameters()]
    if name == "quantised network" and law == "gaussian":
        hidden, readout, offset = parameters
        return quantised.nonlocal_gradient(subject.x.numpy(), hidden, readout, offset, subject.gamma)
    if name not in ("sign network", "relu network") or law == "lowrank":
        return None
    unit, (w, b, v) = name.split()[0], parameters[:3]
    if law == "gaussian":
        return two_layer.nonlocal_gradient(unit, subject.x.numpy(), w, b, v, subject.gamma)
    count = sum(parameter.size for parameter in parameters)
    radii = radial.radii(radial.radius_law(law, subject.gamma, count), 4001)
    return two_layer.radial_gradient(unit, subject.x.numpy(), w, b, v, radii)


def unit_problem(name: str, law: str) -> Problem:
    """A unit of three parameters."""
    return Problem(name.split()[0], 3, distribution=law)


def unit_kernel(problem: Problem) -> tuple[Array, str]:
    """The kernel of a unit under a law: a vector of parameters is Gaussian under `lowrank`, and not shrunken."""
    if problem.distribution == "lowrank":
        rows = closed_forms.gaussian_gradient(problem.unit, problem.theta, problem.x, problem.gamma)
        return rows @ rows.T, "closed form"
    radial_law = problem.distribution != "gaussian" and problem.unit in ("sign", "relu")
    return problem.exact(), "quadrature" if radial_law else "closed form"


# Estimates ------------------------------------------------------------------------------------------------------------


def examine(name: str, law: str, estimator: str, design: str, truth: Reference) -> Answer:
    """One estimate against the reference: the largest |t|, what is allowed, and the power."""
    kernel, stderr, draws = estimate(name, law, estimator, design)
    error = np.hypot(stderr, truth.stderr)
    rounding = 1e-12 * np.diag(truth.kernel).mean()  # orthogonal groups of linear models are exact
    excess = np.abs(kernel - truth.kernel)
    t = float(np.max(np.where(excess <= rounding, 0.0, excess / np.maximum(error, 1e-300))))
    scale = float(np.diag(truth.kernel).mean())
    separation = None
    if truth.local is not None:
        apart = np.mean((truth.kernel - truth.local) ** 2)
        separation = float(np.sqrt(apart / max(np.mean(error**2), rounding**2)))
    limit = critical_value(kernel.size, BLOCKS - 1)
    powerful = float(error.max()) <= LARGEST_ERROR * scale and (separation is None or separation >= LEAST_SEPARATION)
    return {
        "estimator": estimator,
        "design": design,
        "draws": draws,
        "t": t,
        "limit": limit,
        "largest_error": float(error.max()) / scale,
        "separation": separation,
        "agrees": t <= limit,
        "powerful": bool(powerful),
    }


def estimate(name: str, law: str, estimator: str, design: str) -> tuple[Array, Array, int]:
    """The unbiased kernel with its standard error, NaN-free, and the draws taken."""
    if name not in NETWORKS:
        draws = _whole_groups(draws_of(name, law, estimator), 3, design)
        result = runs(unit_problem(name, law), estimator, range(1), draws=draws, blocks=BLOCKS, design=design)
        return result.centre[0], np.nan_to_num(result.stderr[0]), draws
    subject = NETWORKS[name]
    model = subject.make()
    draws = _whole_groups(draws_of(name, law, estimator), sum(p.numel() for p in model.parameters()), design)
    distribution = {"name": law, **subject.options(law)}
    options: dict[str, Any] = {
        "gamma": subject.gamma,
        "distribution": distribution,
        "estimator": estimator,
        "design": design,
    }
    one = nonlocal_kernel(model, subject.x, draws=draws, blocks=BLOCKS, seed=0, variance_reduction="none", **options)
    assert one.unbiased is not None
    assert one.stderr is not None
    return one.unbiased.numpy(), one.stderr.numpy(), draws


def _whole_groups(draws: int, num_parameters: int, design: str) -> int:
    """About `draws` draws: orthogonal blocks consist of groups of all P directions if these fit."""
    per_block = draws // BLOCKS
    if design != "orthogonal" or per_block < num_parameters:
        return draws
    return BLOCKS * num_parameters * round(per_block / num_parameters)
