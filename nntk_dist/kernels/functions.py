"""The public functions: `nonlocal_kernel`, `covariance_kernel`, `averaged_kernel`, `local_kernel`, `prepare_kernel`.

They compute the same features, sums and statistics as the pipeline, in one process. Features of all rows are held in
memory if they fit. With `parameters` as a mapping they return a dict with a kernel for each group. Their
options are declared in `nntk_dist.spec.KernelSpec`, from which signatures and docstrings are made.

Axes: n1, n2 examples, C outputs; `full` kernels are indexed i·C + c.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from nntk_dist.kernels.estimate import KernelEstimate
from nntk_dist.kernels.groups import PreparedGroups, prepare_groups
from nntk_dist.kernels.prepared import Examples, Placement, PreparedKernel, check_same_kind, prepare
from nntk_dist.spec import Kind, kernel_option_rows, kernel_signature, make_spec

Function = TypeVar("Function", bound=Callable[..., Any])
Patterns = str | Sequence[str]
Groups = Mapping[str, Patterns]
Estimates = KernelEstimate[Tensor] | dict[str, KernelEstimate[Tensor]]
_OPTIONS_LINE = "        options: the options of the kernel.\n"


def _with_options_of(kind: str | None) -> Callable[[Function], Function]:
    """Show the options of a kind of kernel in a function's signature and docstring, in place of `**options`."""

    def show(function: Function) -> Function:
        function.__signature__ = kernel_signature(kind, function)  # type: ignore[attr-defined]
        rows = [
            f"        {row.name}: {row.text}; allowed: {row.allowed}; default {row.default}.\n"
            for row in kernel_option_rows(kind)
        ]
        if function.__doc__ is not None:
            function.__doc__ = function.__doc__.replace(_OPTIONS_LINE, "".join(rows))
        return function

    return show


def _placed(
    device: torch.device | str | None, dtype: torch.dtype | None, batch: int | None, output: Any
) -> dict[str, Any]:
    return {"device": device, "dtype": dtype, "batch": batch, "output": output}


def _computed(
    kind: Kind,
    called: str,
    model: nn.Module,
    x1: Examples,
    x2: Examples | None,
    placement: dict[str, Any],
    options: dict[str, Any],
) -> Estimates:
    """Prepare a kernel, or one for each group of parameters, on its own examples and compute it."""
    spec = make_spec(kind, options, called=called)
    place = Placement.of(model, x1, **placement)
    named = [("x1", x1)] if x2 is None else [("x1", x1), ("x2", x2)]
    inputs = [place.take(examples, name) for name, examples in named]
    check_same_kind(inputs)
    if spec.groups:
        return prepare_groups(model, inputs, spec, place).estimate(inputs)
    return prepare(model, inputs, spec, place).estimate(inputs)


@overload
def nonlocal_kernel(
    model: nn.Module, x1: Examples, x2: Examples | None = None, *, parameters: Patterns = ..., **options: Any
) -> KernelEstimate[Tensor]: ...
@overload
def nonlocal_kernel(
    model: nn.Module, x1: Examples, x2: Examples | None = None, *, parameters: Groups, **options: Any
) -> dict[str, KernelEstimate[Tensor]]: ...
@_with_options_of(Kind.NONLOCAL)
def nonlocal_kernel(
    model: nn.Module,
    x1: Examples,
    x2: Examples | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    output: Any = None,
    **options: Any,
) -> Estimates:
    """Estimate the nonlocal NTK Θ(x,x')[c,c'] = ⟨g_c(x), g_c'(x')⟩, g = P·E[(f(x;θ+z) − f(x;θ)) z/|z|²].

    `unbiased` is right on average and not PSD; `plugin` is PSD and inflated by noise: solve with `plugin`, compare
    entries with `unbiased`. The model is evaluated in eval mode, and the output of an example must not depend on its
    batch. A model with noise (`StochasticModule`) is taken in expectation: each group of draws has its own noise, which
    all examples and both evaluations of a draw share.

    Cost: `weight` S forward passes and O(S·C) multiply-adds an entry; `autodiff` S·(1 + 2C) pass equivalents and S²
    products of the layers' widths an entry; `activation` S forward passes with noise and the same products, for all
    outputs together. A sketch adds an error of √(2/k) to √(6/k) of a diagonal entry, which stderr includes. With a
    weighting, g is the ratio E[w Δ v]/E[w], w = exp(score/τ): consistent in the draws of a block, with a bias of order
    blocks/draws. With `rtol`, draws are added until ‖U − Θ‖/‖Θ‖ is below it by a 95 % bound.
    Reference: arXiv 2509.12467; estimators and error bars are this library's.

    Args:
        model: the model f.
        x1: examples, (n1, …), a tensor or NumPy array, or a dict or tuple of them, which go to the model's arguments.
        x2: other examples, (n2, …); by default x1.
        device: where to compute; by default the model's device.
        dtype: in which precision; by default the model's, and float32 for half precision.
        batch: rows in one forward pass, at most 256 by default.
        output: what of the model's result is f: a key, an index, a word, a function or a mapping (`Output`).
        options: the options of the kernel.

    Returns:
        The kernel (n1, n2), or (n1·C, n2·C) for outputs full, with its standard error; a dict of kernels if
        `parameters` is a mapping.

    Raises:
        ArgumentError: an option is not allowed.
        ModelError: the model is not finite, or depends on its batch.
        NNTKError: the estimator is not valid for the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> nonlocal_kernel(model, torch.randn(3, 4), gamma=0.1).kernel.shape
        torch.Size([3, 3])
    """
    return _computed(Kind.NONLOCAL, "nonlocal_kernel", model, x1, x2, _placed(device, dtype, batch, output), options)


@_with_options_of(Kind.COVARIANCE)
def covariance_kernel(
    model: nn.Module,
    x1: Examples,
    x2: Examples | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    output: Any = None,
    **options: Any,
) -> KernelEstimate[Tensor]:
    """Estimate C(x,x') = P·E[Δ(x)Δ(x')/|z|²], Δ = f(x;θ+z) − f(x;θ).

    PSD and unbiased, with an error of order 1/√S for any P. It tends to the NTK as γ → 0, but it is not the nonlocal
    NTK. Antithetic draws average the products at +z and at −z.

    Args:
        model: the model f.
        x1: examples, (n1, …), a tensor or NumPy array, or a dict or tuple of them, which go to the model's arguments.
        x2: other examples, (n2, …); by default x1.
        device: where to compute; by default the model's device.
        dtype: in which precision; by default the model's, and float32 for half precision.
        batch: rows in one forward pass, at most 256 by default.
        output: what of the model's result is f: a key, an index, a word, a function or a mapping (`Output`).
        options: the options of the kernel.

    Returns:
        The kernel with its standard error.

    Raises:
        NNTKError: as `nonlocal_kernel`.
    """
    place = _placed(device, dtype, batch, output)
    found = _computed(Kind.COVARIANCE, "covariance_kernel", model, x1, x2, place, options)
    assert isinstance(found, KernelEstimate)  # it has no groups of parameters
    return found


@overload
def averaged_kernel(
    model: nn.Module, x1: Examples, x2: Examples | None = None, *, parameters: Patterns = ..., **options: Any
) -> KernelEstimate[Tensor]: ...
@overload
def averaged_kernel(
    model: nn.Module, x1: Examples, x2: Examples | None = None, *, parameters: Groups, **options: Any
) -> dict[str, KernelEstimate[Tensor]]: ...
@_with_options_of(Kind.AVERAGED)
def averaged_kernel(
    model: nn.Module,
    x1: Examples,
    x2: Examples | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    output: Any = None,
    **options: Any,
) -> Estimates:
    """Estimate E_z[NTK(θ + U^{1/P} z)], the NTK averaged over the neighbourhood: PSD and unbiased.

    Args:
        model: the model f.
        x1: examples, (n1, …), a tensor or NumPy array, or a dict or tuple of them, which go to the model's arguments.
        x2: other examples, (n2, …); by default x1.
        device: where to compute; by default the model's device.
        dtype: in which precision; by default the model's, and float32 for half precision.
        batch: rows in one forward pass, at most 256 by default.
        output: what of the model's result is f: a key, an index, a word, a function or a mapping (`Output`).
        options: the options of the kernel.

    Returns:
        The kernel with its standard error; a dict of kernels if `parameters` is a mapping.

    Raises:
        NNTKError: as `nonlocal_kernel`, or the model has no gradients.
    """
    return _computed(Kind.AVERAGED, "averaged_kernel", model, x1, x2, _placed(device, dtype, batch, output), options)


@overload
def local_kernel(
    model: nn.Module, x1: Examples, x2: Examples | None = None, *, parameters: Patterns = ..., **options: Any
) -> Tensor: ...
@overload
def local_kernel(
    model: nn.Module, x1: Examples, x2: Examples | None = None, *, parameters: Groups, **options: Any
) -> dict[str, Tensor]: ...
@_with_options_of(Kind.LOCAL)
def local_kernel(
    model: nn.Module,
    x1: Examples,
    x2: Examples | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    output: Any = None,
    **options: Any,
) -> Tensor | dict[str, Tensor]:
    """Compute the empirical NTK ⟨∇f_c(x), ∇f_c'(x')⟩ by automatic differentiation, layer by layer, exact to rounding.

    With `sketch`, gradients are replaced by that many random numbers: right on average, with an error of √(2/k) to
    √(6/k) of a diagonal entry and memory of k numbers a row.

    Args:
        model: the model f.
        x1: examples, (n1, …), a tensor or NumPy array, or a dict or tuple of them, which go to the model's arguments.
        x2: other examples, (n2, …); by default x1.
        device: where to compute; by default the model's device.
        dtype: in which precision; by default the model's, and float32 for half precision.
        batch: rows in one forward pass, at most 256 by default.
        output: what of the model's result is f: a key, an index, a word, a function or a mapping (`Output`).
        options: the options of the kernel.

    Returns:
        The kernel as a tensor; `prepare_kernel(model, x, kind="local")` keeps the decision for later calls, and states
        the standard error of a sketch. A dict of tensors if `parameters` is a mapping.

    Raises:
        NNTKError: the model has no gradients for single examples.
    """
    found = _computed(Kind.LOCAL, "local_kernel", model, x1, x2, _placed(device, dtype, batch, output), options)
    return {name: each.kernel for name, each in found.items()} if isinstance(found, dict) else found.kernel


@overload
def prepare_kernel(model: nn.Module, x: Examples, *, parameters: Patterns = ..., **options: Any) -> PreparedKernel: ...
@overload
def prepare_kernel(model: nn.Module, x: Examples, *, parameters: Groups, **options: Any) -> PreparedGroups: ...
@_with_options_of(None)
def prepare_kernel(
    model: nn.Module,
    x: Examples,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    output: Any = None,
    **options: Any,
) -> PreparedKernel | PreparedGroups:
    """Decide once how the kernel of a model is computed, and return a function of (x1, x2) that keeps the decision.

    A call of that function plans and probes nothing. It gives the same numbers as the function of its kind if that
    makes the same decision. The model is copied: later changes of its parameters have no effect.

    Args:
        model: the model f.
        x: examples for the decision, similar to the examples of later calls.
        device: where to compute; by default the model's device.
        dtype: in which precision; by default the model's, and float32 for half precision.
        batch: rows in one forward pass, at most 256 by default.
        output: what of the model's result is f: a key, an index, a word, a function or a mapping (`Output`).
        options: the options of the kernel.

    Returns:
        A function of (x1, x2=None) that returns a `KernelEstimate`, or a dict of them if `parameters` is a mapping.

    Raises:
        NNTKError: as the function of the kind.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> kernel = prepare_kernel(model, x, kind="local")
        >>> kernel(x[:2], x).kernel.shape
        torch.Size([2, 6])
    """
    spec = make_spec(None, options, called="prepare_kernel")
    placement = Placement.of(model, x, **_placed(device, dtype, batch, output))
    inputs = [placement.take(x, "x")]
    return prepare_groups(model, inputs, spec, placement) if spec.groups else prepare(model, inputs, spec, placement)
