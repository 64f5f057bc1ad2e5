"""The GRPO loss from hidden states, forward and backward, against everything that is installed; then with tokens that
have no gradient, and with a frozen head.

    python benchmarks/kernels/linear_logprobs.py [--effort full|plain|quick] [--malloc stock|reuse|both]

`--effort full` needs about 12 GB of memory and takes half an hour or more on two cores.
"""

from record import record

if __name__ == "__main__":
    record("linear_logprobs", "The GRPO loss from hidden states, forward and backward.")
