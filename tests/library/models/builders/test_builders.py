"""Every built-in model: shapes, reproducibility, function transforms, and refusals."""

import pytest
import torch
from torch.func import functional_call, jacrev, stack_module_state, vmap

from nntk_dist.errors import NNTKError
from nntk_dist.models.builders import BUILDERS, build_model

IMAGE = (3, 8, 8)
CASES = {
    "mlp": ("mlp", {"widths": [5, 4]}, IMAGE),
    "mlp-linear": ("mlp", {"widths": [], "bias": False}, (6,)),
    "mlp-sign": ("mlp", {"widths": [5], "activation": "sign"}, (6,)),
    "mlp-step": ("mlp", {"widths": [5], "activation": "step"}, (6,)),
    "mlp-quantize": ("mlp", {"widths": [5], "activation": {"name": "quantize", "levels": 4}}, (6,)),
    "cnn": ("cnn", {"channels": [3, 4], "activation": "tanh"}, IMAGE),
    "cnn-flatten": ("cnn", {"channels": [2], "pool": "max", "readout": "flatten"}, (8, 8)),
    "resnet-batch": ("resnet", {"depth": 8, "width": 4}, IMAGE),
    "mlp-dropout": ("mlp", {"widths": [6, 5], "dropout": 0.3}, (4, 3)),
    "cnn-dropout": ("cnn", {"channels": [3, 4], "dropout": 0.3}, IMAGE),
    "transformer-dropout": ("transformer", {"dim": 8, "depth": 1, "heads": 2, "hidden": 6, "dropout": 0.3}, IMAGE),
    "resnet-group": ("resnet", {"depth": 8, "width": 4, "norm": "group"}, IMAGE),
    "resnet-none": ("resnet", {"depth": 14, "width": 2, "norm": "none"}, (8, 8)),
    "transformer-image": ("transformer", {"dim": 8, "depth": 1, "heads": 2, "hidden": 6}, IMAGE),
    "transformer-vector": ("transformer", {"dim": 8, "depth": 2, "heads": 2, "hidden": 6, "pool": "mean"}, (5,)),
    "transformer-sequence": ("transformer", {"dim": 8, "depth": 1, "heads": 4, "hidden": 6}, (5, 3)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def build(case, seed=0):
    builder, args, input_shape = case
    return build_model(builder, args, input_shape=input_shape, num_outputs=3, seed=seed)


def inputs(case, count=4, dtype=torch.float32):
    return torch.randn(count, *case[2], generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_cases_cover_every_builder():
    assert {builder for builder, _, _ in CASES.values()} == set(BUILDERS) - {"hf"}  # which needs a folder


def test_shape_type_and_mode(case):
    model = build(case)
    output = model(inputs(case))
    assert output.shape == (4, 3)
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_examples_do_not_see_each_other(case):
    model, x = build(case).double(), inputs(case, dtype=torch.float64)
    alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(model(x), alone, rtol=1e-12, atol=1e-12)


def test_the_seed_decides_and_the_global_state_stays(case):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(case, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = build(case, seed=7), build(case, seed=8)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap_over_parameters_equals_a_loop(case, dtype):
    models = [build(case, seed).to(dtype) for seed in range(3)]
    x = inputs(case, dtype=dtype)
    parameters, buffers = stack_module_state(models)
    stacked = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    loop = torch.stack([model(x) for model in models])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(stacked, loop, rtol=tolerance, atol=tolerance)


def test_jacrev_equals_a_loop_of_backward_passes(case):
    model, x = build(case).double(), inputs(case, count=2, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    output = model(x)
    for index in ((0, 0), (1, 2)):
        gradients = torch.autograd.grad(output[index], list(model.parameters()), retain_graph=True)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(jacobian[name][index], gradient, rtol=1e-10, atol=1e-12)


def test_depth_of_the_resnet_counts_its_layers():
    model = build_model("resnet", {"depth": 20}, input_shape=(3, 32, 32), num_outputs=10, seed=0)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 20
    # He et al. report 0.27 million parameters for this network
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722


def test_image_patches_are_contiguous_squares():
    model = build_model("transformer", {"patch": 2}, input_shape=(2, 4, 6), num_outputs=1, seed=0)
    image = torch.arange(48.0).reshape(1, 2, 4, 6)
    tokens = model.tokens(image)
    assert tokens.shape == (1, 6, 8)
    assert torch.equal(tokens[0, 4], image[0, :, 2:4, 2:4].reshape(-1))


BAD = [
    ("mlpp", {}, r"model builder is 'mlpp'; allowed: mlp, .*did you mean 'mlp'\?"),
    ("mlp", {"width": [3]}, r"model mlp takes no argument 'width'.*did you mean 'widths'\?"),
    ("mlp", {"widths": 3}, r"mlp: widths is 3; give a list of integers"),
    ("mlp", {"widths": [3, 0]}, r"mlp: widths\[1\] is 0; give an integer of at least 1"),
    ("mlp", {"widths": [2.5]}, r"mlp: widths\[0\] is 2.5; give an integer"),
    ("mlp", {"activation": "relux"}, r"activation is 'relux'; allowed: relu, .*did you mean 'relu'\?"),
    ("cnn", {"kernel_size": 4}, r"cnn: kernel_size is 4; give an odd number"),
    ("cnn", {"pool": "mean"}, r"cnn: pool is 'mean'; allowed: average, max, none"),
    ("cnn", {"readout": "max"}, r"cnn: readout is 'max'; allowed: mean, flatten"),
    ("cnn", {"channels": []}, r"cnn: channels is empty"),
    ("cnn", {"channels": [2, 2, 2, 2]}, r"cnn: 4 poolings leave nothing of images of shape \(3, 8, 8\)"),
    ("resnet", {"depth": 21}, r"resnet: depth is 21; give 6k \+ 2, such as 20 or 26"),
    ("resnet", {"norm": "layer"}, r"resnet: norm is 'layer'; allowed: batch, group, none"),
    ("transformer", {"dim": 6}, r"transformer: dim is 6 and heads 4; dim must be a multiple of heads"),
    ("transformer", {"patch": 3}, r"transformer: patch is 3, which does not divide images of 8 x 8 pixels"),
    ("transformer", {"pool": "max"}, r"transformer: pool is 'max'; allowed: class, mean"),
]


@pytest.mark.parametrize(("builder", "args", "message"), BAD)
def test_bad_builders_and_arguments(builder, args, message):
    with pytest.raises(NNTKError, match=message) as caught:
        build_model(builder, args, input_shape=IMAGE, num_outputs=3, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("builder", ["cnn", "resnet"])
def test_convolutions_refuse_vectors(builder):
    with pytest.raises(NNTKError, match=r"needs images.*has shape \(6,\); use mlp or transformer"):
        build_model(builder, {}, input_shape=(6,), num_outputs=3, seed=0)


def test_transformer_refuses_other_shapes():
    with pytest.raises(NNTKError, match=r"transformer takes images.*has shape \(1, 2, 3, 4\); use mlp"):
        build_model("transformer", {}, input_shape=(1, 2, 3, 4), num_outputs=3, seed=0)


def test_negative_seed():
    with pytest.raises(NNTKError, match="model seed is -1; give an integer of at least 0"):
        build_model("mlp", {}, input_shape=(2,), num_outputs=1, seed=-1)
