"""A plain NumPy function as a model: a scikit-learn model, a decision rule, a simulator.

It has no gradients, so only the estimator `weight` applies; it is called once for each draw and batch, never stacked.
Whether its result depends on its arguments alone is tried in `nntk_dist.planning.decision`.

Axes: n examples of a batch, C outputs, P parameters.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, NNTKError, nearest_name, one_line

Function = Callable[[Float64[np.ndarray, " P"], np.ndarray], np.ndarray]
_REAL_KINDS = "biuf"


class BlackBox(nn.Module):
    """`fn(params, x)` with params (P,) and x (n, …) to (n,) or (n, C), as a module with the one parameter `params`.

    Assumes that row i of the result depends on `params` and row i of x alone; a batch is padded with copies of its last
    row, so n is the size of the batch. Both arguments are fresh arrays, and fn may change them. `params` are float64
    also in a float32 run, because float32 would lose a perturbation of 1e-8; x is float64 too, or int64 if the
    inputs are integers. Results may be real, whole or true/false, and are returned as float64.

    `BlackBox.of_estimator` makes one of a fitted scikit-learn estimator.

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
            hint = "; use BlackBox.of_estimator for a fitted estimator" if hasattr(fn, "predict") else ""
            raise ArgumentError(
                f"fn is a {type(fn).__name__}; allowed: a function fn(params, x) of two NumPy arrays{hint}"
            )
        values = _real_array(params, "params", ArgumentError)
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            came = f"shape {values.shape}" if values.ndim != 1 or values.size == 0 else "not finite"
            raise ArgumentError(
                f"params is {came}; allowed: finite numbers of shape (P,), P of 1 or more (flatten them)"
            )
        self.fn = fn
        self.params = nn.Parameter(torch.from_numpy(values.astype(np.float64)))

    @classmethod
    def of_estimator(cls, estimator: Any, names: Sequence[str], method: str | None = None) -> "BlackBox":
        """Make a black box of a fitted estimator with scikit-learn's conventions, a decision tree say.

        Args:
            estimator: a fitted estimator; a copy of it is evaluated.
            names: which of its fitted attributes are the parameters, in dotted form, such as `coef_` or
                `estimators_.0.tree_.threshold`: arrays of floating-point numbers, or single numbers.
            method: the method that is f(x); by default the first that it has of `decision_function`, `predict_proba`
                and `predict`.

        Raises:
            ArgumentError: it has no such attribute or method, or an attribute holds no floating-point numbers.

        Example:
            >>> import numpy as np
            >>> from sklearn.linear_model import Ridge
            >>> fitted = Ridge().fit(np.eye(3), np.arange(3.0))
            >>> BlackBox.of_estimator(fitted, ["coef_", "intercept_"]).params.shape
            torch.Size([4])
        """
        function = _FittedFunction(copy.deepcopy(estimator), tuple(names), _method(estimator, method))
        return cls(function, function.values())

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


@dataclass(frozen=True)
class _FittedFunction:
    """fn(params, x) of a fitted estimator: its attributes take the numbers, then its method is called."""

    estimator: Any
    names: tuple[str, ...]
    method: str

    def values(self) -> Float64[np.ndarray, " P"]:
        """The numbers that the attributes hold, one after the other."""
        parts = []
        for name in self.names:
            array = np.asarray(_attribute(*_owner(self.estimator, name), name))
            if array.dtype.kind != "f":
                raise ArgumentError(f"the attribute '{name}' has dtype {array.dtype}; allowed: floating-point numbers")
            parts.append(array.ravel().astype(np.float64))
        if not parts:
            raise ArgumentError("names is empty; allowed: one or more attributes of the estimator, such as coef_")
        return np.concatenate(parts)

    def __call__(self, params: Float64[np.ndarray, " P"], x: np.ndarray) -> np.ndarray:
        start = 0
        for name in self.names:
            owner, last = _owner(self.estimator, name)
            value = _attribute(owner, last, name)
            stop = start + np.size(value)
            part = params[start:stop].reshape(np.shape(value))
            if isinstance(value, np.ndarray) and value.flags.writeable:
                value[...] = part  # also of compiled trees, whose arrays cannot be replaced
            else:
                setattr(owner, last, part if np.ndim(value) else float(part))
            start = stop
        result: np.ndarray = getattr(self.estimator, self.method)(x)
        return result


def _method(estimator: Any, method: str | None) -> str:
    names = ("decision_function", "predict_proba", "predict") if method is None else (method,)
    found = next((name for name in names if callable(getattr(estimator, name, None))), None)
    if found is None:
        raise ArgumentError(f"a {type(estimator).__name__} has no method {' or '.join(names)}; name one with method")
    return found


def _owner(estimator: Any, name: str) -> tuple[Any, str]:
    """The object that holds the last part of a dotted name, and that part."""
    *path, last = name.split(".")
    owner = estimator
    for part in path:
        owner = _attribute(owner, part, name)
    return owner, last


def _attribute(owner: Any, part: str, name: str) -> Any:
    if part.isdecimal():
        return owner[int(part)]
    found = getattr(owner, part, None)
    if found is None:
        near = nearest_name(part, [each for each in dir(owner) if not each.startswith("__")])
        raise ArgumentError(f"a {type(owner).__name__} has no attribute '{part}' (of '{name}'){near}; is it fitted?")
    return found


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
