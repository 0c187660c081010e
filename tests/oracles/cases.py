"""A table of small models with inputs: every claim about "any model" is tested on all of these.

Every module is built in float64, with at most 200 parameters filled from the case's own generator, in eval mode.
Nothing is shared: each call of `build` and `inputs` makes new objects, equal to the last ones bit for bit.

Axes: n examples (first axis of every input), then the model's own axes; outputs (n, C), or (n,) if stated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A model to test on. `lipschitz` says that gradients at perturbed parameters estimate the nonlocal gradient.

    `vectors_only` says that every parameter sits in a Linear that is applied once, to one vector per example.
    `token_range`, if positive, says that inputs are integers below it.
    """

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    num_outputs: int
    lipschitz: bool = True
    vectors_only: bool = False
    token_range: int = 0
    seed: int = 0

    def build(self) -> nn.Module:
        """Make a new module with parameters of standard deviation 0.7 from the case's own generator."""
        with torch.random.fork_rng(devices=[]):  # the layers' initialisation (overwritten below) draws globally
            model = self.make().double()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return model.eval()

    def inputs(self, n: int = 4, seed: int = 1) -> Tensor:
        """The first n examples of a seed: standard normal numbers, or tokens."""
        generator = torch.Generator().manual_seed(seed)
        if self.token_range:
            return torch.randint(self.token_range, (n, *self.input_shape), generator=generator)
        return torch.randn((n, *self.input_shape), generator=generator, dtype=torch.float64)


def half_square(u: Tensor) -> Tensor:
    return 0.5 * u**2


def identity(u: Tensor) -> Tensor:
    return u


UNIT_ACTIVATIONS: dict[str, Activation] = {
    "linear": identity,
    "quadratic": half_square,
    "sign": torch.sign,
    "relu": torch.relu,
}


class Unit(nn.Module):
    """f(x; θ) = φ(θ·x) with one parameter vector, shape (n, 1): the models of `closed_forms`."""

    def __init__(self, activation: Activation, num_parameters: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(num_parameters))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ self.theta)[:, None]


def unit_problem(num_parameters: int, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """θ of length about 1 and n inputs of length about √P; the last is −½ of the first, which kernels must handle."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(num_parameters, generator=generator, dtype=torch.float64) / num_parameters**0.5
    x = torch.randn((n, num_parameters), generator=generator, dtype=torch.float64)
    x[-1] = -0.5 * x[0]
    return theta, x


def unit_module(name: str, theta: Tensor) -> nn.Module:
    """The unit of `closed_forms` with this parameter vector, in float64."""
    model = Unit(UNIT_ACTIVATIONS[name], len(theta)).double()
    with torch.no_grad():
        model.theta.copy_(theta)
    return model.eval()


class Activate(nn.Module):
    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class StraightThroughSign(nn.Module):
    """sign(u), with the identity for a derivative: differentiable on paper, a jump in fact."""

    def forward(self, u: Tensor) -> Tensor:
        return u + (torch.sign(u) - u).detach()


class FlatOutput(nn.Module):
    """A network with one output per example and no output axis: (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(nn.Tanh(), outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


class TiedWeights(nn.Module):
    """The second layer is the first one's transpose: one parameter, used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 4, bias=False)
        self.decoder = nn.Linear(4, 5, bias=False)
        self.readout = nn.Linear(5, 2)
        self.readout_again = self.readout

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encoder(x))
        return self.readout(functional.linear(hidden, self.encoder.weight.T)) + self.readout_again(self.decoder(hidden))


class RepeatedLayer(nn.Module):
    """One Linear applied three times over: a recurrent network unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.readout = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return self.readout(x)


class RawParameters(nn.Module):
    """Parameters that belong to no layer: a learned scale, and an offset shared by all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.relu(self.hidden(x) + self.offset)) * self.scale


class TokenMeans(nn.Module):
    """Token and position embeddings, a Linear on (n, T, d) tokens, the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.mix, self.readout = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.readout(torch.tanh(self.mix(embedded)).mean(1))


class Attention(nn.Module):
    """One pre-norm attention block over tokens and a class token, which is read out."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.qkv, self.mix, self.readout = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.class_token.expand(len(x), 1, 4), x], dim=1)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = torch.softmax(query @ key.transpose(1, 2) / 2.0, dim=-1)
        return self.readout((x + self.mix(scores @ value))[:, 0])


class Residual(nn.Module):
    """A residual step whose activation works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.readout = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.enter(x))
        return self.readout(self.activation(self.inner(x) + x))


def mlp(activation: nn.Module, *, outputs: int = 3, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6, bias=bias), activation, nn.Linear(6, outputs, bias=bias))


def deep_mlp(activation: Activation) -> nn.Sequential:
    layers = [nn.Linear(4, 6), Activate(activation), nn.Linear(6, 6), Activate(activation), nn.Linear(6, 2)]
    return nn.Sequential(*layers)


def layer_norm_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, (2, 3), groups=2, padding=(0, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def batch_norm_convnet() -> nn.Sequential:
    """Batch normalisation with running statistics that differ from 0 and 1, used in eval mode."""
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([0.2, -0.1, 0.4]))
    norm.running_var.copy_(torch.tensor([0.5, 1.5, 2.0]))
    convolution = nn.Conv2d(2, 3, 2, padding=1, padding_mode="circular")
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


def conv1d_net() -> nn.Sequential:
    convolution = nn.Conv1d(2, 3, 3, padding="same")
    return nn.Sequential(convolution, nn.GroupNorm(3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def _unit_case(name: str, num_parameters: int) -> Case:
    activation = UNIT_ACTIVATIONS[name]
    return Case(
        f"{name}_unit", lambda: Unit(activation, num_parameters), (num_parameters,), 1, lipschitz=name != "sign"
    )


def _mlp_case(name: str, make_activation: Callable[[], nn.Module], **options: Any) -> Case:
    bias, lipschitz = options.get("bias", True), options.get("lipschitz", True)
    return Case(name, lambda: mlp(make_activation(), bias=bias), (4,), 3, lipschitz=lipschitz, vectors_only=True)


CASES: tuple[Case, ...] = (
    *(_unit_case(name, 5) for name in UNIT_ACTIVATIONS),
    Case("affine", lambda: nn.Linear(4, 3), (4,), 3, vectors_only=True),
    _mlp_case("relu_mlp", nn.ReLU),
    _mlp_case("relu_mlp_no_bias", nn.ReLU, bias=False),
    _mlp_case("relu_mlp_in_place", lambda: nn.ReLU(inplace=True)),
    _mlp_case("tanh_mlp", nn.Tanh),
    _mlp_case("tanh_mlp_no_bias", nn.Tanh, bias=False),
    _mlp_case("sign_mlp", lambda: Activate(torch.sign), lipschitz=False),
    _mlp_case("sign_mlp_no_bias", lambda: Activate(torch.sign), bias=False, lipschitz=False),
    _mlp_case("straight_through_mlp", StraightThroughSign, lipschitz=False),
    Case("deep_sign_mlp", lambda: deep_mlp(torch.sign), (4,), 2, lipschitz=False, vectors_only=True),
    Case("deep_relu_mlp", lambda: deep_mlp(torch.relu), (4,), 2, vectors_only=True),
    Case("flat_output", FlatOutput, (4,), 1, vectors_only=True),
    Case("layer_norm", layer_norm_mlp, (4,), 2),
    Case("residual_in_place", Residual, (4,), 2, vectors_only=True),
    Case("tied_weights", TiedWeights, (5,), 2),
    Case("repeated_layer", RepeatedLayer, (4,), 2),
    Case("raw_parameters", RawParameters, (4,), 2),
    Case("linear_on_tokens", lambda: nn.Sequential(mlp(nn.Tanh()), nn.Flatten(), nn.Linear(9, 2)), (3, 4), 2),
    Case("embedding", TokenMeans, (5,), 3, token_range=7),
    Case("attention", Attention, (3, 4), 2),
    Case("convnet", convnet, (2, 5, 5), 3),
    Case("batch_norm", batch_norm_convnet, (2, 4, 4), 2),
    Case("conv1d", conv1d_net, (2, 4), 2),
)


def case(name: str) -> Case:
    """The case of this name."""
    return next(entry for entry in CASES if entry.name == name)
