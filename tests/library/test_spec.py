"""Refusals of the kernels: one line each that names the value, what is allowed and what to do."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import KernelEstimate, NNTKError, averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.models.parameters import select_parameters
from nntk_dist.spec import KernelSpec
from tests.oracles.cases import case


def relu() -> tuple[nn.Module, Tensor]:
    return case("relu_mlp").build(), case("relu_mlp").inputs(4)


class Returns(nn.Module):
    """A model with a parameter that returns given values."""

    def __init__(self, make) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(x * self.scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "nonlokal"}, r"kind is 'nonlokal'; allowed: nonlocal, covariance, .*; did you mean 'nonlocal'\?"),
        ({"estimator": "autodif"}, r"estimator is 'autodif'; allowed: auto, weight, .*; did you mean 'autodiff'\?"),
        ({"statistic": "mean"}, r"statistic is 'mean'; allowed: plugin, unbiased, both"),
        ({"scale": "local"}, r"scale is 'local'; allowed: localized, raw; did you mean 'localized'\?"),
        ({"outputs": "all"}, r"outputs is 'all'; allowed: trace, full"),
        ({"draws": "automatic"}, r"draws is 'automatic'; allowed: auto"),
        ({"kind": "covariance", "estimator": "autodiff"}, r"'autodiff'; allowed for kind covariance, .*: auto, weight"),
        ({"kind": "covariance", "estimator": "activation"}, r"'activation'; allowed for kind covariance.*auto, weight"),
        ({"kind": "local", "estimator": "activation"}, r"'activation'; allowed for kind local, .*: auto, autodiff"),
        ({"kind": "averaged", "estimator": "weight"}, r"'weight'; allowed for kind averaged, .*: auto, autodiff"),
        ({"kind": "local", "estimator": "weight"}, r"'weight'; allowed for kind local, .*: auto, autodiff"),
    ],
)  # fmt: skip
def test_settings_that_do_not_exist_or_do_not_go_together(arguments, message):
    with pytest.raises(NNTKError, match=message):
        KernelSpec(**arguments)


@pytest.mark.parametrize("kernel", [nonlocal_kernel, covariance_kernel, averaged_kernel])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, r"gamma is 0\.0; allowed: a number above 0"),
        ({"distribution": "cauchy"}, r"distribution is 'cauchy'; allowed: gaussian"),
        ({"design": "orthogonal-ish"}, r"design is 'orthogonal-ish'; allowed: iid, antithetic"),
        ({"blocks": 2}, r"blocks is 2; allowed: 4 or more"),
        ({"blocks": 0}, r"blocks is 0; allowed: a whole number, 4 or more"),
        ({"draws": 9}, r"draws is 9, which does not fill 8 blocks .* a multiple of 8, the nearest: 8 or 16"),
        ({"outputs": 3}, r"outputs is 3; allowed: 0 to 2 \(the model has 3\), trace, full"),
        ({"outputs": -1}, r"outputs is -1; allowed: trace, full, or the index of one output, 0 or more"),
        ({"parameters": ["3.*"]}, r"parameters: the pattern '3\.\*' matches none of the model's 4 parameters"),
    ],
)
def test_arguments_out_of_range(kernel, arguments, message):
    model, x = relu()
    with pytest.raises(NNTKError, match=message):
        kernel(model, x, **{"gamma": 0.5, **arguments})


@pytest.mark.parametrize(
    ("x1", "x2", "message"),
    [
        (torch.zeros(0, 4), None, r"x1 is shape \(0, 4\); allowed: a tensor or NumPy array with one example or more"),
        (torch.tensor(1.0), None, r"x1 is shape \(\); allowed: a tensor or NumPy array with one example or more"),
        ([[1.0, 2, 3, 4]], None, r"x1 is \[\[1\.0, 2, 3, 4\]\]; allowed: a tensor or NumPy array"),
        (
            torch.zeros(2, 4),
            torch.zeros(0, 4),
            r"x2 is shape \(0, 4\); allowed: a tensor or NumPy array with one example or more",
        ),
    ],
)
def test_inputs_that_are_no_examples(x1, x2, message):
    with pytest.raises(NNTKError, match=message):
        local_kernel(relu()[0], x1, x2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, x), r"the model returned a tuple with 0 \(4, 3\), 1 \(4, 3\); allowed: one tensor"),
        (lambda x: x[:, None], r"returned shape \(4, 1, 3\) for 4 examples; allowed: \(4,\) or \(4, C\): choose"),
        (lambda x: x.sum(0), r"the model returned shape \(3,\) for 4 examples"),
        (lambda x: x.argmax(1), r"the model returned dtype torch\.int64; allowed: real floating point"),
        (lambda x: x / 0, r"the model's output: NaN or infinity for 4 of 4 examples, the first at row 0"),
        (lambda x: torch.where(x > 5, torch.nan, x), r"NaN or infinity for 1 of 4 examples, the first at row 2"),
    ],
    ids=["tuple", "three_axes", "no_rows", "integers", "infinite", "one_nan"],
)  # fmt: skip
@pytest.mark.parametrize("estimator", ["weight", "auto"])
def test_outputs_that_are_no_numbers(make, message, estimator):
    x = torch.ones(4, 3)
    x[2] = 9.0
    with pytest.raises(NNTKError, match=message):
        nonlocal_kernel(Returns(make), x, gamma=0.5, estimator=estimator)


def test_outputs_that_are_finite_until_they_are_perturbed():
    """The logarithm is finite at θ = 1; some draw takes θ below 0."""
    with pytest.raises(NNTKError, match=r"the model's output under draws 0 to 31: NaN or infinity for 4 of 4 examples"):
        nonlocal_kernel(Returns(torch.log), torch.ones(4, 3), gamma=3.0, estimator="weight")


def test_gradients_that_are_not_finite():
    """√ has a finite value at 0 and no finite derivative."""
    model = Returns(lambda x: torch.sqrt(x.abs()))
    with pytest.raises(
        NNTKError, match=r"the model's gradient under draws 0 to 0: NaN or infinity for 1 of 4 examples, .* row 3"
    ):
        local_kernel(model, torch.tensor([[1.0], [2.0], [3.0], [0.0]]))


def test_models_without_parameters():
    with pytest.raises(NNTKError, match=r"the model has no parameters; a tangent kernel needs at least one"):
        local_kernel(nn.ReLU(), torch.ones(2, 3))


def test_patterns_that_match_nothing_get_a_suggestion():
    model, _ = relu()
    with pytest.raises(
        NNTKError, match=r"'0\.wieght' matches none of the model's 4 parameters; did you mean '0\.weight'\?"
    ):
        select_parameters(model, ["0.wieght"])
    with pytest.raises(NNTKError, match=r"'Q' matches none .*; for example: 0\.weight, 0\.bias, 2\.weight"):
        select_parameters(model, ["0.*", "Q"])


def test_no_patterns():
    with pytest.raises(NNTKError, match=r"parameters is an empty list; allowed: one or more name patterns"):
        select_parameters(relu()[0], [])


def test_parameters_that_are_no_real_numbers():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)

    with pytest.raises(NNTKError, match=r"parameter 'codes' has dtype torch\.int64; allowed: floating point"):
        select_parameters(Table(), ["codes"])


def test_exact_kernels_have_no_intervals():
    exact = KernelEstimate(torch.ones(1, 1), None, None, None, "autodiff", "", 1, 1, 3, 0.0, None)
    with pytest.raises(NNTKError, match=r"this kernel has no standard error: it is exact \(kind local without"):
        exact.interval()


def test_messages_are_one_line():
    model, x = relu()
    for arguments in ({"gamma": -1.0}, {"blocks": 1}, {"outputs": 7}, {"parameters": ["z"]}, {"estimator": "magic"}):
        with pytest.raises(NNTKError) as caught:
            nonlocal_kernel(model, x, **{"gamma": 0.5, **arguments})
        assert "\n" not in str(caught.value)


def test_any_integer_type_is_an_integer_and_nothing_else_is():
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(4)
    one = local_kernel(model, x, outputs=np.int64(1))
    torch.testing.assert_close(one, local_kernel(model, x, outputs=1), rtol=0, atol=0)
    assert not torch.allclose(one, local_kernel(model, x))
    for wrong in (None, 1.0):
        with pytest.raises(NNTKError, match=f"outputs is {wrong!r}; allowed: trace, full, or the index of one output"):
            local_kernel(model, x, outputs=wrong)
    with pytest.raises(NNTKError, match=r"draws is 8\.0; allowed: auto, or a whole number, 1 or more"):
        nonlocal_kernel(model, x, gamma=1.0, draws=8.0)


class Together(nn.Module):
    """An output that depends on the rest of the batch, or on luck."""

    def __init__(self, luck: bool) -> None:
        super().__init__()
        self.inner, self.luck = nn.Linear(3, 2).double(), luck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.inner(x), training=True) if self.luck else self.inner(x - x.mean(0))


@pytest.mark.parametrize(
    ("luck", "message"), [(True, "changes from call to call"), (False, "depends on the other examples of its batch")]
)
def test_what_is_no_function_of_an_example_and_the_parameters_is_refused(luck, message):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    with pytest.raises(NNTKError, match=message):
        covariance_kernel(Together(luck), x, gamma=0.1)


def test_a_forward_pass_without_gradient_is_refused_for_gradients():
    class Frozen(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(NNTKError, match="carries no gradient"):
        local_kernel(Frozen(3, 2).double(), torch.ones(2, 3, dtype=torch.float64))


def test_one_pattern_may_be_given_as_it_is():
    model, x = case("relu_mlp").build(), case("relu_mlp").inputs(4)
    first, listed = (local_kernel(model, x, parameters=patterns) for patterns in ("0.*", ["0.*"]))
    torch.testing.assert_close(first, listed, rtol=0, atol=0)
    assert not torch.allclose(first, local_kernel(model, x))
