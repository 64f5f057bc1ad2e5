"""The certificate of the Triton kernels, earned in the interpreter, in the formats that it rounds as a GPU does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

FORMATS = ("fp32", "fp16")
"""The interpreter cuts bfloat16 off where a GPU rounds it."""
OPS = ("selective_log_softmax", "grpo_loss_from_logits", "linear_logprobs", "linear_loss")


def certified(name: str) -> None:
    """`certify.ensure` on the checks of one format, with Triton forced, as a run would."""
    import tempfile
    from pathlib import Path

    from grpoforge_kernels import certify
    from grpoforge_kernels.bench import adversarial
    from grpoforge_kernels.bench.forcing import forced

    every = adversarial.checks
    with tempfile.TemporaryDirectory() as scratch, forced("triton"):
        certify.folder = lambda: Path(scratch)
        adversarial.checks = lambda device: (check for check in every(device) if check.dtype == name)
        try:
            assert certify.available("cpu") == ["triton"]
            earned = certify.certify("triton", "cpu")
            assert isinstance(earned, certify.Certificate), earned
            assert earned.num_checks == len([*adversarial.checks("cpu")]) > 50
            assert earned.worst.keys() >= {f"{op} {name}" for op in OPS}
            assert certify.ensure("cpu") == ["triton"], "found again"
        finally:
            adversarial.checks = every


def check_fp32():
    certified("fp32")


def check_fp16():
    certified("fp16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"check_{name}" for name in FORMATS])
def test_in_the_interpreter(name: str, interpreted: Callable[[str], dict[str, str]]) -> None:
    failure = interpreted(__file__)[name]
    assert not failure, failure


if __name__ == "__main__":
    import interpreter

    interpreter.main(dict(globals()))
