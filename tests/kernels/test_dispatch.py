"""Which backend runs an operation, and what a force that cannot be met says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grpoforge_kernels import dispatch
from grpoforge_kernels.cpp import loader
from grpoforge_kernels.errors import KernelError

CPU = torch.device("cpu")
OP = "selective_log_softmax"


@pytest.fixture(autouse=True)
def _decided_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("GRPOFORGE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()
    loader.forget()


@pytest.mark.needs_compiler
def test_each_dtype_has_its_backend() -> None:
    names = {dtype: dispatch.backend_name(OP, CPU, dtype) for dtype in (*dispatch.DTYPES, torch.float64)}
    assert names.pop(torch.float64) == "reference"
    assert set(names.values()) == {"cpp"}


@pytest.mark.needs_compiler
def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="grpoforge_kernels"):
        for _ in range(3):
            dispatch.backend(OP, CPU, torch.float32)
    assert caplog.messages == ["selective_log_softmax on cpu in torch.float32: cpp"]


@pytest.mark.needs_compiler
def test_a_force_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference", "cpp"):
        monkeypatch.setenv("GRPOFORGE_KERNELS", name)
        assert dispatch.backend_name(OP, CPU, torch.float32) == name


@pytest.mark.parametrize(
    ("forced", "dtype", "message", "hint"),
    [
        (
            "triton",
            torch.float32,
            "selective_log_softmax: it does not run on cpu",
            "unset GRPOFORGE_KERNELS",
        ),
        ("cpp", torch.float64, "cannot run selective_log_softmax: it has no float64", "unset GRPOFORGE_KERNELS"),
        ("cp", torch.float32, "GRPOFORGE_KERNELS=cp names no backend", "did you mean cpp?"),
        ("cuda", torch.float32, "names no backend", "the backends are reference, cpp, triton"),
    ],
)
def test_an_impossible_force_is_an_error(
    forced: str, dtype: torch.dtype, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPOFORGE_KERNELS", forced)
    with pytest.raises(KernelError, match=message) as caught:
        dispatch.backend(OP, CPU, dtype)
    assert hint in caught.value.hint


@pytest.mark.parametrize(("forced", "device"), [("", "cpu"), ("reference", "cpu"), ("reference", "cuda")])
def test_a_force_is_checked_ahead(forced: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPOFORGE_KERNELS", forced)
    dispatch.check_force(device)


def test_a_force_of_another_device_is_an_error_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPOFORGE_KERNELS", "cpp")
    with pytest.raises(KernelError, match="GRPOFORGE_KERNELS=cpp cannot run selective_log_softmax: it does not run on"):
        dispatch.check_force("cuda")


def test_a_forced_cpp_without_a_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("grpoforge_kernels.cpp.")]:
        if name.removeprefix("grpoforge_kernels.cpp.") not in ("build", "loader"):
            monkeypatch.delitem(sys.modules, name)
    loader.forget()
    for name, value in (("CXX", "no-such-compiler"), ("GRPOFORGE_CACHE", str(tmp_path)), ("GRPOFORGE_KERNELS", "cpp")):
        monkeypatch.setenv(name, value)
    for ask in (lambda: dispatch.check_force("cpu"), lambda: dispatch.backend(OP, CPU, torch.float32)):
        with pytest.raises(KernelError) as caught:
            ask()
        assert caught.value.message == (
            "GRPOFORGE_KERNELS=cpp cannot run selective_log_softmax: the C++ kernels need a compiler:"
            " CXX=no-such-compiler is not a program"
        )
        assert caught.value.hint == "unset GRPOFORGE_KERNELS: the best backend is then chosen"


def test_a_backend_without_the_operation() -> None:
    assert dispatch.obstacle("cpp", "no_such_op", "cpu", torch.float32) == "it has no no_such_op"
    assert dispatch.obstacle("reference", OP, "cpu", torch.float64) is None


def test_a_refused_backend_is_left_loudly(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.refuse("cpp", "entropy is off by 0.3")
    assert dispatch.backend_name(OP, CPU, torch.float32) == "reference"
    assert caplog.messages == ["the cpp kernels are not used: entropy is off by 0.3"]


def test_a_library_that_cannot_be_had_is_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise KernelError("the C++ kernels need a compiler", "install g++")

    loader.forget()
    monkeypatch.setattr(loader, "_load", broken)
    for _ in range(2):
        with pytest.raises(KernelError, match="need a compiler"):
            loader.library("losses")
    assert caplog.messages == [
        "the C++ kernels need a compiler (install g++); the slower PyTorch kernels, which compute the same, are used"
    ]


def test_an_accelerator_without_triton_is_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("grpoforge_kernels.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    for dtype in (torch.float32, torch.bfloat16):
        for op in (OP, "grpo_loss"):
            assert dispatch.backend_name(op, torch.device("cuda"), dtype) == "reference"
    assert len(caplog.messages) == 1, caplog.messages
    assert caplog.messages[0].startswith("the triton kernels cannot be loaded: import of triton halted")
    assert caplog.messages[0].endswith("; the slower PyTorch kernels, which compute the same, are used")
