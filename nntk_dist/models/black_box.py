"""A plain NumPy function as a model: a scikit-learn model, a decision rule, a simulator.

It has no gradients, so only the estimator `weight` applies; it is called once for each draw and batch, never stacked.
Whether its result depends on its arguments alone is tried in `nntk_dist.planning.decision`.

Axes: n examples of a batch, C outputs, P parameters.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, NNTKError, one_line

Function = Callable[[Float64[np.ndarray, " P"], np.ndarray], np.ndarray]
_REAL_KINDS = "biuf"


class BlackBox(nn.Module):
    """`fn(params, x)` with params (P,) and x (n, …) to (n,) or (n, C), as a module with the one parameter `params`.

    Assumes that row i of the result depends on `params` and row i of x alone; a batch is padded with copies of its last
    row, so n is the size of the batch. Both arguments are fresh arrays, and fn may change them. `params` are float64
    also in a float32 run, because float32 would lose a perturbation of 1e-8; x is float64 too, or int64 if the
    inputs are integers. Results may be real, whole or true/false, and are returned as float64.

    Raises:
        ArgumentError: params is not a vector of finite numbers.
        ModelError: while it is evaluated: fn raises, or its result is not an array of numbers of shape (n,) or (n, C).

    Example:
        >>> import numpy as np, torch
        >>> box = BlackBox(lambda params, x: np.sign(x @ params), np.ones(3))
        >>> box(torch.ones(2, 3))
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, fn: Function, params: Any) -> None:
        super().__init__()
        if not callable(fn):
            raise ArgumentError(f"fn is a {type(fn).__name__}; allowed: a function fn(params, x) of two NumPy arrays")
        values = _real_array(params, "params", ArgumentError)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            came = f"shape {values.shape}" if values.ndim != 1 or values.size == 0 else "not finite"
            raise ArgumentError(
                f"params is {came}; allowed: finite numbers of shape (P,), P of 1 or more (flatten them)"
            )
        self.fn = fn
        self.params = nn.Parameter(torch.from_numpy(values.astype(np.float64)))

    def forward(self, x: Tensor) -> Float64[Tensor, "n ..."]:
        """Return fn(params, x), on the device of x."""
        params = self.params.detach().cpu().numpy().astype(np.float64)
        inputs = x.detach().cpu().numpy().astype(np.float64 if x.is_floating_point() else np.int64)
        try:
            result = self.fn(params, inputs)
        except NNTKError:
            raise
        except Exception as error:  # fn is anyone's; its exception stays visible as the cause
            raise ModelError(
                f"the black box fn failed on params of shape {params.shape} and x of shape {tuple(x.shape)}, "
                f"{inputs.dtype}: {type(error).__name__}: {one_line(error)}"
            ) from error
        values = _real_array(result, "the black box's result", ModelError)
        if values.ndim not in (1, 2) or len(values) != len(x) or values.size == 0:
            raise ModelError(
                f"the black box returned shape {values.shape} for {len(x)} examples; allowed: ({len(x)},) or "
                f"({len(x)}, C)"
            )
        return torch.from_numpy(values.astype(np.float64)).to(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlackBox":
        """What `.to` and `.float` go through: the device changes, the type does not."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


def holds_black_box(model: nn.Module) -> bool:
    """Return whether some part of the model is a black box, which neither gradients nor vmap pass through."""
    return any(isinstance(module, BlackBox) for module in model.modules())


def _real_array(values: Any, what: str, error: type[NNTKError]) -> Float[np.ndarray, "..."]:
    """`values` as an array of real numbers of any shape."""
    try:
        array = np.asarray(values)
    except Exception as cause:
        raise error(f"{what} is a {type(values).__name__}; allowed: an array of real numbers") from cause
    if array.dtype.kind not in _REAL_KINDS:
        came = f"dtype {array.dtype}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
        raise error(f"{what} is {came}; allowed: an array of real numbers")
    return array
