"""Which layers see the same under every draw: those fed with the model's input itself.

Told from the structure of the model and not from numbers: the layer's input lies in the memory of the model's input (as
a view, a flattened image for instance) and still holds it. What a module computed anew, though it were from the input
alone, is not recognised, and is then contracted as any other layer. Nothing is contracted here.

Axes: n examples.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nntk_dist.models.evaluation import outputs


def shared_inputs(model: nn.Module, modules: Iterable[str], x: Tensor) -> frozenset[str]:
    """Which of the modules are fed with x. One forward pass over `x`."""
    seen = dict.fromkeys(modules, False)
    x = x.clone()  # what a model does to it in place is seen, and nobody else's business
    whole = x.clone()

    def look_at(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            source = args[0] if args else next(iter(kwargs.values()))
            same_memory = source.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            seen[name] = same_memory and torch.equal(source.reshape(len(x), -1), whole.reshape(len(x), -1))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look_at(name), with_kwargs=True) for name in seen]
    try:
        with torch.no_grad():
            outputs(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name, is_shared in seen.items() if is_shared)
