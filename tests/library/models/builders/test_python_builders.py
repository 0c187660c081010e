"""Models from `python:module:function`: the arguments of the function, and refusals."""

import textwrap

import pytest
import torch

from nntk_dist.errors import NNTKError
from nntk_dist.models.builders import build_model

MODULE = """
    import torch
    from torch import nn

    def plain(width):
        return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.Dropout(0.5), nn.Linear(width, 2)).double()

    def shaped(*, input_shape, num_outputs):
        return nn.Linear(*input_shape, num_outputs)

    def anything(**kwargs):
        assert kwargs["num_outputs"] == 3, "three outputs only"
        return nn.Linear(kwargs["input_shape"][0], kwargs["size"])

    class Holder:
        build = staticmethod(shaped)

    def no_model():
        return 4

    number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    name = f"own_models_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def build(location, args=None, num_outputs=3, seed=0):
    return build_model(f"python:{location}", args or {}, input_shape=(6,), num_outputs=num_outputs, seed=seed)


def test_only_accepted_arguments_are_passed(module):
    model = build(f"{module}:plain", {"width": 4})
    x = torch.ones(5, 6)
    assert model(x).shape == (5, 2)
    assert model(x).dtype == torch.float32
    assert torch.equal(model(x), model(x)), "dropout is active: not in eval mode"
    assert torch.equal(model(x), build(f"{module}:plain", {"width": 4})(x))
    assert not torch.equal(model(x), build(f"{module}:plain", {"width": 4}, seed=1)(x))


def test_shapes_are_offered_to_those_that_take_them(module):
    assert build(f"{module}:shaped")(torch.ones(2, 6)).shape == (2, 3)
    assert build(f"{module}:Holder.build")(torch.ones(2, 6)).shape == (2, 3)
    assert build(f"{module}:anything", {"size": 7})(torch.ones(2, 6)).shape == (2, 7)


def test_arguments_of_the_caller_win_over_offered_ones(module):
    assert build(f"{module}:shaped", {"num_outputs": 1})(torch.ones(2, 6)).shape == (2, 1)


@pytest.mark.parametrize(
    ("location", "args", "message"),
    [
        ("{}", {}, r"has the wrong form; write python:module:function"),
        (
            "no_such_module_anywhere:f",
            {},
            r"cannot import 'no_such_module_anywhere' \(ModuleNotFoundError: .*PYTHONPATH",
        ),
        ("{}:plane", {}, r"has no 'plane'; did you mean 'plain'\?"),
        ("{}:number", {}, r"is a int, not a function"),
        ("{}:plain", {"widths": 3}, r"takes no argument 'widths'; allowed: width; did you mean 'width'\?"),
        ("{}:plain", {}, r"needs the argument 'width', which was not given"),
        ("{}:plain", {"width": "wide"}, r"failed with \{width: 'wide'\}: TypeError"),
        ("{}:no_model", {}, r"returned a int; it must return a torch.nn.Module"),
    ],
)
def test_bad_python_builders(module, location, args, message):
    with pytest.raises(NNTKError, match=message) as caught:
        build(location.format(module), args)
    assert "\n" not in str(caught.value)


def test_the_builders_own_exception_is_the_cause(module):
    with pytest.raises(NNTKError, match="AssertionError: three outputs only") as caught:
        build(f"{module}:anything", {"size": 7}, num_outputs=2)
    assert isinstance(caught.value.__cause__, AssertionError)
