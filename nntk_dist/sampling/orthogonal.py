"""Orthonormal directions from standard normal vectors: the Gram–Schmidt process, group by group, in float64.

The k normals of a group are the rows of N = L·Q, with L lower triangular and a positive diagonal. Q is then uniformly
(Haar) distributed and independent of the lengths of N's rows. If P ≥ 2k, L is the Cholesky factor of N·Nᵀ, a sum over
slices of the parameters, and Q = L⁻¹·N slice by slice; the loss of orthogonality is 2^-53 times the squared condition
number of N, which is at most 34. Otherwise N itself is factored by Householder reflections.

Axes: g groups, k directions of a group, P parameters.
"""

import torch
from jaxtyping import Float64
from torch import Tensor


def needs_whole_vectors(group_size: int, num_parameters: int) -> bool:
    """Return whether N·Nᵀ may be too badly conditioned, so that whole vectors N must be factored."""
    return num_parameters < 2 * group_size


def orthonormal_rows(normals: Float64[Tensor, "g k P"]) -> Float64[Tensor, "g k P"]:
    """Return Q of N = L·Q from whole vectors, k ≤ P, by Householder reflections. Cost: O(g·k²·P)."""
    columns, upper = torch.linalg.qr(normals.mT)
    signs = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(normals.dtype)
    return (columns * signs[:, None, :]).mT


def triangular_factors(grams: Float64[Tensor, "g k k"]) -> Float64[Tensor, "g k k"]:
    """Return L of N = L·Q from N·Nᵀ."""
    return torch.linalg.cholesky(grams)


def inverse_factors(factors: Float64[Tensor, "g k k"]) -> Float64[Tensor, "g k k"]:
    """Return L⁻¹, which maps a slice of N to the same slice of Q.

    Multiplying by the inverse is faster than solving, and as accurate because L is well conditioned here.
    """
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    return torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)
