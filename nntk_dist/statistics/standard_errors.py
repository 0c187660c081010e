"""From block sums to a kernel with error bars: plugin, unbiased, and calibrated standard errors.

`plugin` = Σ_{rr'} H_rr'/R² is positive semidefinite and inflated by noise. `unbiased` U = Σ_{r≠r'} h_rr'/(R(R−1)) is
right on average and not positive semidefinite. The jackknife variance J of U is too wide by up to 2(R−1)/(R−2); the
unbiased variance estimate V is noisy and may be negative. So the standard error takes J's shape at V's level, measured
on a fixed sample of entries.

If features are sketched, the jackknife holds for the sketch at hand. The scatter of U between the Q groups of sketch
columns, each with all draws, shows what another sketch would change. Adding the two variances counts the interaction of
draws and sketch twice. The standard error is then too large by at most √2, usually by a few percent.

Axes: r/R blocks, leading; q/Q groups of sketch columns; the rest is a tile of any shape.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from nntk_dist.products.block_sums import BETWEEN, WITHIN, BlockSums, Sum
from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import COLUMN_SAMPLE, ROW_SAMPLE, Stream
from nntk_dist.statistics.error_bounds import bound_factor, noise_source

SAMPLE_ENTRIES = 4096
PILOT_ENTRIES = 1024  # of a pilot, which has more blocks, and so more products of pairs


@dataclass(frozen=True)
class Calibration:
    """The error of a whole kernel, estimated from a sample of entries.

    Attributes:
        level: Multiplies the jackknife variance.
        relative_error: √(ΣV/Σ(U²−V)); infinite if there is only noise, NaN if no entry is resolved.
        num_entries: Entries of the sample.
        bound: A bound on the relative error that holds in 95 % of all cases, with what unresolved entries could hold;
            infinite if no entry is resolved.
        pair_share: The share of pairs of draws, which falls like 1/S², in what ΣV has from draws; the rest falls like
            1/S.
        sketch_share: The share of the sketch in ΣV.
        bias: ‖plugin − unbiased‖ / ‖unbiased‖ over the sample; 0 if blocks are not paired, NaN if no entry is resolved.
        resolved_share: The share of the sample's entries that are resolved.
    """

    level: float
    relative_error: float
    num_entries: int
    bound: float = math.nan
    pair_share: float = 0.0
    sketch_share: float = 0.0
    bias: float = 0.0
    resolved_share: float = 1.0


@dataclass(frozen=True)
class Estimates:
    """The statistics of one tile, as far as they exist.

    Attributes:
        plugin: The mean over all pairs of blocks, or the kernel itself if blocks are not paired.
        unbiased: U.
        stderr: The standard error of U, or of the kernel itself.
    """

    plugin: Float64[Tensor, "*tile"]
    unbiased: Float64[Tensor, "*tile"] | None
    stderr: Float64[Tensor, "*tile"] | None


def jackknife_variance(by_block: Float64[Tensor, "r *tile"]) -> Float64[Tensor, "*tile"]:
    """Return the delete-one-block variance of U from T_r: 4 Σ(T_r − T̄)² / (R(R−1)(R−2)²)."""
    blocks = len(by_block)
    return _squared_deviations(by_block).mul_(4.0 / (blocks * (blocks - 1) * (blocks - 2) ** 2))


def _squared_deviations(values: Float64[Tensor, "r *tile"]) -> Float64[Tensor, "*tile"]:
    """Return Σ_r (v_r − v̄)², from differences to the first value: exactly 0 if all values are the same.

    It takes one block at a time. This is many times faster than `var` over the leading axis, whose strides are a tile
    long, and on two threads faster than computing all differences together.
    """
    total = torch.zeros_like(values[0])
    squares, difference = torch.zeros_like(total), torch.empty_like(total)
    for value in values[1:]:
        torch.sub(value, values[0], out=difference)
        total += difference
        squares.addcmul_(difference, difference)
    return squares.addcmul_(total, total, value=-1.0 / len(values))


def unbiased_variance(products: Float64[Tensor, "r r *tile"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, V, T_r): V = U² − (T² − 4ΣT_r² + 2A)/(R(R−1)(R−2)(R−3)).

    The bracket sums the products of all pairs of pairs that have no block in common.
    """
    blocks = len(products)
    symmetric = 0.5 * (products + products.transpose(0, 1))
    off_diagonal = ~torch.eye(blocks, dtype=torch.bool, device=products.device)
    symmetric = symmetric * off_diagonal.reshape(blocks, blocks, *[1] * (products.ndim - 2))
    by_block = symmetric.sum(1)
    total = by_block.sum(0)
    unbiased = total / (blocks * (blocks - 1))
    disjoint = total**2 - 4.0 * by_block.square().sum(0) + 2.0 * symmetric.square().sum((0, 1))
    variance = unbiased**2 - disjoint / (blocks * (blocks - 1) * (blocks - 2) * (blocks - 3))
    return unbiased, variance, by_block


def sketch_variance(by_group: Float64[Tensor, "q *tile"], num_blocks: int) -> Float64[Tensor, "*tile"]:
    """Return the variance of U over sketches, Q·Var_q/(R(R−1))².

    Args:
        by_group: What each of Q independent groups of sketch columns adds to Σ_{r≠r'} h_rr'.
        num_blocks: R.
    """
    groups = len(by_group)
    return _squared_deviations(by_group).mul_(groups / (groups - 1) / (num_blocks * (num_blocks - 1)) ** 2)


def calibrate(
    products: Float64[Tensor, "r ..."],
    *,
    pair_blocks: bool,
    by_group: Float64[Tensor, "q *sample"] | None = None,
    resolved: Bool[Tensor, "*sample"] | None = None,
    zero_is_unresolved: bool = False,
    hidden: Float64[Tensor, "*sample"] | None = None,
) -> Calibration:
    """Calibrate from all block products of a sample of entries.

    level = clip(mean V / mean J, (R−2)/(2(R−1)), 1). The variance of means of independent blocks is unbiased: level 1.

    Args:
        products: (R, R, *sample), or (R, *sample) if blocks are not paired.
        pair_blocks: Whether blocks are paired.
        by_group: Of sketched features, what each group of columns adds to the sum over different blocks.
        resolved: Mask of the entries that are resolved; None for all.
        zero_is_unresolved: Whether entries without any scatter between blocks are not resolved either.
        hidden: A 97.5 % bound of what unresolved outputs could add to each entry; None if all are resolved.
    """
    blocks, sketch, bias = len(products), 0.0, 0.0
    if pair_blocks:
        value, variance, influences = unbiased_variance(products)
        inflated = float((products.mean((0, 1)) - value).square().sum())
        bias = _ratio(math.sqrt(inflated), math.sqrt(float(value.square().sum())))
        shape = jackknife_variance(influences)
        total, lowest = float(shape.sum()), (blocks - 2) / (2 * (blocks - 1))
        ratio = float(variance.sum()) / total if total > 0 else 1.0
        level = min(max(ratio, lowest), 1.0)
        pair_share = (1.0 / level - 1.0) / (1.0 / lowest - 1.0)
    else:
        value, shape, influences = products.mean(0), products.var(0) / blocks, products
        level, pair_share = 1.0, 0.0
    if zero_is_unresolved:
        resolved = shape > 0
    resolved_share = 1.0 if resolved is None else float(resolved.double().mean())
    if resolved_share == 0.0:  # zeros that say nothing: neither of the values nor of their errors
        return Calibration(1.0, math.nan, value.numel(), bound=math.inf, bias=math.nan, resolved_share=0.0)
    noise = level * float(shape.sum())
    sources = [noise_source(noise, influences)]
    if by_group is not None:
        sketch = float(sketch_variance(by_group, blocks).sum())
        sources.append(noise_source(sketch, by_group))
        noise += sketch
    size = float(value.square().sum())
    relative = math.sqrt(_ratio(noise, size - noise))
    missed = 0.0 if hidden is None else float(hidden.square().sum())
    factor = bound_factor(sources, 0.95 if missed == 0 else 0.975)  # two bounds of 97.5 % hold together in 95 %
    error = math.sqrt(factor**2 * noise + missed)  # of U − Θ, by 95 %: then ‖Θ‖ is at least ‖U‖ less that
    return Calibration(
        level=level,
        relative_error=relative,
        num_entries=value.numel(),
        bound=_ratio(error, math.sqrt(size) - error),
        pair_share=pair_share,
        sketch_share=sketch / noise if noise > 0 else 0.0,
        bias=bias,
        resolved_share=resolved_share,
    )


def _ratio(error: float, signal: float) -> float:
    """Return error over signal: infinite without a signal, 0 without either."""
    return error / signal if signal > 0 else math.inf if error > 0 else 0.0


def shares_of_sums(num_blocks: int, *, pair_blocks: bool) -> dict[str, dict[Sum, float]]:
    """Return the share of each sum in the statistics that are linear in the sums."""
    if not pair_blocks:
        return {"plugin": {WITHIN: 1.0 / num_blocks}}
    plugin = dict.fromkeys((WITHIN, BETWEEN), 1.0 / num_blocks**2)
    pairs = num_blocks * (num_blocks - 1)
    return {"plugin": plugin, "unbiased": {BETWEEN: 1.0 / pairs}} if pairs else {"plugin": plugin}


def estimate(sums: BlockSums, calibration: Calibration | None) -> Estimates:
    """Return the statistics of a tile; the standard error needs a calibration and sums by block."""
    blocks, by_block, stderr = sums.num_blocks, sums.by_block, None
    shares = shares_of_sums(blocks, pair_blocks=sums.between is not None)
    if by_block is not None and calibration is not None:
        if sums.between is None:
            variance = _squared_deviations(by_block).mul_(1.0 / (blocks * (blocks - 1)))
        else:
            variance = jackknife_variance(by_block).mul_(calibration.level)
        if sums.by_group is not None:
            variance += sketch_variance(sums.by_group, blocks)
        stderr = variance.sqrt_()
    total = sums.within if sums.between is None else sums.within + sums.between
    unbiased = None if sums.between is None or "unbiased" not in shares else sums.between * shares["unbiased"][BETWEEN]
    return Estimates(plugin=total * shares["plugin"][WITHIN], unbiased=unbiased, stderr=stderr)


def sample_limit(width: int, entries: int = SAMPLE_ENTRIES) -> int:
    """Return how many pairs of examples the calibration samples if each has `width` × `width` entries."""
    return max(1, entries // width**2)


def sample_entries(seed: int, num_rows: int, num_columns: int, limit: int = SAMPLE_ENTRIES) -> tuple[Tensor, Tensor]:
    """Return the rows and columns whose crossing is the calibration sample: all of them, or about `limit` entries.

    The sample is a pure function of the seed and the kernel's size, never of its tiling.
    """
    rows = min(num_rows, max(math.isqrt(limit), limit // num_columns))
    columns = min(num_columns, limit // rows)

    def choose(group: int, size: int, count: int) -> Tensor:
        if count == size:
            return torch.arange(size)
        keys = uniform(seed, Stream.SAMPLE, torch.tensor([group]), size)[0]
        return keys.argsort()[:count].sort().values

    return choose(ROW_SAMPLE, num_rows, rows), choose(COLUMN_SAMPLE, num_columns, columns)


def t_quantile(confidence: float, num_blocks: int) -> float:
    """Half-width, in standard errors, of a two-sided interval: Student's t with R − 1 degrees of freedom."""
    from scipy import special  # slow to import

    return float(special.stdtrit(num_blocks - 1, 0.5 + confidence / 2.0))


def relative_distance(first: Tensor, second: Tensor) -> float:
    """Return ‖first − second‖ / ‖second‖ in the Frobenius norm."""
    return float(torch.linalg.vector_norm(first - second) / torch.linalg.vector_norm(second))
