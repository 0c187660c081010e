"""Dropout: its masks, its place in torch models and in the builders, and refusals.

Axes: n examples, then the axes of a unit.
"""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from nntk_dist import Dropout, NNTKError, fixed_noise, nonlocal_kernel, replace_dropout
from nntk_dist.models.builders import build_model
from nntk_dist.models.noise import noise_modules


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_leave_out_their_share_and_keep_the_mean(p):
    """Binomial over 20,000 units at 0.1 %; neighbouring units and groups are independent."""
    layer, u = Dropout(p).eval(), torch.full((3, 20_000), 2.0, dtype=torch.float64)
    masks = []
    for group in range(2):
        with fixed_noise(layer, 0, group):
            values = layer(u)
        assert torch.equal(values[0], values[2])
        assert set(values.unique().tolist()) == {0.0, 2.0 / (1 - p)}
        masks.append((values[0] > 0).numpy())
        assert stats.binomtest(int(masks[-1].sum()), 20_000, 1 - p).pvalue > 1e-3
    for first, second in ((masks[0][1:], masks[0][:-1]), (masks[0], masks[1])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 3.9 / np.sqrt(20_000)


def test_channels_drop_out_whole():
    layer, u = Dropout(0.5, channelwise=True).eval(), torch.ones(2, 40, 3, 4)
    values = layer(u)
    assert torch.equal(values, values[:, :, :1, :1].expand_as(values))
    assert set(values.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("shape", "torchs"),
    [
        ((4, 6, 5), nn.Dropout(0.3)),
        ((4, 6), nn.Dropout(0.3)),
        ((4, 6, 5), nn.Dropout1d(0.3)),
        ((4, 6, 5, 2), nn.Dropout2d(0.3)),
        ((4, 6, 5, 2, 3), nn.Dropout3d(0.3)),
    ],
)
def test_training_is_that_of_torch(shape, torchs):
    u, channelwise = torch.ones(shape), type(torchs) is not nn.Dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torchs(u)
        torch.manual_seed(0)
        assert torch.equal(Dropout(0.3, channelwise=channelwise).train()(u), expected)


def test_channels_of_vectors_are_their_numbers_in_training_too():
    values = Dropout(0.5, channelwise=True).train()(torch.ones(200, 3))
    assert set(values.unique().tolist()) == {0.0, 2.0}
    assert int((values.std(1) > 0).sum()) > 0  # of one example some are left out, others not


def test_p_zero_is_the_identity():
    u = torch.randn(3, 4)
    assert Dropout(0.0).eval()(u) is u


@pytest.mark.parametrize("p", [-0.1, 1.0, 1, True, "half", float("nan")])
def test_shares_out_of_range(p):
    with pytest.raises(NNTKError, match=r"dropout is .*; allowed: a number from 0 to below 1"):
        Dropout(p)


def torch_model() -> nn.Module:
    shared = nn.Dropout(0.25)
    block = nn.Sequential(nn.Linear(4, 4), shared)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), shared, block, nn.Dropout1d(0.5), nn.Linear(4, 2)).eval()


def test_replacement_keeps_everything_else():
    model = torch_model()
    replaced = replace_dropout(model)
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 1  # the original is as it was
    assert {path: (layer.p, layer.channelwise) for path, layer in noise_modules(replaced).items()} == {
        "2": (0.25, False),
        "4": (0.5, True),
    }
    assert replaced[2] is replaced[3][1]
    assert replaced.state_dict().keys() == model.state_dict().keys()
    assert not any(module.training for module in replaced.modules())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert nonlocal_kernel(model, x, gamma=0.1).reason.count("noise") == 0
    assert "the noise of 2 modules" in nonlocal_kernel(replaced, x, gamma=0.1).reason
    assert isinstance(replace_dropout(nn.Dropout(0.5)), Dropout)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.MultiheadAttention(4, 2, dropout=0.1), r"module '1' is a MultiheadAttention with dropout, which has no"),
        (
            nn.LSTM(4, 4, num_layers=2, dropout=0.1),
            r"module '1' is a LSTM with dropout.*set its dropout to 0, or write",
        ),
        (nn.AlphaDropout(0.1), r"module '1' is a AlphaDropout with dropout.*a StochasticModule"),
        (
            nn.TransformerEncoderLayer(4, 2, 4, dropout=0.1),
            r"module '1.self_attn' is a MultiheadAttention with dropout",
        ),
        (nn.Dropout(1.0), r"dropout is 1.0; allowed: a number from 0 to below 1"),
        (nn.Tanh(), r"the model holds no nn.Dropout to replace; write its noise as a StochasticModule"),
    ],
)
def test_what_cannot_be_replaced(module, message):
    with pytest.raises(NNTKError, match=message):
        replace_dropout(nn.Sequential(nn.Linear(3, 4), module))


BUILDERS: dict[str, tuple[dict[str, Any], list[str], tuple[int, ...]]] = {
    "mlp": ({"widths": [4, 4]}, ["dropout0", "dropout1"], (6,)),
    "cnn": ({"channels": [3, 4]}, ["dropout0", "dropout1"], (2, 8, 8)),
    "transformer": (
        {"dim": 8, "depth": 2, "heads": 2, "hidden": 6},
        ["blocks.0.dropout", "blocks.1.dropout"],
        (2, 8, 8),
    ),
}


@pytest.mark.parametrize("builder", BUILDERS)
def test_builders_take_dropout(builder):
    args, paths, shape = BUILDERS[builder]

    def build(**more):
        return build_model(builder, {**args, **more}, input_shape=shape, num_outputs=3, seed=0)

    plain, noisy = build(), build(dropout=0.2)
    assert list(noise_modules(noisy)) == paths
    assert {layer.p for layer in noise_modules(noisy).values()} == {0.2}
    assert all(layer.channelwise == (builder == "cnn") for layer in noise_modules(noisy).values())
    assert [name for name, _ in build(dropout=0).named_modules()] == [name for name, _ in plain.named_modules()]
    for name, value in plain.state_dict().items():
        assert torch.equal(noisy.state_dict()[name], value)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    outputs = []
    for group in range(2):
        with fixed_noise(noisy, 0, group):
            outputs.append(noisy(x))
    assert not torch.isclose(*outputs).all()
    with pytest.raises(NNTKError, match=r"dropout is 1\.5; allowed: a number from 0 to below 1"):
        build(dropout=1.5)
