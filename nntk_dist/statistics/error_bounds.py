"""How far an estimate may lie from the truth as a whole: bounds of ‖U − Θ‖ from few independent samples.

A squared error Σ_e (U_e − Θ_e)² whose entries have covariance Σ is spread like tr Σ · χ²_ν/ν, with as many degrees of
freedom ν = (tr Σ)²/tr Σ² as entries err independently: one, where all of them err together, as they do under few draws
of a smooth network. Its mean is known from n independent samples (blocks, or groups of sketch columns) with ν(n − 1)
degrees; so the error made, over the error estimated, follows Fisher's F(ν, ν(n − 1)): Student's t squared where ν = 1.
Nothing is estimated here but spreads.

Axes: n independent samples, leading; the rest is entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64
from scipy import special
from torch import Tensor


@dataclass(frozen=True)
class NoiseSource:
    """One independent cause of error: tr Σ, its degrees of freedom ν, and the samples that it was estimated from."""

    total: float
    degrees: float
    num_samples: int


def noise_source(total: float, influences: Float64[Tensor, "n *entries"]) -> NoiseSource:
    """A cause of error of which `influences` are independent samples, each up to one factor for all of them.

    ν from the samples' Gram matrix, with (tr Σ)² and tr Σ² estimated without bias under normal noise; at least 1.
    """
    deviations = (influences - influences.mean(0)).flatten(1)
    gram = deviations @ deviations.T
    n = len(influences) - 1
    trace, square = float(gram.trace()) / n, float(gram.square().sum()) / n**2
    if trace <= 0:
        return NoiseSource(total, 1.0, len(influences))
    scale = n / ((n - 1) * (n + 2))
    of_square = scale * (n * square - trace**2)  # tr Σ²
    of_trace = scale * ((n + 1) * trace**2 - 2 * square)  # (tr Σ)²
    most = float(deviations.shape[1])
    degrees = most if of_square <= of_trace / most else of_trace / of_square
    return NoiseSource(total, max(1.0, degrees), len(influences))


def bound_factor(sources: Sequence[NoiseSource], confidence: float = 0.95) -> float:
    """What the estimated root mean square error is multiplied by to bound the error made, by `confidence`.

    Independent causes are joined as Satterthwaite does: 1/ν = Σ (total_i/total)²/ν_i.
    """
    total = sum(source.total for source in sources)
    if total <= 0:
        return 1.0
    shares = [source.total / total for source in sources]
    made = 1.0 / sum(share**2 / each.degrees for share, each in zip(shares, sources, strict=True))
    known = 1.0 / sum(
        share**2 / (each.degrees * (each.num_samples - 1)) for share, each in zip(shares, sources, strict=True)
    )
    return float(special.fdtri(made, known, confidence)) ** 0.5
