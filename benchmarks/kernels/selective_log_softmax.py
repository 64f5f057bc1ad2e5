"""Log-probs from logits, forward and backward, against everything that is installed.

    python benchmarks/kernels/selective_log_softmax.py [--effort full|plain|quick] [--malloc stock|reuse|both]

`--effort full` needs about 8 GB of memory and takes some minutes.
"""

from record import record

if __name__ == "__main__":
    record("selective_log_softmax", "Log-probs from logits, forward and backward.")
