"""Bounds of the total error ‖U − Θ‖ of an estimate, from few independent samples.

Let the errors U_e − Θ_e of the entries have covariance Σ. Then Σ_e (U_e − Θ_e)² is distributed about like
tr Σ · χ²_ν/ν with ν = (tr Σ)²/tr Σ² degrees of freedom: the number of entries that err independently, 1 if all err
together, as they do under few draws of a smooth network. Its mean is estimated from n independent samples (blocks, or
groups of sketch columns) with ν(n − 1) degrees. So the squared error over its estimate follows Fisher's F(ν, ν(n − 1));
for ν = 1 this is Student's t squared. Only spreads are estimated here.

Axes: n independent samples, leading; the rest is entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True)
class NoiseSource:
    """One independent cause of error.

    Attributes:
        total: tr Σ.
        degrees: ν.
        num_samples: The number of samples that it was estimated from.
    """

    total: float
    degrees: float
    num_samples: int


def noise_source(total: float, influences: Float64[Tensor, "n *entries"]) -> NoiseSource:
    """Estimate ν of a cause of error from the Gram matrix of its samples.

    (tr Σ)² and tr Σ² are estimated without bias under normal noise; ν is at least 1.

    Args:
        total: tr Σ.
        influences: Independent samples of the error, up to one common factor.
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
    """Return the factor from the estimated root mean square error to a bound of the error, by `confidence`.

    Independent causes are combined by Satterthwaite's formula: 1/ν = Σ (total_i/total)²/ν_i.
    """
    total = sum(source.total for source in sources)
    if total <= 0:
        return 1.0
    shares = [source.total / total for source in sources]
    made = 1.0 / sum(share**2 / each.degrees for share, each in zip(shares, sources, strict=True))
    known = 1.0 / sum(
        share**2 / (each.degrees * (each.num_samples - 1)) for share, each in zip(shares, sources, strict=True)
    )
    from scipy import special  # slow to import

    return float(special.fdtri(made, known, confidence)) ** 0.5
