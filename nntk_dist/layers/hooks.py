"""Hooks on the modules of a model for the length of one pass: the only place that installs and removes them.

It evaluates no model: `with hooked(model, ...)` surrounds the pass.

Axes: none; h is what goes into a module, of any shape.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

AfterHook = Callable[[Any, Any], Any]
BeforeHook = Callable[[Any], None]


@contextmanager
def hooked(
    model: nn.Module, *, after: Mapping[str, AfterHook] | None = None, before: Mapping[str, BeforeHook] | None = None
) -> Iterator[None]:
    """Call functions after or before some modules of a model, and remove them when the block ends.

    h is the module's first positional argument, or its first keyword argument, or None if it was called without any.

    Args:
        model: the model; names of its modules are paths as in `named_modules`, "" is the model itself.
        after: path to `function(h, out)`, called with the module's input and output. What it returns replaces the
            output, unless it returns None.
        before: path to `function(h)`, called before the module runs.

    Example:
        >>> import torch
        >>> model, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
        >>> with hooked(model, after={"0": lambda h, out: seen.append(tuple(out.shape))}):
        ...     _ = model(torch.ones(5, 2))
        >>> seen
        [(5, 3)]
    """
    handles = []
    try:
        for path, function in (after or {}).items():
            handles.append(model.get_submodule(path).register_forward_hook(_after(function), with_kwargs=True))
        for path, first in (before or {}).items():
            handles.append(model.get_submodule(path).register_forward_pre_hook(_before(first), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(function: AfterHook) -> Callable[..., Any]:
    return lambda module, args, kwargs, out: function(_input(args, kwargs), out)


def _before(function: BeforeHook) -> Callable[..., None]:
    return lambda module, args, kwargs: function(_input(args, kwargs))


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
