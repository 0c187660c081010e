"""`KernelEstimate`: a kernel with its standard error, and how it is saved and converted.

Axes: n1, n2 examples; `full` kernels are indexed i·C + c, C outputs.
"""

import json
import math
import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nntk_dist.errors import ArgumentError, StoreError
from nntk_dist.planning.model_probes import ModelProbes
from nntk_dist.planning.plain import from_plain, to_plain
from nntk_dist.runtime.warning import warn_caller
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.statistics.few_draws import interval_caution
from nntk_dist.statistics.standard_errors import t_quantile

if TYPE_CHECKING:
    import xarray

Array = TypeVar("Array")
_ARRAYS = ("kernel", "stderr", "plugin", "unbiased")
_FACTS = "facts"


@dataclass(frozen=True, eq=False, repr=False)
class KernelEstimate(Generic[Array]):
    """A kernel with its standard error. Estimates are compared by identity.

    Attributes:
        kernel: the requested statistic ("both" gives plugin), (n1, n2), or (n1·C, n2·C) for `full`.
        stderr: the standard error of `unbiased` (of the kernel itself for the other kinds); NaN if no draw changed
            the output; None if fewer than four blocks give no error bars, or the kernel is exact.
        plugin: all pairs of blocks, PSD and inflated by noise; None unless the kernel is nonlocal.
        unbiased: pairs of different blocks, right on average and not PSD; None unless the kernel is nonlocal.
        estimator: the estimator that was used.
        reason: why, in words.
        draws: perturbed models evaluated.
        blocks: independent blocks of draws; of a sketched local kernel, independent groups of the sketch's numbers.
        num_parameters: P.
        relative_error: estimate of ‖U − Θ‖/‖Θ‖; NaN without error bars.
        relative_bias: ‖plugin − unbiased‖/‖unbiased‖.
        relative_error_bound: an upper bound on ‖U − Θ‖/‖Θ‖ with 95 % confidence.
        reached: whether the bound is below `rtol`; None if no accuracy was requested.
        unresolved_share: the share of entries whose standard error is NaN; what they could hold is part of the bound.
        probes: what the probes of the model found. Numbers that cannot be trusted are also warned of.
        variance_reduced: whether noise was integrated, or control variates taken.
    """

    kernel: Array
    stderr: Array | None
    plugin: Array | None
    unbiased: Array | None
    estimator: str
    reason: str
    draws: int
    blocks: int
    num_parameters: int
    relative_error: float
    relative_bias: float | None
    relative_error_bound: float = math.nan
    reached: bool | None = None
    unresolved_share: float = 0.0
    probes: ModelProbes | None = None
    variance_reduced: bool = False

    def __repr__(self) -> str:
        shape: Any = self.kernel
        draws = "exact" if self.relative_error == 0.0 else "1 draw" if self.draws == 1 else f"{self.draws} draws"
        error = "" if self.relative_error == 0.0 else f", relative error {self.relative_error:.2g}"
        unresolved = f", {100 * self.unresolved_share:.2g} % of entries unresolved" if self.unresolved_share else ""
        return f"KernelEstimate(shape {tuple(shape.shape)}, {self.estimator}, {draws}{error}{unresolved})"

    def interval(self, confidence: float = 0.95) -> tuple[Array, Array]:
        """Return the ends of two-sided intervals around the unbiased estimate.

        Student's t with R − 1 degrees of freedom. With fewer than 16 draws a block of `weight` or `activation`, some
        intervals are too short, and an `NNTKWarning` says so.

        Args:
            confidence: the share of intervals that hold the true entry.

        Raises:
            ArgumentError: the kernel has no standard error.
        """
        if self.stderr is None:
            raise ArgumentError(
                "this kernel has no standard error: it is exact (kind local without a sketch), or has fewer than "
                f"{MINIMUM_BLOCKS} blocks"
            )
        if (
            caution := interval_caution(self.estimator, self.draws, self.blocks, reduced=self.variance_reduced)
        ) is not None:
            warn_caller(caution)
        centre: Any = self.kernel if self.unbiased is None else self.unbiased
        stderr: Any = self.stderr
        reach = t_quantile(confidence, self.blocks) * stderr
        return centre - reach, centre + reach

    def numpy(self) -> "KernelEstimate[np.ndarray]":
        """Return the same estimate with NumPy arrays in place of tensors; bfloat16 becomes float32."""
        arrays: dict[str, Any] = {name: _as_array(getattr(self, name)) for name in _ARRAYS}
        return replace(self, **arrays)  # type: ignore[return-value]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimate to an npz file.

        The file holds the arrays `kernel` and, if they exist, `stderr`, `plugin` and `unbiased`, and the other
        attributes as one JSON text, `facts`. `numpy.load` reads it too.

        Args:
            path: where to write; an existing file is replaced.

        Example:
            >>> import tempfile, torch
            >>> exact = KernelEstimate(torch.eye(2), None, None, None, "autodiff", "", 1, 1, 3, 0.0, None)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     exact.save(f"{folder}/kernel.npz")
            ...     KernelEstimate.load(f"{folder}/kernel.npz")
            KernelEstimate(shape (2, 2), autodiff, exact)
        """
        arrays = self._arrays()
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{_FACTS: np.array(json.dumps(self._facts()))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KernelEstimate[Tensor]":
        """Return the estimate that `save` wrote, with tensors on the CPU.

        Raises:
            StoreError: there is no such file, or it holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays: dict[str, Any] = {
                    name: torch.from_numpy(stored[name]) if name in stored else None for name in _ARRAYS
                }
                facts = json.loads(str(stored[_FACTS]))
            probes = facts.pop("probes")
            return KernelEstimate(**arrays, **facts, probes=None if probes is None else from_plain(ModelProbes, probes))
        except FileNotFoundError:
            raise StoreError(f"{os.fspath(path)}: no such file; allowed: one that KernelEstimate.save wrote") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{os.fspath(path)}: not a saved KernelEstimate ({' '.join(str(error).split())})"
            ) from error

    def to_xarray(self) -> "xarray.Dataset":
        """Return the arrays as an xarray dataset with the axes row and column; the other attributes are its `attrs`.

        Raises:
            ArgumentError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise ArgumentError("to_xarray needs xarray; install nntk-dist[analysis]") from error
        variables = {name: (("row", "column"), values) for name, values in self._arrays().items()}
        return xarray.Dataset(variables, attrs={name: fact for name, fact in self._facts().items() if name != "probes"})

    def _arrays(self) -> dict[str, Any]:
        """The arrays that exist, as NumPy arrays."""
        return {name: _as_array(getattr(self, name)) for name in _ARRAYS if getattr(self, name) is not None}

    def _facts(self) -> dict[str, Any]:
        """The attributes that are no arrays, as plain values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ARRAYS}
        return plain | {"probes": None if self.probes is None else to_plain(self.probes)}


def _as_array(values: Any) -> Any:
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
