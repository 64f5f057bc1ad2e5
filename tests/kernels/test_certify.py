"""Certificates: what earns one, what ends one, and what happens to a kernel that does not get one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge_kernels import certify, dispatch, ops
from grpoforge_kernels.bench import adversarial, machine
from grpoforge_kernels.bench.accuracy import Bound
from grpoforge_kernels.bench.forcing import forced
from grpoforge_kernels.certify import Certificate, Failure
from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Certificates in a folder of their own, the compiled library where it was, every decision made anew."""
    monkeypatch.setattr(certify, "folder", lambda: tmp_path / "certificates")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the kernels warn of, whoever else listens."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("grpoforge_kernels")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def row_kernels(backend: str) -> ModuleType:
    return dispatch._module(backend, "selective_log_softmax")  # type: ignore[return-value]


def flip_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the sign of the C++ gradient, as an edit of the kernel would."""
    module = row_kernels("cpp")
    right = module.row_gradient

    def flipped(*arguments: Any, **options: Any) -> Tensor:
        return right(*arguments, **options).neg_()  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "row_gradient", flipped)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.needs_compiler)])
def test_every_check_holds(backend: str) -> None:
    broken = []
    with forced(backend):
        for check in adversarial.checks("cpu"):
            value, gradient = check.run()
            if not (value <= check.bound.value and gradient <= check.bound.gradient):
                broken.append(f"{check.op} {check.dtype} {check.name}: {value:.1e} {gradient:.1e}")
    assert broken == []


def test_the_checks_cover_the_list() -> None:
    names = {(check.op, check.name) for check in adversarial.checks("cpu")}
    assert len(names) > 30
    for name in ("no rows", "all tokens but one banned", "logits around -1e4", "ids outside the vocabulary"):
        assert ("selective_log_softmax", name) in names
    for op in ("linear_logprobs", "linear_loss"):
        for name in ("head", "every other token banned", "logits around +1e4", "masked rows that hold NaN", "no rows"):
            assert (op, name) in names
    assert ("grpo_loss_from_logits", "logits around -1e4, dual clip with k2") in names
    assert ("tree_attention", "NaN in another tree") in names
    assert ("decoder_layer", "gates at their ends") in names
    assert {op for op, _ in names} == {name for name in ops.__all__ if name.islower()}


@pytest.mark.needs_compiler
def test_a_certificate_is_earned_and_found_again() -> None:
    assert certify.certificate("cpp", "cpu") is None
    earned = certify.certify("cpp", "cpu")
    assert isinstance(earned, Certificate)
    assert certify.certificate("cpp", "cpu") == earned
    assert earned.identity.backend == "cpp" and earned.identity.torch == torch.__version__
    assert earned.num_checks == len([*adversarial.checks("cpu")])
    for key, (value, gradient) in earned.worst.items():
        assert value <= earned.bounds[key][0] and gradient <= earned.bounds[key][1]
    assert certify.as_json(earned)["certified"] is True
    (file,) = certify.folder().iterdir()
    assert json.loads(file.read_text())["identity"]["kernels"] == certify.kernel_hash("cpp")


def earned_by_hand(backend: str = "cpp") -> Certificate:
    earned = Certificate(certify.identity(backend, "cpu"), "2026-11-23", 1, {"op": [1.0, 1.0]}, {"op": [0.0, 0.0]})
    certify._write(earned)
    return earned


MACHINE = {"cpu_name": "another processor", "cpu_flags_digest": "another", "compiler": "another compiler 13.1"}


@pytest.mark.parametrize("changed", [*MACHINE, "torch", "triton", "arguments of the compiler"])
def test_a_certificate_ends_when_anything_that_it_names_changes(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "triton" if changed == "triton" else "cpp"
    earned = earned_by_hand(backend)
    assert certify.certificate(backend, "cpu") == earned
    if changed in MACHINE:
        monkeypatch.setattr(machine, changed, lambda: MACHINE[changed])
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    elif changed == "triton":
        monkeypatch.setattr(certify, "_version", lambda package: f"{package} 2.99")
    else:
        monkeypatch.setattr(build, "find_compiler", lambda: ("/usr/bin/c++", "-O0"))
    assert certify.certificate(backend, "cpu") is None


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize(
    "file",
    ["rows.py", "grpo_loss.py", "dispatch.py", "reference/grpo_loss.py", "{backend}/grpo_loss.py", "bench/accuracy.py"],
)
def test_a_certificate_ends_when_a_source_changes(
    file: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(certify.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__")))
    earned_by_hand(backend)
    monkeypatch.setattr(certify, "PACKAGE", copy)
    # The same bytes elsewhere are the same kernels.
    assert certify.certificate(backend, "cpu") is not None
    source = copy / file.format(backend=backend)
    source.write_text(source.read_text() + "\n")
    assert certify.certificate(backend, "cpu") is None


@pytest.mark.parametrize("file", ["rows.h", "linear.cpp", "tree_attention.cpp"])
def test_a_certificate_ends_when_a_source_in_cpp_changes(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(build.SOURCES, tmp_path / "cpp"))
    earned_by_hand()
    monkeypatch.setattr(build, "SOURCES", copy)
    assert certify.certificate("cpp", "cpu") is not None
    (copy / file).write_text((copy / file).read_text() + "\n")
    assert certify.certificate("cpp", "cpu") is None


def test_a_file_under_another_ones_name_is_no_certificate() -> None:
    earned = earned_by_hand()
    (file,) = certify.folder().iterdir()
    values = json.loads(file.read_text())
    values["identity"]["kernels"] = "0" * 64
    file.write_text(json.dumps(values))
    assert certify.certificate("cpp", "cpu") is None
    for text in ("", "{}", "[]", "null", '{"identity": 3}', json.dumps({**values, "more": 1})):
        file.write_text(text)
        assert certify.certificate("cpp", "cpu") is None
    certify._write(earned)
    assert certify.certificate("cpp", "cpu") == earned


def test_a_cache_that_cannot_be_written_costs_only_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(certify, "folder", lambda: tmp_path / "file" / "certificates")
    monkeypatch.setattr(adversarial, "checks", lambda device: iter(()))
    assert isinstance(certify.certify("reference", "cpu"), Certificate)
    assert certify.certificate("reference", "cpu") is None


def one_check(**outcome: Any) -> Any:
    def run() -> tuple[float, float]:
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"], outcome["gradient"]

    check = adversarial.Check("selective_log_softmax", "fp32", "a name", run)
    assert check.bound == Bound(1e-6, 2e-6)
    return lambda device: iter([check])


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ({"value": 1e-3, "gradient": 0.0}, "the value is off by 1.0e-03, the bound is 1.0e-06"),
        ({"value": 0.0, "gradient": 2e-2}, "the gradient is off by 2.0e-02, the bound is 2.0e-06"),
        ({"value": float("nan"), "gradient": 0.0}, "the value is off by nan, the bound is 1.0e-06"),
        ({"error": adversarial.Broken("it moved")}, "it moved"),
        ({"error": RuntimeError("no launch\nand more")}, "RuntimeError: no launch"),
        ({"error": KernelError("no such thing")}, "KernelError: no such thing"),
        ({"error": MemoryError()}, "MemoryError: "),
    ],
)
def test_a_failure_names_the_check(outcome: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "checks", one_check(**outcome))
    failed = certify.certify("reference", "cpu")
    assert isinstance(failed, Failure)
    assert failed.reason == f"selective_log_softmax fp32, a name: {reason}"
    assert certify.as_json(failed)["certified"] is False
    assert not certify.folder().exists()


@pytest.mark.needs_compiler
def test_a_kernel_with_a_flipped_sign_is_not_used(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    flip_gradients(monkeypatch)
    assert certify.ensure("cpu") == []
    (warning,) = warnings
    assert warning.startswith("the cpp kernels are not used: they are wrong on this machine (selective_log_softmax ")
    assert "the gradient is off by" in warning and "`grpoforge bench --certify`" in warning
    assert dispatch.backend_name("selective_log_softmax", torch.device("cpu"), torch.float32) == "reference"
    logits = torch.randn(3, 50, dtype=torch.float32, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.selective_log_softmax(logits, torch.tensor([1, 2, 3]), 1.0)[0].sum(), logits)
    assert (gradient[torch.arange(3), torch.tensor([1, 2, 3])] > 0).all()
    # Asked again, it does not use them either, and does not say so twice.
    assert certify.ensure("cpu") == []
    assert warnings == [warning]


@pytest.mark.needs_compiler
def test_forcing_a_backend_that_failed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    flip_gradients(monkeypatch)
    certify.ensure("cpu")
    with forced("cpp"), pytest.raises(KernelError, match="GRPOFORGE_KERNELS=cpp cannot run selective_log_softmax"):
        ops.selective_log_softmax(torch.randn(3, 50), torch.tensor([1, 2, 3]), 1.0)


@pytest.mark.needs_compiler
def test_a_valid_certificate_is_not_earned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    earned_by_hand()
    monkeypatch.setattr(certify, "certify", lambda backend, device: pytest.fail("tried again"))
    assert certify.ensure("cpu") == ["cpp"]


def test_what_is_not_used_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "certify", lambda backend, device: pytest.fail("tried"))
    with forced("reference"):
        assert certify.available("cpu") == []
        assert certify.ensure("cpu") == []


FLIPPED_FROM, FLIPPED_TO = "scores.softcap * tanh_of(", "-scores.softcap * tanh_of("
"""A sign that the quick check at loading does not look at."""

SIGN_FLIP = """
import logging, sys, torch
logging.basicConfig(format="%(message)s")
from pathlib import Path
from grpoforge_kernels.cpp import build
build.SOURCES = Path(sys.argv[1])
from grpoforge_kernels import certify, dispatch, ops
certified = certify.ensure("cpu")
logits = torch.linspace(-9, 9, 300).view(3, 100).requires_grad_()
logprobs = ops.selective_log_softmax(logits, torch.tensor([0, 50, 99]), 1.0, softcap=5.0).logprobs
(gradient,) = torch.autograd.grad(logprobs.sum(), logits)
by_hand = (5 * (logits / 5).tanh()).log_softmax(1)
(right,) = torch.autograd.grad(by_hand[torch.arange(3), torch.tensor([0, 50, 99])].sum(), logits)
name = dispatch.backend_name("selective_log_softmax", torch.device("cpu"), torch.float32)
print(certified, name, torch.allclose(gradient, right, atol=1e-6))
"""


@pytest.mark.needs_compiler
@pytest.mark.parametrize(("flipped", "answer"), [(False, "['cpp'] cpp True"), (True, "[] reference True")])
def test_a_flipped_sign_in_the_source_is_seen(flipped: bool, answer: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(build.SOURCES, tmp_path / "cpp", ignore=shutil.ignore_patterns("__pycache__")))
    if flipped:
        (source,) = [path for path in copy.iterdir() if path.is_file() and FLIPPED_FROM in path.read_text()]
        source.write_text(source.read_text().replace(FLIPPED_FROM, FLIPPED_TO))
    done = subprocess.run(
        [sys.executable, "-c", SIGN_FLIP, str(copy)],
        env={**os.environ, build.CACHE_VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == answer, done.stderr
    assert ("the cpp kernels are not used: they are wrong on this machine" in done.stderr) == flipped


GENERATION = """
import logging, sys
logging.basicConfig(format="%(message)s")
from grpoforge_kernels.cpp import build
{change}
from grpoforge_kernels import certify
from grpoforge_kernels.bench import adversarial, machine
result = certify.certify("cpp", "cpu")
print(type(result).__name__, getattr(result, "reason", result.num_checks == len([*adversarial.checks("cpu")])))
"""
GENERATIONS = {
    **{
        options[0]: f"build._cpu_flags = lambda: {' '.join(sorted(flags))!r}" for options, flags in build.LEVELS.items()
    },
    "plain": 'build._variants = lambda: (("-fopenmp", build.PLAIN),)',
    "plain, one thread": 'build._variants = lambda: (("-fopenmp-simd", build.PLAIN),)',
}


@pytest.mark.slow
@pytest.mark.needs_compiler
@pytest.mark.parametrize("generation", list(GENERATIONS))
def test_every_generation_of_processors_is_certified(generation: str, tmp_path: Path) -> None:
    """Where this machine can run it: instructions of a generation that it lacks would kill the process."""
    needed = next((flags for options, flags in build.LEVELS.items() if options[0] == generation), set())
    if not needed <= set(build._cpu_flags().split()):
        pytest.skip(f"this processor has not all of {sorted(needed)}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GENERATION.format(change=GENERATIONS[generation])],
        env={**os.environ, build.CACHE_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("Certificate True\n", "")
