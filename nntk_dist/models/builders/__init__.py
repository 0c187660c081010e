"""Models by name: the built-in builders, and anyone's own.

A builder maps `(*, input_shape, num_outputs, **args)` to a module that maps (n, *input_shape) to (n, num_outputs), or
to a result of which an output is chosen (`nntk_dist.models.output`). All built-in models are free of in-place
operations and of batch effects in eval mode, so they work under `torch.func.functional_call`, `vmap` over parameters
and `jacrev`, in float32 and float64. What is done with a model once it is built does not belong here.

Axes: n examples.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nntk_dist.errors import ModelError
from nntk_dist.models.builders.activations import ACTIVATIONS, make_activation
from nntk_dist.models.checkpoint import load_checkpoint
from nntk_dist.models.evaluation import converted_
from nntk_dist.registration.callables import call_checked, check_integer
from nntk_dist.registration.registry import PYTHON, Registry

__all__ = ["ACTIVATIONS", "BUILDERS", "build_model", "load_checkpoint", "make_activation"]

# Other packages add their builders as entry points of this group.
BUILDERS: Registry[Callable[..., nn.Module]] = Registry(
    "model builder",
    "nntk_dist.model_builders",
    {
        "mlp": "nntk_dist.models.builders.mlp:mlp",
        "cnn": "nntk_dist.models.builders.cnn:cnn",
        "resnet": "nntk_dist.models.builders.resnet:resnet",
        "transformer": "nntk_dist.models.builders.transformer:transformer",
        "hf": "nntk_dist.models.builders.hugging_face:hugging_face",
    },
)


def build_model(
    builder: str,
    args: Mapping[str, Any],
    *,
    input_shape: tuple[int, ...],
    num_outputs: int,
    seed: int,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> nn.Module:
    """Build a model by name: float32, on the CPU, in eval mode, its initial parameters a function of `seed` alone.

    Torch's global random state does not change.

    Args:
        builder: a name in `BUILDERS`, `NAME:LOCATION` for a builder that takes a location, such as `hf:FOLDER`, or
            `python:module:function` for a function that returns a module.
        args: the builder's own arguments. `input_shape`, `input_shapes` and `num_outputs` are added if its
            signature takes them.
        input_shape: shape of one example, or of its first part.
        num_outputs: number of outputs that the data ask for.
        seed: of the initial parameters, not negative. (A function that uses another generator than torch's must take
            its own seed in `args`.)
        input_shapes: shape of each part of an example, by name or place; None if examples have no parts.

    Raises:
        ArgumentError: an unknown builder or argument, or a value that a built-in builder refuses.
        ModelError: the builder fails, or returns no `nn.Module`.

    Example:
        >>> model = build_model("mlp", {"widths": [8]}, input_shape=(3,), num_outputs=2, seed=0)
        >>> model(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    check_integer("model seed", seed, minimum=0)
    what = f"model {builder}"
    name, _, location = ("", "", "") if builder.startswith(PYTHON) else builder.partition(":")
    function = BUILDERS.get(name or builder)
    offered: dict[str, Any] = {"input_shape": tuple(input_shape), "num_outputs": num_outputs}
    if input_shapes is not None:
        offered["input_shapes"] = dict(input_shapes)
    args = {**args, "location": location} if location else args
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would also seed every other device's generator
        torch.default_generator.manual_seed(seed)
        model = call_checked(function, args, what=what, offered=offered, failure=ModelError)
        if not isinstance(model, nn.Module):
            raise ModelError(f"{what} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return converted_(model, torch.float32, "cpu").eval()
