"""From block sums to a kernel with error bars: plugin, unbiased, and calibrated standard errors.

`plugin` = Σ_{rr'} H_rr'/R² is PSD and inflated by noise; `unbiased` U = Σ_{r≠r'} h_rr'/(R(R−1)) is right on average
and not PSD. The jackknife variance J of U is too wide by up to 2(R−1)/(R−2), the unbiased variance estimate V noisy
and possibly negative; so the standard error takes J's shape at V's level, measured on a fixed sample of entries.

Where features are sketched, the jackknife holds for the sketch at hand; the scatter of U between the Q groups of sketch
columns, each with all draws, tells what another sketch would change. The sum of both counts twice what draws and sketch
do to each other: too wide by at most √2, and by a few percent unless noise is as large as the kernel.

Axes: r/R blocks, leading; q/Q groups of sketch columns; the rest is a tile of any shape.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from scipy import special
from torch import Tensor

from nntk_dist.products.block_sums import BETWEEN, WITHIN, BlockSums, Sum
from nntk_dist.sampling.philox import uniform
from nntk_dist.sampling.streams import COLUMN_SAMPLE, ROW_SAMPLE, Stream
from nntk_dist.statistics.error_bounds import bound_factor, noise_source

SAMPLE_ENTRIES = 4096
PILOT_ENTRIES = 1024  # of the same sample: a pilot has more blocks, whose products are of all pairs
STATISTICS = ("plugin", "unbiased", "both")


@dataclass(frozen=True)
class Calibration:
    """What a sample of entries says of the whole kernel's error.

    `level` multiplies the jackknife variance; `relative_error` = √(ΣV/Σ(U²−V)), infinite where noise is all there is;
    `bound` is what the error made stays below in 95 % of all cases; `bias` is ‖plugin − unbiased‖ / ‖unbiased‖ over the
    sample, 0 where blocks are not paired. Of ΣV, `sketch_share` comes from the sketch, and of
    the rest `pair_share` from pairs of draws, which falls like 1/S²; what single draws do falls like 1/S.
    """

    level: float
    relative_error: float
    num_entries: int
    bound: float = math.nan
    pair_share: float = 0.0
    sketch_share: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True)
class Estimates:
    """One tile: the mean over all blocks (plugin, or the kernel itself), U and its standard error, where they exist."""

    plugin: Float64[Tensor, "*tile"]
    unbiased: Float64[Tensor, "*tile"] | None
    stderr: Float64[Tensor, "*tile"] | None


def jackknife_variance(by_block: Float64[Tensor, "r *tile"]) -> Float64[Tensor, "*tile"]:
    """Delete-one-block variance of U from T_r: 4 Σ(T_r − T̄)² / (R(R−1)(R−2)²)."""
    blocks = len(by_block)
    return _squared_deviations(by_block).mul_(4.0 / (blocks * (blocks - 1) * (blocks - 2) ** 2))


def _squared_deviations(values: Float64[Tensor, "r *tile"]) -> Float64[Tensor, "*tile"]:
    """Σ_r (v_r − v̄)², from differences to the first: 0 exactly where all are the same.

    One block at a time, which is many times faster than `var` over the leading axis, whose steps are a tile long, and
    on two threads faster than all differences at once.
    """
    total = torch.zeros_like(values[0])
    squares, difference = torch.zeros_like(total), torch.empty_like(total)
    for value in values[1:]:
        torch.sub(value, values[0], out=difference)
        total += difference
        squares.addcmul_(difference, difference)
    return squares.addcmul_(total, total, value=-1.0 / len(values))


def unbiased_variance(products: Float64[Tensor, "r r *tile"]) -> tuple[Tensor, Tensor, Tensor]:
    """(U, V, T_r): V = U² − (T² − 4ΣT_r² + 2A)/(R(R−1)(R−2)(R−3)), the bracket being all pairs that share no block."""
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
    """Variance of U over sketches, from what each of Q independent groups adds to Σ_{r≠r'} h_rr': Q·Var_q/(R(R−1))²."""
    groups = len(by_group)
    return _squared_deviations(by_group).mul_(groups / (groups - 1) / (num_blocks * (num_blocks - 1)) ** 2)


def calibrate(
    products: Float64[Tensor, "r ..."], *, pair_blocks: bool, by_group: Float64[Tensor, "q *sample"] | None = None
) -> Calibration:
    """Calibration from all block products of a sample of entries: (R, R, *sample), or (R, *sample) where blocks stand
    alone; and, of sketched features, from what each group of columns adds to their sum over different blocks.

    level = clip(mean V / mean J, (R−2)/(2(R−1)), 1); for means of independent blocks the variance is unbiased,
    level 1.
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
    noise = level * float(shape.sum())
    sources = [noise_source(noise, influences)]
    if by_group is not None:
        sketch = float(sketch_variance(by_group, blocks).sum())
        sources.append(noise_source(sketch, by_group))
        noise += sketch
    size = float(value.square().sum())
    relative = math.sqrt(_ratio(noise, size - noise))
    error = bound_factor(sources) * math.sqrt(noise)  # of U − Θ, by 95 %: then ‖Θ‖ is at least ‖U‖ less that
    return Calibration(
        level=level,
        relative_error=relative,
        num_entries=value.numel(),
        bound=_ratio(error, math.sqrt(size) - error),
        pair_share=pair_share,
        sketch_share=sketch / noise if noise > 0 else 0.0,
        bias=bias,
    )


def _ratio(error: float, signal: float) -> float:
    """Error over signal: infinite where there is none, 0 where there is no error either."""
    return error / signal if signal > 0 else math.inf if error > 0 else 0.0


def shares_of_sums(num_blocks: int, *, pair_blocks: bool) -> dict[str, dict[Sum, float]]:
    """How often each sum is in the statistics that are linear in them."""
    if not pair_blocks:
        return {"plugin": {WITHIN: 1.0 / num_blocks}}
    plugin = dict.fromkeys((WITHIN, BETWEEN), 1.0 / num_blocks**2)
    pairs = num_blocks * (num_blocks - 1)
    return {"plugin": plugin, "unbiased": {BETWEEN: 1.0 / pairs}} if pairs else {"plugin": plugin}


def estimate(sums: BlockSums, calibration: Calibration | None) -> Estimates:
    """The statistics of a tile; without a calibration, or without the sums by block, no standard error."""
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
    """How many pairs of examples the calibration samples, of `width` × `width` entries each: 4,096 entries in all."""
    return max(1, entries // width**2)


def sample_entries(seed: int, num_rows: int, num_columns: int, limit: int = SAMPLE_ENTRIES) -> tuple[Tensor, Tensor]:
    """Row and column numbers whose crossing is the calibration sample: everything where that is at most `limit`
    entries.

    A pure function of the seed and the kernel's size, never of its tiling.
    """
    rows = min(num_rows, max(math.isqrt(limit), limit // num_columns))
    columns = min(num_columns, limit // rows)

    def choose(group: int, size: int, count: int) -> Tensor:
        keys = uniform(seed, Stream.SAMPLE, torch.tensor([group]), size)[0]
        return keys.argsort()[:count].sort().values

    return choose(ROW_SAMPLE, num_rows, rows), choose(COLUMN_SAMPLE, num_columns, columns)


def t_quantile(confidence: float, num_blocks: int) -> float:
    """Half-width, in standard errors, of a two-sided interval: Student's t with R − 1 degrees of freedom."""
    return float(special.stdtrit(num_blocks - 1, 0.5 + confidence / 2.0))


def relative_distance(first: Tensor, second: Tensor) -> float:
    """‖first − second‖ / ‖second‖ in the Frobenius norm."""
    return float(torch.linalg.vector_norm(first - second) / torch.linalg.vector_norm(second))
