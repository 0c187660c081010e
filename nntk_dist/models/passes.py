"""The surroundings of one pass through a model: f is the same function with and without gradients, in any precision.

Here is what torch decides behind a model's back: fused paths, recomputation, the dtype of new tensors, autocast. No
model is called here (`nntk_dist.models.evaluation` does).

Axes: none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode

_NARROWER = frozenset({torch.float32, torch.bfloat16, torch.float16})  # than float64, not counting quantised formats
_WIDENED: dict[Any, torch.dtype] = dict.fromkeys(_NARROWER, torch.float64) | {
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_RECOMPUTES: ContextVar[bool] = ContextVar("recomputes", default=True)


@contextmanager
def model_pass(
    *, factory_dtype: torch.dtype | None = None, widened: bool = False, without_cudnn: bool = False
) -> Iterator[None]:
    """Surround one forward pass.

    Transformer layers take their usual path, not the one for inference, which returns other values at padded positions
    and does not exist under gradients. `torch.utils.checkpoint` calls its function and recomputes nothing: a
    recomputation during the backward pass would not find the parameters of this pass.

    Args:
        factory_dtype: the dtype of new tensors that name none; None for torch's own default.
        widened: whether the model computes in float64 also where its code asks for less.
        without_cudnn: whether layers avoid cuDNN, whose recurrent layers have gradients in training mode only.
    """
    _wrap_checkpoints()
    fast, default = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    recomputes = _RECOMPUTES.set(False)
    cudnn: AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=False) if without_cudnn else nullcontext()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if factory_dtype is not None:
            torch.set_default_dtype(factory_dtype)
        with cudnn, _Widening() if widened else nullcontext():
            yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)
        _RECOMPUTES.reset(recomputes)


def twice_differentiable() -> AbstractContextManager[None]:
    """Let attention take the path that has second derivatives and a rule for vmap; fused kernels have neither."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


@contextmanager
def recorded_precisions() -> Iterator[set[torch.dtype]]:
    """Yield a set, to which passes inside add the dtypes of all real and complex numbers that they compute."""
    with _Recording() as recording:
        yield recording.found


def lowest_precision(found: set[torch.dtype], otherwise: torch.dtype) -> float:
    """Return the largest rounding unit of these dtypes."""
    return max((torch.finfo(dtype).eps for dtype in found), default=torch.finfo(otherwise).eps)


class _EagerMode(TorchDispatchMode):
    """A dispatch mode that does not import torch's compiler, which takes seconds, to be left alone by it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recording(_EagerMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex()):
                self.found.add(part.dtype)
        return result


class _Widening(_EagerMode):
    """Replaces the dtypes that a model's code, or autocast, asks for by float64."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wider, args), **named)


def _wider(value: Any) -> Any:
    return _WIDENED.get(value, value) if isinstance(value, torch.dtype) else value


@cache
def _wrap_checkpoints() -> None:
    """Wrap what `torch.utils.checkpoint.checkpoint` calls, once in a process. Outside passes nothing changes.

    Models import that function by name, so that replacing it would not reach them.
    """
    reentrant, generator = checkpointing.CheckpointFunction.apply, checkpointing._checkpoint_without_reentrant_generator

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return reentrant(function, preserve, *args) if _RECOMPUTES.get() else function(*args)

    def either(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(function, *args, **kwargs) if _RECOMPUTES.get() else _nothing()

    checkpointing.CheckpointFunction.apply = staticmethod(apply)  # type: ignore[method-assign]
    checkpointing._checkpoint_without_reentrant_generator = either  # type: ignore[assignment]


def _nothing() -> Iterator[None]:
    """Before the function is called, and after it."""
    yield
