"""The exact KL of each token's distribution, from the log-probs of the whole vocabulary.

No sampling noise in value or gradient at a given state; what is left to chance is which states are visited. Needs the
logits of policy and reference: ``n * V`` numbers each. A token of probability 0 on the left contributes nothing.
"""

from __future__ import annotations

from torch import Tensor

from grpoforge.declarations import declares


@declares(unbiased=True)
def full(distribution: Tensor, ref_distribution: Tensor) -> Tensor:
    """``sum_v pi(v) (log pi(v) - log pi_ref(v))``, ``[n]``: the reverse KL(policy || ref), value and gradient exact.

    What k1, k2 and k3 estimate from one token. Infinite where the reference excludes a token that the policy does not.
    verl names it (``full``) and raises NotImplementedError.
    """
    return _divergence(distribution, ref_distribution)


def full_forward(distribution: Tensor, ref_distribution: Tensor) -> Tensor:
    """``sum_v pi_ref(v) (log pi_ref(v) - log pi(v))``, ``[n]``: the forward KL(ref || policy), exact in both.

    What the gradient of k3 estimates (2506.09477).
    """
    return _divergence(ref_distribution, distribution)


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) over the last dimension of log-probs."""
    excluded = left == float("-inf")
    # Replaced before it is multiplied: -inf - -inf is NaN, and 0 * NaN is NaN.
    difference = left.masked_fill(excluded, 0.0) - right.masked_fill(excluded, 0.0)
    return (left.exp() * difference).sum(dim=-1)
