"""The GRPO loss from log-probs, forward and backward, against the formulas composed in torch.

python benchmarks/kernels/grpo_loss.py [--effort full|plain|quick] [--malloc stock|reuse|both]
"""

from record import record

if __name__ == "__main__":
    record("grpo_loss", "The GRPO loss from log-probs, forward and backward.")
