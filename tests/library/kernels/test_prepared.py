"""`prepare_kernel`, the arguments of the public functions, and conversions of an estimate."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nntk_dist.kernels.prepared
from nntk_dist import (
    ArgumentError,
    Gaussian,
    KernelEstimate,
    StoreError,
    Student,
    averaged_kernel,
    covariance_kernel,
    local_kernel,
    nonlocal_kernel,
    prepare_kernel,
)
from nntk_dist.spec import KernelSpec, Kind, kernel_option_rows, kernel_options
from tests.oracles.cases import case

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "nonlocal": nonlocal_kernel, "covariance": covariance_kernel, "averaged": averaged_kernel, "local": local_kernel,
}  # fmt: skip
DRAWN = {"gamma": 0.5, "draws": 16, "blocks": 4}


def relu():
    return case("relu_mlp").build(), case("relu_mlp").inputs(5)


@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_a_prepared_kernel_is_the_kernel_of_its_function_and_decides_once(kind, monkeypatch):
    model, x = relu()
    options = {} if kind == "local" else DRAWN
    prepared = prepare_kernel(model, x, kind=kind, **options)
    monkeypatch.setattr(nntk_dist.kernels.prepared, "decide", None)  # a call must not decide again
    monkeypatch.setattr(nntk_dist.kernels.prepared, "make_feature_map", None)
    estimates = [prepared(x), prepared(x), prepared(x, x[:2])]
    monkeypatch.undo()
    expected = [FUNCTIONS[kind](model, x, **options), FUNCTIONS[kind](model, x, x[:2], **options)]
    kernels = [each if isinstance(each, torch.Tensor) else each.kernel for each in expected]
    assert torch.equal(estimates[0].kernel, kernels[0])
    assert torch.equal(estimates[1].kernel, kernels[0])
    assert torch.equal(estimates[2].kernel, kernels[1])
    with pytest.raises(ArgumentError, match=r"x2 has examples of shape \(3,\); allowed: \(4,\), as prepared"):
        prepared(x, x[:, :3])


@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_signatures_show_the_declared_options_and_defaults(kind):
    parameters = inspect.signature(FUNCTIONS[kind]).parameters
    assert list(parameters)[:3] == ["model", "x1", "x2"]
    own = {"model", "x1", "x2", "device", "dtype", "batch", "output"}
    assert set(kernel_options(kind)) == set(parameters) - own
    assert all(f" {name}: " in FUNCTIONS[kind].__doc__ for name in parameters)
    if kind != "local":
        assert parameters["max_draws"].default == KernelSpec().max_draws
        assert "contraction" in parameters or kind == "covariance"


def test_defaults_of_functions_and_of_the_configuration_differ_where_declared():
    assert inspect.signature(nonlocal_kernel).parameters["statistic"].default == "unbiased"
    assert KernelSpec().statistic == "both"
    assert KernelSpec().distribution == Gaussian(gamma=0.05)
    rows = {row.name: row.default for row in kernel_option_rows()}
    assert (rows["statistic"], rows["blocks"], rows["outputs"]) == ("both", "8", "trace")
    assert {row.name: row.default for row in kernel_option_rows(Kind.NONLOCAL)}["statistic"] == "'unbiased'"


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (nonlocal_kernel, {"gama": 1.0}, r"nonlocal_kernel has no option 'gama'; allowed: gamma, .*mean 'gamma'"),
        (covariance_kernel, DRAWN | {"statistic": "both"}, r"statistic is not an option of covariance_kernel, kin"),
        (local_kernel, {"gamma": 1.0}, r"gamma is not an option of local_kernel, kind local; allowed: outputs, contr"),
        (nonlocal_kernel, {}, r"gamma is missing; give nonlocal_kernel the range of the perturbations"),
        (
            nonlocal_kernel,
            {"gamma": 1.0, "distribution": Student(gamma=0.5)},
            r"gamma is 1\.0, but the distribution Student\(gamma=0\.5, nu=5\.0\) has its own; give one of them",
        ),
        (averaged_kernel, DRAWN | {"contraction": "sketch"}, r"contraction is 'sketch'; allowed for kind averaged"),
    ],
)  # fmt: skip
def test_options_that_do_not_exist_or_do_not_apply(function, options, message):
    model, x = relu()
    with pytest.raises(ArgumentError, match=message):
        function(model, x, **options)


def test_laws_are_accepted_as_objects_names_and_mappings():
    model, x = relu()
    forms = [
        {"distribution": Student(gamma=0.5, nu=4)},
        {"distribution": {"name": "student", "gamma": 0.5, "nu": 4}},
        {"gamma": 0.5, "distribution": {"name": "student", "options": {"nu": 4}}},
        {"gamma": 0.5, "distribution": {"name": "python:nntk_dist.sampling.laws.student:Student", "nu": 4}},
    ]
    kernels = [nonlocal_kernel(model, x, draws=16, blocks=4, **form).kernel for form in forms]
    assert all(torch.equal(kernel, kernels[0]) for kernel in kernels)


class Shell:
    """A user's law: the sphere, written as a plain class."""

    name, normalised = "shell", True

    def __init__(self, gamma: float, stretch: float = 1.0) -> None:
        self.gamma, self.stretch = gamma, stretch

    def scale(self, num_parameters, uniforms):
        return self.stretch * self.gamma * (num_parameters / 2.0) ** 0.5


def test_a_users_law_is_a_law():
    model, x = relu()
    name = f"python:{__name__}:Shell"
    sphere = nonlocal_kernel(model, x, gamma=0.5, distribution="sphere", draws=16, blocks=4).kernel
    for law in (Shell(0.5), {"name": name, "gamma": 0.5}, {"name": name, "gamma": 0.25, "options": {"stretch": 2.0}}):
        assert torch.equal(nonlocal_kernel(model, x, distribution=law, draws=16, blocks=4).kernel, sphere)
    with pytest.raises(ArgumentError, match=r"an option of distribution .*:Shell is 'stretsh'; .*mean 'stretch'"):
        nonlocal_kernel(model, x, distribution={"name": name, "gamma": 0.5, "stretsh": 1})


@pytest.mark.parametrize("change", ["reversed", "big-endian", "read-only", "columns"])
def test_numpy_arrays_of_any_layout_are_examples(change):
    model, x = relu()
    array = x.numpy().copy()
    if change == "reversed":
        array, x = array[::-1], x.flip(0)
    elif change == "big-endian":
        array = array.astype(array.dtype.newbyteorder(">"))
    elif change == "read-only":
        array.flags.writeable = False
    else:
        array = np.asfortranarray(array)
    assert torch.equal(local_kernel(model, array), local_kernel(model, x))
    weighting = {"name": "output", "reference": array, "temperature": 0.5}
    ours = nonlocal_kernel(model, array, array[:2], weighting=weighting, **DRAWN).kernel
    assert torch.equal(ours, nonlocal_kernel(model, x, x[:2], weighting=weighting | {"reference": x}, **DRAWN).kernel)


def test_arrays_that_are_no_numbers_are_refused():
    with pytest.raises(ArgumentError, match=r"x1 has dtype <U1; allowed: a tensor or NumPy array .*, of numbers"):
        local_kernel(relu()[0], np.array([["a"]]))
    with pytest.raises(ArgumentError, match=r"model is a function; allowed: a torch\.nn\.Module"):
        local_kernel(relu, torch.ones(1, 2))


def test_estimates_show_compare_convert_and_come_back(tmp_path):
    model, x = relu()
    one = nonlocal_kernel(model, x, x[:3], **DRAWN)
    assert repr(one).startswith("KernelEstimate(shape (5, 3), autodiff, 16 draws, relative error ")
    assert one == one
    assert one != nonlocal_kernel(model, x, x[:3], **DRAWN)
    arrays = one.numpy()
    assert all(isinstance(each, np.ndarray) for each in (arrays.kernel, arrays.stderr, arrays.plugin, arrays.unbiased))
    np.testing.assert_array_equal(arrays.interval()[0], one.interval()[0].numpy())
    one.save(tmp_path / "kernel.npz")
    again = KernelEstimate.load(tmp_path / "kernel.npz")
    for name in ("kernel", "stderr", "plugin", "unbiased"):
        assert torch.equal(getattr(again, name), getattr(one, name))
    for name in ("estimator", "reason", "draws", "relative_error", "relative_bias", "reached", "probes"):
        assert getattr(again, name) == getattr(one, name)
    covariance_kernel(model, x, **DRAWN).save(tmp_path / "kernel.npz")
    assert KernelEstimate.load(tmp_path / "kernel.npz").unbiased is None
    (tmp_path / "other.npz").write_bytes(b"no archive")
    with pytest.raises(StoreError, match=r"other\.npz: not a saved KernelEstimate"):
        KernelEstimate.load(tmp_path / "other.npz")
    with pytest.raises(StoreError, match=r"none\.npz: no such file"):
        KernelEstimate.load(tmp_path / "none.npz")


def test_estimates_become_datasets():
    pytest.importorskip("xarray")
    model, x = relu()
    dataset = nonlocal_kernel(model, x, x[:3], **DRAWN).to_xarray()
    assert dict(dataset.sizes) == {"row": 5, "column": 3}
    assert (dataset.attrs["estimator"], dataset.attrs["draws"]) == ("autodiff", 16)
