"""Per-token estimates of KL(policy || reference), from the sampled token's log-probs or from the whole vocabulary's."""
