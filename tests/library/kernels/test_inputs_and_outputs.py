"""Examples of several parts, outputs of any kind, frozen, complex and half-precision parameters: the kernel is that of
the function that a plain autograd loop differentiates, one example at a time.

Axes: n examples, t positions, c outputs, P parameters.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nntk_dist import local_kernel, nonlocal_kernel, prepare_kernel
from nntk_dist.errors import ArgumentError, ModelError
from tests.oracles.autograd_loop import kernel_by_loop

N, T, V = 4, 6, 7
EXACT = {"rtol": 1e-10, "atol": 0.0}


class Tagger(nn.Module):
    """Tokens to logits at each position, in a dict as language models return it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 5)
        self.mixing = nn.Linear(5, 5)
        self.head = nn.Linear(5, V)

    def forward(self, input_ids, attention_mask=None, scale=None):
        h = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = torch.tanh(self.mixing(h + (h * mask[..., None]).cumsum(1)))
        return {"logits": self.head(h), "hidden": h}


def tagger():
    torch.manual_seed(0)
    return Tagger().double()


def tokens():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([6, 3, 5, 2])
    return {
        "input_ids": torch.randint(0, V, (N, T), generator=generator),
        "attention_mask": (torch.arange(T) < lengths[:, None]).long(),
    }


def logits(model, i):
    parts = {name: part[i : i + 1] for name, part in tokens().items()}
    return model(**parts)["logits"][0]


OUTPUTS = {
    "last": (
        {"part": "logits", "position": "last"},
        lambda m, i: logits(m, i)[tokens()["attention_mask"][i].sum() - 1],
    ),
    "mean": (
        {"part": "logits", "position": "mean"},
        lambda m, i: logits(m, i)[: tokens()["attention_mask"][i].sum()].mean(0),
    ),
    "all": ({"part": "logits", "position": "all"}, logits),
    "classes": ({"part": 0, "position": 0, "classes": [3, 1]}, lambda m, i: logits(m, i)[0, [3, 1]]),
    "next token": (
        {"part": "logits", "measure": "next_token_loss"},
        lambda m, i: cross_entropy(
            logits(m, i)[:-1][tokens()["attention_mask"][i, 1:] > 0],
            tokens()["input_ids"][i, 1:][tokens()["attention_mask"][i, 1:] > 0],
        ),
    ),
    "function": (lambda result: result["logits"][:, 1:3].flatten(1), lambda m, i: logits(m, i)[1:3]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_a_language_model(name):
    output, function = OUTPUTS[name]
    model = tagger()
    expected = kernel_by_loop(model, function, N)
    torch.testing.assert_close(local_kernel(model, tokens(), output=output), expected, **EXACT)
    estimate = nonlocal_kernel(model, tokens(), gamma=1e-3, output=output, draws=32)
    assert estimate.estimator == "autodiff"
    assert (estimate.kernel - expected).norm() < 5e-3 * expected.norm()
    assert "f is the output" in estimate.reason
    weighted = nonlocal_kernel(model, tokens(), gamma=1e-3, output=output, estimator="weight", draws=64)
    assert weighted.kernel.shape == (N, N)


def test_rectangular_kernels_and_prepared_ones_unpack_all_examples():
    model, x = tagger(), tokens()
    output, function = OUTPUTS["last"]
    expected = kernel_by_loop(model, function, N)
    few = {name: part[:2] for name, part in x.items()}
    torch.testing.assert_close(local_kernel(model, few, x, output=output), expected[:2], **EXACT)
    kernel = prepare_kernel(model, x, kind="local", output=output)
    torch.testing.assert_close(kernel(x, few).kernel, expected[:, :2], **EXACT)
    with pytest.raises(ArgumentError, match=r"x1 is a Tensor; allowed: the parts input_ids int64\[6\]"):
        kernel(x["input_ids"])
    with pytest.raises(
        ArgumentError, match=r"x2 has the parts input_ids int64\[6\]; allowed: input_ids int64\[6\], att"
    ):
        kernel(x, {"input_ids": x["input_ids"]})


class Sum(nn.Module):
    """Two inputs, given by position or as one tuple or dict."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a, b):
        return self.left(a) * torch.tanh(self.right(b))


class OfOneArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.sum = Sum()

    def forward(self, batch):
        a, b = (batch["a"], batch["b"]) if isinstance(batch, dict) else batch
        return self.sum(a, b)


@pytest.mark.parametrize("module", [Sum, OfOneArgument])
@pytest.mark.parametrize("named", [False, True])
def test_dicts_and_tuples_reach_the_model(module, named):
    torch.manual_seed(0)
    model = module().double()
    a, b = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    expected = kernel_by_loop(getattr(model, "sum", model), lambda m, i: m(a[i], b[i]), N)
    given = {"a": a.numpy(), "b": b.numpy()} if named else (a, b)
    torch.testing.assert_close(local_kernel(model, given), expected, **EXACT)


@pytest.mark.parametrize("named", [False, True])
def test_losses_take_the_labels_from_the_examples(named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, labels = torch.randn(N, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 1])
    expected = kernel_by_loop(model, lambda m, i: cross_entropy(m(x[i : i + 1]), labels[i : i + 1]), N)
    given = {"input": x, "labels": labels} if named else (x, labels)
    torch.testing.assert_close(local_kernel(model, given, output="loss"), expected, **EXACT)
    with pytest.raises(ArgumentError, match="output is loss, which compares with labels; give the examples as a dict"):
        local_kernel(model, x, output="loss")
    with pytest.raises(
        ArgumentError, match=r"output is margin, but the examples have the parts input float64\[3\]; add"
    ):
        local_kernel(model, {"input": x}, output="margin")


def test_arrays_of_any_layout():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = np.arange(12.0).reshape(4, 3)
    expected = local_kernel(model, x)
    frozen = x.copy()
    frozen.flags.writeable = False
    for given in (x[::-1][::-1], frozen, x.astype(">f8"), np.asfortranarray(x)):
        assert torch.equal(local_kernel(model, given), expected)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class TestFrozenParameters:
    def test_they_are_left_out(self):
        model = small()
        model[0].requires_grad_(False)
        expected = kernel_by_loop(small(), lambda m, i: m(X[i : i + 1]), N, {"2.weight", "2.bias"})
        torch.testing.assert_close(local_kernel(model, X), expected, **EXACT)
        estimate = nonlocal_kernel(model, X, gamma=0.1)
        assert estimate.num_parameters == 12
        assert "20 frozen parameters are left out" in estimate.reason
        assert nonlocal_kernel(model, X, gamma=0.1, parameters=["*.weight"]).num_parameters == 10

    def test_an_exact_name_takes_them(self):
        model = small()
        model.requires_grad_(False)
        model[2].bias.requires_grad_(True)
        expected = kernel_by_loop(small(), lambda m, i: m(X[i : i + 1]), N, {"0.weight", "2.bias"})
        torch.testing.assert_close(local_kernel(model, X, parameters=["0.weight", "*"]), expected, **EXACT)

    def test_a_kernel_of_frozen_parameters_alone_is_refused(self):
        model = small().requires_grad_(False)
        with pytest.raises(
            ArgumentError, match=r"all 4 parameters that match are frozen \(requires_grad=False\), such"
        ):
            local_kernel(model, X)

    def test_the_users_model_stays_as_it_was(self):
        model = small()
        model[0].requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        local_kernel(model, X)
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Fourier(nn.Module):
    """Complex weights on frequencies; both layers may share them."""

    def __init__(self, shared):
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        self.first.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))
        self.second.weight = self.first.weight if shared else nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))
        self.register_buffer("phase", torch.exp(1j * torch.arange(2, dtype=torch.float64)))
        self.readout = nn.Linear(3, 2).double()

    def forward(self, x):
        h = torch.fft.rfft(x) * self.phase
        return self.readout(torch.fft.irfft((h @ self.first.weight).tanh() @ self.second.weight, n=3))


@pytest.mark.parametrize("shared", [False, True])
def test_complex_parameters_are_two_real_ones(shared):
    torch.manual_seed(0)
    model = Fourier(shared)
    expected = kernel_by_loop(model, lambda m, i: m(X[i : i + 1]), N)
    torch.testing.assert_close(local_kernel(model, X), expected, **EXACT)
    estimate = nonlocal_kernel(model, X, gamma=1e-3, draws=16)
    assert estimate.estimator == "autodiff"
    assert estimate.num_parameters == 8 * (1 if shared else 2) + 8
    assert (estimate.kernel - expected).norm() < 1e-2 * expected.norm()
    one = kernel_by_loop(model, lambda m, i: m(X[i : i + 1]), N, {"first.weight"})
    torch.testing.assert_close(local_kernel(model, X, parameters=["first.weight"]), one, **EXACT)
    torch.testing.assert_close(local_kernel(model, X, dtype=torch.float32).double(), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_said(dtype):
    model = small().to(dtype)
    expected = kernel_by_loop(copy.deepcopy(model).double(), lambda m, i: m(X[i : i + 1]), N)
    estimate = nonlocal_kernel(model, X, gamma=1e-3, draws=16)
    assert estimate.kernel.dtype == torch.float32
    assert f"computed in float32, to which {str(dtype).removeprefix('torch.')} parameters were conv" in estimate.reason
    assert (estimate.kernel - expected).norm() < 1e-2 * expected.norm()


def test_parameters_without_a_shape_are_refused():
    with pytest.raises(ModelError, match="parameter 'weight' has no shape yet; call the model once on its inputs"):
        local_kernel(nn.LazyLinear(3), X)


def test_a_result_of_several_parts_names_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x), x

    with pytest.raises(
        ModelError, match=r"the model returned a tuple with 0 \(4, 2\), 1 \(4, 3\); allowed: one tensor"
    ):
        local_kernel(Two().double(), X)
    model = Two().double()
    expected = kernel_by_loop(model, lambda m, i: m(X[i : i + 1])[0], N)
    torch.testing.assert_close(local_kernel(model, X, output=0), expected, **EXACT)
