"""Off-policy corrections: weights ``[b, T]`` that multiply the policy loss of each token; 0 drops it.

The sampler and the trainer never compute quite the same log-probs, and a policy that waits for its update has moved.
``rho = exp(old - sampling)`` is the ratio of the trainer's probability of a token, before the update, to the sampler's.
Nothing here is differentiated, and denominators stay: a dropped token counts as 0, not as absent. Masked positions take
no part, whatever stands there; a row without tokens has ratio 1. When the two agree every weight is exactly 1.
"""
