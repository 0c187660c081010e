"""Activations: values, zero derivatives at jumps, and refusals."""

import pytest
import torch

from nntk_dist.errors import NNTKError
from nntk_dist.models.builders import ACTIVATIONS, make_activation

POINTS = torch.tensor([-2.0, -0.4, 0.0, 0.3, 1.7], dtype=torch.float64)
VALUES = {
    "relu": [0, 0, 0, 0.3, 1.7],
    "identity": [-2, -0.4, 0, 0.3, 1.7],
    "sign": [-1, -1, 0, 1, 1],
    "step": [0, 0, 0, 1, 1],
    "tanh": [-0.9640275801, -0.3799489623, 0, 0.2913126125, 0.9354090706],
    "sigmoid": [0.1192029220, 0.4013123399, 0.5, 0.5744425168, 0.8455347349],
    "silu": [-0.2384058440, -0.1605249360, 0, 0.1723327551, 1.4374090494],
    "erf": [-0.9953222650, -0.4283923550, 0, 0.3286267595, 0.9837904586],
    "gelu": [-0.0455002639, -0.1378313034, 0, 0.1853734267, 1.6242387133],
    "quantize": [-1, -3 / 7, 1 / 7, 1 / 7 + 2 / 7, 1],
}


def test_every_activation_is_checked():
    assert set(VALUES) | {"brownian"} == set(ACTIVATIONS)


def test_a_brownian_activation_is_a_relu_on_average():
    """Within four standard errors √(|u|/2000) over 2,000 units with independent paths."""
    u = POINTS[:, None].expand(-1, 2000)
    values = make_activation({"name": "brownian", "sigma": 1.0, "reach": 4}).eval()(u)
    error = (values.mean(1) - POINTS.relu()).abs()
    assert (error <= 4 * (POINTS.abs() / 2000).sqrt()).all()


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    expected = torch.tensor(VALUES[name], dtype=torch.float64)
    before = POINTS.clone()
    torch.testing.assert_close(make_activation(name)(POINTS), expected, rtol=0, atol=1e-9)
    assert torch.equal(POINTS, before)


@pytest.mark.parametrize("name", ["sign", "step", "quantize"])
def test_jumps_have_the_derivative_zero_inside_the_graph(name):
    x = POINTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(make_activation(name)(x).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_quantizer_levels_and_limit():
    quantize = make_activation({"name": "quantize", "levels": 5, "limit": 2.0})
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    y = quantize(x)
    assert y.unique().tolist() == [-2, -1, 0, 1, 2]
    assert (y - x.clamp(-2, 2)).abs().max() <= 0.5


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (7, r"activation is 7; give a name \(relu, "),
        ({"levels": 3}, r"activation is \{'levels': 3\}; give a name"),
        ({"name": "relu", "inplace": True}, r"activation relu takes no argument 'inplace'; allowed: none"),
        ({"name": "quantize", "level": 3}, r"takes no argument 'level'.*did you mean 'levels'\?"),
        ({"name": "quantize", "levels": 1}, r"quantize: levels is 1; give an integer of at least 2"),
        ({"name": "quantize", "limit": 0}, r"quantize: limit is 0; give a positive number"),
        (
            {"name": "quantize", "limit": "high"},
            r"activation quantize failed with \{limit: 'high'\}: TypeError",
        ),
    ],
)
def test_bad_activations(activation, message):
    with pytest.raises(NNTKError, match=message):
        make_activation(activation)
