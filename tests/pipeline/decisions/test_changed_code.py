"""Code that changes under a run: of a model, an output, a score, a distribution or a source; between runs, and between
driver and worker. Values that differ by rounding alone are the same code.
"""

import re
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pipeline.work.stages
from nntk_dist.errors import ModelError
from pipeline.config.schema import load_config
from pipeline.decisions.build import build_dataset, build_model, function_values
from pipeline.driver.run import state_of
from pipeline.planning.plan import make_plan
from pipeline.work.context import Context
from tests.pipeline.tools import assert_same_bits, config_file, finished, nntk, run, snapshot

MODULE = """
    import numpy as np
    import torch
    from dataclasses import dataclass
    from torch import nn
    from nntk_dist import BlackBox
    from nntk_dist.sampling.laws.base import Ranged
    from nntk_dist.models.noise import StochasticModule

    def plain():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.inner, self.last = nn.Linear(64, 3), nn.Linear(64, 5), nn.Linear(5, 3)
            nn.init.zeros_(self.last.weight)

        def forward(self, x):
            x = x.flatten(1)
            return self.main(x) + self.last(self.inner(x).tanh())

    def branch():
        return Branch()

    class Jitter(StochasticModule):
        def forward(self, u):
            return u + 0.1 * self.normals(u.shape[1:], like=u)

    def noisy():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), Jitter(), nn.Linear(6, 3))

    def box():
        return BlackBox(lambda p, x: np.tanh(x.reshape(len(x), -1) @ p), np.linspace(-1, 1, 64))

    def frozen():
        model = plain()
        model[1].requires_grad_(True)
        return model

    class Norm(nn.Module):
        def forward(self, x):
            return nn.functional.normalize(x.float(), dim=1).to(x.dtype)

    def mixed():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), Norm(), nn.Linear(6, 3))

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(context, u):
            return u.tanh()

        @staticmethod
        def backward(context, gradient):
            return 1.0 * gradient

    class Straight(nn.Module):
        def forward(self, u):
            return Rounded.apply(u)

    def straight():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), Straight(), nn.Linear(6, 3))

    def narrow():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), Probability())
        nn.init.uniform_(model[1].weight, 0.0, 0.01)
        return model

    class Probability(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.tensor(0.995))

        def forward(self, u):
            return u * torch.log(1 - self.p)

    @dataclass(frozen=True)
    class Ring(Ranged):
        name = "ring"
        normalised = True

        def scale(self, num_parameters, uniforms):
            side = torch.sign(uniforms() - 0.5)
            return self.gamma * torch.sqrt((1 + 0.5 * side) * num_parameters / 2)

    def chosen(result):
        return result.tanh().sum(1)

    def nearness(theta, moved, base, outputs):
        return -(outputs - base).abs().sum((1, 2))

    def source(scale=1.0):
        x = np.random.default_rng(0).standard_normal((60, 64))
        return scale * np.tanh(x), np.arange(60) % 3
"""
SMALL = ("data.train=29", "data.test=11", "compute.tile=16", "kernel.draws=64", "model.args={}")
CASES = {
    "a model": (
        "model.builder=python:own_code:plain",
        ("Tanh", "ReLU"),
        "own_code:plain .*f has other values on 4 of 4",
    ),
    "a branch that is zero": ("model.builder=python:own_code:branch", (".tanh()", ".relu()"), "f has other values"),
    "a model with noise": ("model.builder=python:own_code:noisy", ("0.1 *", "0.2 *"), "f has other values"),
    "a black box": ("model.builder=python:own_code:box", ("np.tanh(x.", "np.sin(x."), "f has other values"),
    "frozen layers": (
        "model.builder=python:own_code:frozen",
        ("grad_(True", "grad_(False"),
        "or freezes others.*another kind of processor",
    ),
    "first parameters": (
        "model.builder=python:own_code:plain",
        ("return nn", "torch.rand(1); return nn"),
        "parameters",
    ),
    "an output": (
        "model.output={function: python:own_code:chosen} model.builder=python:own_code:plain",
        ("result.tanh()", "result.sin()"),
        "the code of python:own_code:plain, python:own_code:chosen has changed since",
    ),
    "another gradient of the same values": (
        "model.builder=python:own_code:straight kernel.kind=local",
        ("1.0 * gradient", "0.5 * gradient"),
        "own_code:straight has changed since: f has the same values and another gradient",
    ),
    "a distribution": (
        "kernel.distribution.name=python:own_code:Ring model.builder=mlp",
        ("(1 + 0.5", "(1 + 0.4"),
        "python:own_code:Ring has changed since: the distribution gives other draws",
    ),
    "not finite where parameters are larger": (
        "model.builder=python:own_code:narrow kernel.distribution.gamma=1e-4",
        ("torch.log(1", "torch.log2(1"),
        "own_code:narrow has changed since: f has other values on 4 of 4",
    ),
    "a score": (
        "kernel.weighting={name: python:own_code:nearness} model.builder=mlp",
        (".abs()", ".square()"),
        "python:own_code:nearness has changed since: the weighting gives other scores",
    ),
    "a source": (
        "data.source=python:own_code:source model.builder=mlp",
        ("scale * np.tanh", "scale * np.sin"),
        r"'python:own_code:source' gives other examples \(train.inputs, test.inputs\).*or it draws random numbers",
    ),
}


def write(folder, old="", new=""):
    (folder / "own_code.py").write_text(textwrap.dedent(MODULE.replace(old, new)))
    sys.modules.pop("own_code", None)


@pytest.fixture(autouse=True)
def own_code(tmp_path, monkeypatch):
    """A module of a user's own code on the import path, never from a cache of bytecode."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(tmp_path)
    yield
    sys.modules.pop("own_code", None)


def stop_after(count, monkeypatch):
    """Interrupt the stage `features` after some tasks."""
    stage_class = pipeline.work.stages.STAGES.get("features")
    execute, calls = stage_class.execute, []

    def interrupted(self, context, task):
        calls.append(task.tile)
        if len(calls) > count:
            raise KeyboardInterrupt
        return execute(self, context, task)

    monkeypatch.setattr(stage_class, "execute", interrupted)


@pytest.mark.parametrize("name", CASES)
def test_changed_code_is_refused_and_named(name, tmp_path):
    changes, (old, new), message = CASES[name]
    sets = (*SMALL, *re.split(r" (?=model\.|kernel\.)", changes))
    place = finished(tmp_path / "run", *sets)
    before = snapshot(place)
    assert "nothing was done" in run(place, *sets).out
    write(tmp_path, old, new)
    for result in (run(place, *sets), run(place, *sets, resume=True), nntk("verify", place)):
        assert result.code == 2
        text = " ".join(result.err.split())
        assert "holds another kernel: " in text
        assert re.search(message, text), text
        assert "choose another run_dir" in text
    assert snapshot(place) == before
    write(tmp_path)
    assert "nothing was done" in run(place, *sets, resume=True).out


def test_a_stopped_run_goes_on_with_its_own_code_alone(tmp_path, monkeypatch):
    sets = (*SMALL, "model.builder=python:own_code:plain", "compute.tile=8")
    whole = finished(tmp_path / "whole", *sets)
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        assert run(tmp_path / "run", *sets).code == 130
    write(tmp_path, "Tanh", "ReLU")
    refused = run(tmp_path / "run", *sets, resume=True)
    assert refused.code == 2
    assert "the code of python:own_code:plain has changed since" in " ".join(refused.err.split())
    write(tmp_path, "def plain", "# another comment\n    def plain")
    assert_same_bits(whole, finished(tmp_path / "run", *sets, resume=True))


def made(tmp_path, *sets):
    config = load_config(config_file(tmp_path / "run"), [f"run_dir={tmp_path / 'run'}", *SMALL, *sets])
    dataset = build_dataset(config)
    return config, dataset, build_model(config, dataset)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Tanh", "ReLU", r"the worker on .* builds another model than the driver: f has other values on 4 of 4 rows"),
        ("6", "7", r"builds another model than the driver: .*size mismatch.*; give all machines the same code of"),
    ],
)
def test_a_worker_that_builds_another_model_refuses(old, new, message, tmp_path):
    config, dataset, model = made(tmp_path, "model.builder=python:own_code:plain")
    job = make_plan(config, dataset, model).job
    assert Context(job, dataset, state_of(model)).model is not None
    write(tmp_path, old, new)
    with pytest.raises(ModelError, match=message):
        _ = Context(job, dataset, state_of(model)).model


@pytest.mark.process
def test_a_worker_on_ray_that_imports_changed_code_refuses(tmp_path, monkeypatch):
    """The driver has imported the module; the file changes before the workers do."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    sets = (*SMALL, "model.builder=python:own_code:plain", "compute.executor=ray", "compute.workers=1")
    __import__("own_code")
    (tmp_path / "own_code.py").write_text(textwrap.dedent(MODULE.replace("Tanh", "ReLU")))
    result = run(tmp_path / "run", *sets)
    assert result.code == 2
    assert "builds another model than the driver: f has other values" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("builder", "precision"),
    [("plain", "float64"), ("noisy", "float64"), ("mixed", "float32"), ("box", "float32"), ("branch", "float64")],
)
def test_values_are_the_same_up_to_the_precision_of_the_model(builder, precision, tmp_path):
    config, dataset, model = made(tmp_path, f"model.builder=python:own_code:{builder}")
    values = function_values(config, dataset, model)
    assert values.precision == precision
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert values.difference(function_values(config, dataset, model)) is None
    finally:
        torch.set_num_threads(threads)
    exact = np.array(values.outputs)
    eps = torch.finfo(getattr(torch, precision)).eps
    for size, same in ((10 * eps, True), (100 * eps**0.5, False)):
        moved = tuple(tuple(map(tuple, each)) for each in (exact * (1 + size)).tolist())
        assert (values.difference(replace(values, outputs=moved)) is None) is same


def test_values_of_many_outputs_are_projections_that_each_output_changes(tmp_path):
    config, dataset, model = made(tmp_path, "model.builder=mlp", "data.train=30")
    values = function_values(config, dataset, model)
    assert np.array(values.outputs).shape == (2, 4, 4)
    last = [each for each in model.modules() if isinstance(each, nn.Linear)][-1]
    for output in range(10):
        with torch.no_grad():
            last.bias[output] += 1e-3
        assert "f has other values on 4 of 4 rows" in values.difference(function_values(config, dataset, model))
        with torch.no_grad():
            last.bias[output] -= 1e-3
    assert values.difference(function_values(config, dataset, model)) is None
