"""Orthonormal directions from standard normal vectors: Gram and Schmidt's process, group by group, in float64.

The k normals of a group are the rows of N = L·Q, L lower triangular with a positive diagonal: then Q is uniformly
distributed (Haar), and independent of the lengths of N's rows. Where k is small beside P, L is the Cholesky factor of
N·Nᵀ, which sums over slices of the parameters, and Q = L⁻¹·N slice by slice; its loss of orthogonality is the square of
the condition number of N, at most 34 for P ≥ 2k, times 2^-53. Beyond that N is factored itself (Householder).

Axes: g groups, k directions of a group, P parameters.
"""

import torch
from jaxtyping import Float64
from torch import Tensor


def needs_whole_vectors(group_size: int, num_parameters: int) -> bool:
    """Whether N·Nᵀ may be too badly conditioned to stand for N."""
    return num_parameters < 2 * group_size


def orthonormal_rows(normals: Float64[Tensor, "g k P"]) -> Float64[Tensor, "g k P"]:
    """Q of N = L·Q for whole vectors, k ≤ P, by Householder reflections; cost O(g·k²·P)."""
    columns, upper = torch.linalg.qr(normals.mT)
    signs = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(normals.dtype)
    return (columns * signs[:, None, :]).mT


def triangular_factors(grams: Float64[Tensor, "g k k"]) -> Float64[Tensor, "g k k"]:
    """L of N = L·Q from N·Nᵀ."""
    return torch.linalg.cholesky(grams)


def inverse_factors(factors: Float64[Tensor, "g k k"]) -> Float64[Tensor, "g k k"]:
    """L⁻¹, whose product with a slice of N is that of Q: faster than solving for it, and as orthogonal, where L is as
    well conditioned as it is here.
    """
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    return torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)
