"""What entries could hold that no draw resolves: an upper bound, from how often and how much outputs changed.

Let an output of an example change with probability p under one draw, by at most D. Its nonlocal gradient is
g = E[Δ v], v the draw's direction, whose component along any unit vector is τ times a variable with the tails of a
normal one (`activation`: a sum of such, one for each layer). On an event of probability p the mean of such a variable
is at most √(2 ln(2/p)) (the entropy inequality; Talagrand's level-1 inequality up to constants), so

    |g| ≤ D τ p √(2 ln(2/p)) .

For a sign unit of 40 parameters this is 1.4 to 1.8 times |g|, for one of 2 parameters up to 10 times. An entry
Σ_c ⟨g_c, g'_c⟩ is at most the sum of products of these bounds over the outputs c that are not resolved. For the
covariance kernel, an entry is E[Δ Δ' |v|²]/P, at most (D τ)² times the probability that both outputs change under one
draw.

p is not known. With k events in N independent groups of draws it is bounded by Clopper and Pearson; for k = 0 by about
3/N at 95 % (the rule of three), and 3.7/N at the 97.5 % used here. D τ is taken to be the largest change that was seen
in the sample: a change that no draw showed may be larger. The bound serves a sum of squares over many entries that were
selected because they had no events. For entries of order p² it holds by Markov's inequality, whatever depends on what:
E[p⁴ (1 − p)^N] ≤ (4/(e N))⁴ for any distribution of p, which is 2.5 % of (3.7/N)⁴.

Axes: n (n1, n2) rows, r slots (blocks; for the covariance kernel draws), c outputs.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from nntk_dist.products.block_sums import Changes, Meeting

CONFIDENCE = 0.975


def joined_changes(parts: Sequence[Changes]) -> Changes:
    """Join the changes of some outputs at a time."""
    first = parts[0]
    counts = torch.cat([part.counts for part in parts], dim=2)
    return Changes(counts, max(part.largest for part in parts), first.num_groups)


def bound_of_unresolved(
    rows: Changes, others: Changes, meeting: Meeting, *, pair_blocks: bool
) -> Float64[Tensor, "*tile"]:
    """Return a 97.5 % bound of what the unresolved outputs of each entry could add to it; 0 if all are resolved.

    Args:
        rows: the changes of the rows' outputs.
        others: the changes of the columns' outputs.
        meeting: which pairs of examples meet, and whether outputs are summed.
        pair_blocks: whether blocks are paired; otherwise it is the covariance kernel, with changes by draw.
    """
    largest = max(rows.largest, others.largest)
    left, right = (largest * _coherent_share(each) for each in (rows, others))
    joint = largest**2 * float(_most_likely(torch.zeros((), dtype=torch.float64), rows.num_groups))
    num_outputs = rows.counts.shape[2]
    total: Tensor | None = None
    for part in [slice(None)] if meeting.full else [slice(c, c + 1) for c in range(num_outputs)]:
        first, second = rows.counts[:, :, part] > 0, others.counts[:, :, part] > 0
        if pair_blocks:
            resolved = meeting.in_different_blocks(first, second)
            bound = meeting.outputs(left[:, part, None], right[:, part, None])
        else:
            resolved = meeting.outputs(first.transpose(1, 2).double(), second.transpose(1, 2).double()) > 0
            bound = torch.full(resolved.shape, joint, dtype=torch.float64, device=resolved.device)
        bound = bound.masked_fill(resolved, 0.0)
        total = bound if total is None else total + bound
    assert total is not None
    return total


def _coherent_share(changes: Changes) -> Float64[Tensor, "n c"]:
    """Return p √(2 ln(2/p)), p the bound of the probability that a draw changes an output."""
    likely = _most_likely(changes.counts.sum(1).double(), changes.num_groups)
    return likely * (2.0 * (2.0 / likely).log()).sqrt()


def _most_likely(events: Float64[Tensor, "*n"], num_groups: int) -> Float64[Tensor, "*n"]:
    """Return Clopper and Pearson's upper bound of a probability, from the number of events; at most 1."""
    from scipy import special  # slow to import

    seen = events.cpu().clamp_max(num_groups)
    bound = special.betaincinv((seen + 1.0).numpy(), (num_groups - seen).clamp_min(1.0).numpy(), CONFIDENCE)
    values = torch.as_tensor(bound, dtype=torch.float64)
    return torch.where(seen >= num_groups, torch.ones_like(values), values).to(events.device)
