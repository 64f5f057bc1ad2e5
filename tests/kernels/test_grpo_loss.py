"""The fused loss against the composed path of the plugins, in value, in every count and in the gradient."""

from __future__ import annotations

import dataclasses
import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grpoforge.reduction import reduce
from grpoforge.types import LossInputs
from grpoforge_kernels import dispatch
from grpoforge_kernels.bench.accuracy import BOUNDS
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.grpo_loss import ClipOptions, GrpoLoss, grpo_loss, grpo_loss_from_logits
from grpoforge_kernels.selective_log_softmax import selective_log_softmax
from grpoforge_plugins.kl.schulman import k1, k2, k3
from grpoforge_plugins.losses.clip import Clip

KLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
bounds = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bounds.py"))))
"""The table beside this file, which is no package."""
FLOAT32 = BOUNDS["grpo_loss", "fp32"].gradient
ROUNDING = {torch.float64: 0.0, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of the largest gradient: it is scaled by the upstream before or after it is rounded."""
PLAIN = {"epsilon_low": 0.2, "epsilon_high": 0.28}


def detached(result: GrpoLoss) -> GrpoLoss:
    return GrpoLoss(*(value.detach() for value in result))


@dataclass(frozen=True)
class Tokens:
    """Arguments of `grpo_loss`, all but the options."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> Tokens:
        advantages = self.advantages[:, :1].to(dtype).expand(self.advantages.shape)
        moved = {name: getattr(self, name).to(dtype) for name in ("logprobs", "old", "ref")}
        return dataclasses.replace(self, **moved, advantages=advantages)

    def fused(self, *, kl: str | None, beta: float, **clip: Any) -> tuple[GrpoLoss, Tensor]:
        """The result, and the gradient by the log-probs."""
        leaf = self.logprobs.detach().requires_grad_()
        result = grpo_loss(
            leaf, self.old, self.ref, self.advantages, self.mask, self.weights, **clip, kl=kl, beta=beta
        )  # fmt: skip
        return detached(result), torch.autograd.grad(result.loss, leaf)[0]

    def composed(self, *, kl: str | None, beta: float, **clip: Any) -> tuple[GrpoLoss, Tensor]:
        """The same from the parts as the engine composes them, differentiated by autograd."""
        leaf = self.logprobs.detach().requires_grad_()
        nothing = torch.zeros_like(leaf)
        inputs = LossInputs(
            logprobs=leaf,
            old_logprobs=self.old,
            sampling_logprobs=self.old,
            advantages=self.advantages,
            completion_mask=self.mask,
            entropy=nothing.detach(),
        )
        per_token, metrics = Clip(**clip)(inputs)
        estimate = nothing
        if kl is not None:
            held = [torch.where(self.mask, values, nothing) for values in (leaf, self.ref)]
            estimate = torch.where(self.mask, KLS[kl](*held), nothing)
        loss = reduce(torch.where(self.mask, per_token, nothing) + beta * estimate, self.weights)
        sums = {name: torch.where(self.mask, values, nothing).sum() for name, values in metrics.items()}
        result = GrpoLoss(
            loss=loss,
            kl_sum=estimate.sum(),
            low_sum=sums["clip_ratio/low_mean"],
            high_sum=sums["clip_ratio/high_mean"],
            bound_sum=sums.get("clip_ratio/bound_mean", torch.zeros(())),
            ratio_deviation=(inputs.ratio - 1).abs().max() if self.mask.numel() else torch.zeros(()),
            kl_max=estimate.abs().max() if self.mask.numel() else torch.zeros(()),
        )
        assert float(sums["clip_ratio/region_mean"]) == float(result.region_sum.detach())
        return detached(result), torch.autograd.grad(loss, leaf)[0]


def drawn(rows: int, tokens: int, *, seed: int = 0, spread: float = 0.5, kept: float = 0.8) -> Tokens:
    """Float64 numbers that float32 holds exactly; in every fourth column the policy has not moved."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).double()

    logprobs = (-3 * normal(*shape).abs()).float().double()
    old, ref = ((logprobs + spread * normal(*shape)).float().double() for _ in range(2))
    old[:, ::4], ref[:, ::4] = logprobs[:, ::4], logprobs[:, ::4]
    mask = torch.rand(shape, generator=generator) < kept
    advantages = (normal(rows, 1) * (torch.rand(rows, 1, generator=generator) < 0.8)).expand(shape)
    weights = mask.double() * torch.rand(rows, 1, generator=generator, dtype=torch.float64) / max(1, tokens)
    return Tokens(logprobs, old, ref, advantages, mask, weights)


def assert_equal(given: tuple[GrpoLoss, Tensor], right: tuple[GrpoLoss, Tensor], relative: float) -> None:
    """Sums to ``relative`` of the sum of their sizes, counts exactly, gradients to ``relative`` of the largest."""
    (result, gradient), (exact, exact_gradient) = given, right
    for name in ("low_sum", "high_sum", "bound_sum", "region_sum"):
        assert float(getattr(result, name)) == float(getattr(exact, name)), name
    size = 1 + float(exact_gradient.abs().sum())
    assert float(result.loss) == pytest.approx(float(exact.loss), rel=relative, abs=relative * size)
    tokens = max(1, exact_gradient.numel())
    scale = tokens * (1 + float(exact.kl_max))
    assert float(result.kl_sum) == pytest.approx(float(exact.kl_sum), rel=relative, abs=relative * scale)
    for name in ("ratio_deviation", "kl_max"):
        value, wanted = float(getattr(result, name)), float(getattr(exact, name))
        assert value == pytest.approx(wanted, rel=relative, abs=relative), name
    largest = float(exact_gradient.abs().max()) if exact_gradient.numel() else 0.0
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=relative, atol=relative * largest)


CLIPS: list[dict[str, float]] = [
    {"epsilon_low": 0.2, "epsilon_high": 0.2},
    {"epsilon_low": 0.2, "epsilon_high": 0.28},
    {"epsilon_low": 0.0, "epsilon_high": 0.0},
    {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 1.5},
    {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": 3.0},
    {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": 1.1},
]


@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_float64_equals_the_composed_path(clip: dict[str, float], kl: str | None) -> None:
    tokens = drawn(7, 150)
    assert_equal(tokens.fused(**clip, kl=kl, beta=0.1), tokens.composed(**clip, kl=kl, beta=0.1), 1e-12)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_float32_equals_the_composed_path_in_float64(clip: dict[str, float], kl: str | None) -> None:
    tokens = drawn(7, 1200)
    right = tokens.composed(**clip, kl=kl, beta=0.1)
    assert_equal(tokens.to(torch.float32).fused(**clip, kl=kl, beta=0.1), right, FLOAT32)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    tokens=st.integers(0, 70),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 0.01, 0.5, 3.0]),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    clip=st.sampled_from(CLIPS),
    kl=st.sampled_from([None, "k1", "k2", "k3"]),
    beta=st.sampled_from([0.0, 0.04, 2.0]),
)
def test_any_shape_mask_and_options(
    rows: int, tokens: int, seed: int, spread: float, kept: float, clip: Any, kl: str | None, beta: float
) -> None:
    case = drawn(rows, tokens, seed=seed, spread=spread, kept=kept)
    right = case.composed(**clip, kl=kl, beta=beta)
    assert_equal(case.fused(**clip, kl=kl, beta=beta), right, 1e-12)
    assert_equal(case.to(torch.float32).fused(**clip, kl=kl, beta=beta), right, 2 * FLOAT32)


def test_by_hand() -> None:
    # Ratios 1, e^0.5 (clipped at 1.28 for A > 0) and e^-0.5 (clipped at 0.8 for A < 0); KL of the first: ref is equal.
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64)
    old, ref = logprobs - torch.tensor([[0.0, 0.5, -0.5]]), logprobs - torch.tensor([[0.0, 1.0, -1.0]])
    advantages = torch.tensor([[2.0, 2.0, -2.0]], dtype=torch.float64)
    tokens = Tokens(
        logprobs, old, ref, advantages, torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), 0.5).double()
    )
    result, gradient = tokens.fused(**PLAIN, kl="k3", beta=0.1)
    up, down = math.exp(-1), math.exp(1) - 2
    assert float(result.loss) == pytest.approx(0.5 * (-2 - 2.56 + 1.6 + 0.1 * (up + down)), rel=1e-14)
    assert gradient.tolist() == [pytest.approx([-1.0, 0.05 * (1 - math.exp(-1)), 0.05 * (1 - math.e)], rel=1e-14)]
    sums = [float(value.detach()) for value in result[1:]]
    assert sums == pytest.approx([up + down, 1, 1, 0, math.exp(0.5) - 1, down], rel=1e-14)
    assert float(result.region_sum) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [-1.5, -0.0, 0.0, 1.5])
def test_ties_split_the_gradient_as_autograd_does(dtype: torch.dtype, advantage: float) -> None:
    # A range of no width: the ratio 1 stands on both bounds, and on the neighbors of 1 the clip binds.
    step = torch.finfo(dtype).eps
    moves = torch.tensor([[0.0, step, -step, 2 * step, -2 * step, 0.0]], dtype=dtype)
    like = torch.zeros_like(moves)
    every = torch.ones_like(moves, dtype=torch.bool)
    tokens = Tokens(moves, like, like, torch.full_like(moves, advantage), every, every.double())
    options = {"epsilon_low": 0.0, "epsilon_high": 0.0, "kl": None, "beta": 0.0}
    (_, gradient), (_, right) = tokens.fused(**options), tokens.composed(**options)
    assert gradient.tolist() == right.tolist()
    assert gradient[0, 0] == -advantage


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_bounds_themselves_are_inside(sign: float) -> None:
    # Bounds made from the ratios: 1 - (1 - r) is r for these, so the comparison is of equal numbers.
    log_ratio = torch.tensor([[math.log(0.5), math.log(2.0), math.log(4.0)]], dtype=torch.float64)
    ratios = log_ratio.exp()
    every = torch.ones_like(ratios, dtype=torch.bool)
    like = torch.zeros_like(ratios)
    tokens = Tokens(log_ratio, like, like, torch.full_like(ratios, sign), every, every.double())
    options = {
        "epsilon_low": float(1 - ratios[0, 0]),
        "epsilon_high": float(ratios[0, 1] - 1),
        "delta": float(ratios[0, 2]),
        "kl": None,
        "beta": 0.0,
    }
    (result, gradient), (exact, right) = tokens.fused(**options), tokens.composed(**options)
    assert gradient.tolist() == right.tolist()
    assert [float(value) for value in result] == [float(value) for value in exact]
    assert float(gradient[0, 0]) == -sign * float(ratios[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_masked_positions_never_count(dtype: torch.dtype, junk: float) -> None:
    tokens = drawn(3, 40).to(dtype)
    right, right_gradient = tokens.fused(**PLAIN, kl="k3", beta=0.1)
    fields = {}
    for name in ("logprobs", "old", "ref", "advantages", "weights"):
        fields[name] = getattr(tokens, name).clone().masked_fill_(~tokens.mask, junk)
        one = dataclasses.replace(tokens, **{name: fields[name]})
        result, gradient = one.fused(**PLAIN, kl="k3", beta=0.1)
        assert gradient.equal(right_gradient) and torch.stack(result).equal(torch.stack(right)), name
    result, gradient = dataclasses.replace(tokens, **fields).fused(**PLAIN, kl="k3", beta=0.1)
    assert gradient.equal(right_gradient) and torch.stack(result).equal(torch.stack(right))
    assert not gradient[~tokens.mask].any() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["logprobs", "old", "ref", "advantages"])
def test_a_number_that_is_none_is_seen(dtype: torch.dtype, name: str) -> None:
    tokens = drawn(2, 700, kept=1.0).to(dtype)
    values = getattr(tokens, name).clone()
    values[1, 600] = math.nan
    result, gradient = dataclasses.replace(tokens, **{name: values}).fused(**PLAIN, kl="k3", beta=0.1)
    assert math.isnan(float(result.loss)) and math.isnan(float(gradient[1, 600]))
    assert int(gradient.isnan().sum()) == 1
    assert math.isnan(float(result.ratio_deviation)) == (name in ("logprobs", "old"))
    assert math.isnan(float(result.kl_max)) == (name in ("logprobs", "ref"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_of_inf_has_no_gradient_where_the_clip_binds(dtype: torch.dtype) -> None:
    moves = torch.tensor([[1000.0, 1000.0, -1000.0]], dtype=dtype)
    like, every = torch.zeros_like(moves), torch.ones_like(moves, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1.0, 1.0]], dtype=dtype)
    tokens = Tokens(moves, like, like, advantages, every, every.double())
    result, gradient = tokens.fused(epsilon_low=0.2, epsilon_high=0.2, dual_clip=3.0, kl="k1", beta=0.0)
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]
    assert float(result.loss) == pytest.approx(-1.2 + 3.0, rel=1e-6)
    assert float(result.ratio_deviation) == math.inf
    unbounded, gradient = tokens.fused(**PLAIN, kl=None, beta=0.0)
    assert float(unbounded.loss) == math.inf and gradient[0, 1] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_ratio_of_inf_times_an_advantage_of_zero_is_no_number(zero: float, dtype: torch.dtype) -> None:
    moves = torch.tensor([[1000.0, 0.5]], dtype=dtype)
    like, every = torch.zeros_like(moves), torch.ones_like(moves, dtype=torch.bool)
    tokens = Tokens(moves, like, like, torch.tensor([[zero, 1.0]], dtype=dtype), every, every.double())
    for result, gradient in (tokens.fused(**PLAIN, kl=None, beta=0.0), tokens.composed(**PLAIN, kl=None, beta=0.0)):
        assert math.isnan(float(result.loss))
        assert gradient.isnan().tolist() == [[True, False]]


def test_sums_of_terms_that_cancel_keep_their_digits() -> None:
    moves = torch.zeros(1, 48)
    moves[0, 0], moves[0, 16], moves[0, 32] = 2.0**24, 1.0, -(2.0**24)
    like, every = torch.zeros_like(moves), torch.ones_like(moves, dtype=torch.bool)
    result, _ = Tokens(moves, moves, like, like, every, every.double()).fused(**PLAIN, kl="k1", beta=0.0)
    assert float(result.kl_sum) == 1


@pytest.mark.needs_compiler
def test_one_advantage_for_all_of_a_row_is_not_copied() -> None:
    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.made += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
            return func(*args, **(kwargs or {}))

    few = drawn(4, 100).to(torch.float32)
    for advantages, copies in ((few.advantages, 0), (few.advantages.t().contiguous().t(), 1)):
        tokens = dataclasses.replace(few, advantages=advantages)
        with Copies() as mode, torch.no_grad():
            grpo_loss(*(getattr(tokens, one.name) for one in dataclasses.fields(tokens)), **PLAIN, kl="k3", beta=0.1)
        assert mode.made == copies


def test_the_operators_refuse_what_does_not_fit_together() -> None:
    few, options = drawn(2, 30).to(torch.float32), (0.2, 0.2, None, None, None, 0.0)
    tensors = [getattr(few, one.name) for one in dataclasses.fields(few)]
    tensors[1] = tensors[1][:1]
    with pytest.raises(KernelError, match=r"old_logprobs is torch\.float32 \[1, 30\], not torch\.float32 \[2, 30\]"):
        torch.ops.grpoforge.grpo_loss(*tensors, *options)
    _, old, ref, advantages, mask, weights = (one[0] for one in tensors)
    rows = torch.randn(30, 7), torch.zeros(30, dtype=torch.int64), torch.ones(30)
    with pytest.raises(KernelError, match=r"weights is torch\.float32"):
        torch.ops.grpoforge.grpo_loss_from_logits(
            *rows, old, ref, advantages, mask, weights.float(), *options, None, 1.0
        )


@pytest.mark.needs_compiler
def test_small_differences_keep_their_digits() -> None:
    # k3 is about x^2 / 2; exp(-x) - 1 + x in float32 would have no digit left.
    moves = torch.logspace(-6, -0.5, 400)[None]
    like, every = torch.zeros_like(moves), torch.ones_like(moves, dtype=torch.bool)
    for signed in (moves, -moves):
        tokens = Tokens(signed, signed, like, like, every, every.double())
        _, gradient = tokens.fused(**PLAIN, kl="k3", beta=1.0)
        torch.testing.assert_close(gradient.double(), -(-signed.double()).expm1(), rtol=3e-7, atol=0)
        for token in range(0, 400, 40):
            alone = Tokens(*(getattr(tokens, field.name)[:, [token]] for field in dataclasses.fields(tokens)))
            x = signed[0, token].double()
            result, _ = alone.fused(**PLAIN, kl="k3", beta=1.0)
            assert float(result.kl_sum) == pytest.approx(float((-x).expm1() + x), rel=1e-6 if abs(x) > 1e-3 else 1e-5)


def test_weight_zero_is_counted_but_adds_nothing() -> None:
    tokens = drawn(3, 20, kept=1.0)
    weights = tokens.weights.clone()
    weights[:, 10:] = 0
    result, gradient = dataclasses.replace(tokens, weights=weights).fused(**PLAIN, kl="k2", beta=0.1)
    right, _ = tokens.fused(**PLAIN, kl="k2", beta=0.1)
    assert not gradient[:, 10:].any()
    assert [float(value) for value in result[1:]] == [float(value) for value in right[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_gives_zeros(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    result, gradient = drawn(*shape).to(dtype).fused(**PLAIN, kl="k3", beta=0.1)
    assert [float(value) for value in result] == [0.0] * 7
    assert gradient.shape == shape


@pytest.mark.needs_compiler
def test_layout_and_threads_change_no_bit() -> None:
    tokens = drawn(64, 1100).to(torch.float32)
    assert tokens.advantages.stride() == (1, 0)
    right, right_gradient = tokens.fused(**PLAIN, kl="k3", beta=0.1)

    def assert_same(other: Tokens) -> None:
        result, gradient = other.fused(**PLAIN, kl="k3", beta=0.1)
        assert torch.stack(result).equal(torch.stack(right)) and gradient.equal(right_gradient)
        assert gradient.is_contiguous()

    everything = [field.name for field in dataclasses.fields(tokens)]
    assert_same(dataclasses.replace(tokens, advantages=tokens.advantages.contiguous()))
    gaps = {name: torch.nn.functional.pad(getattr(tokens, name), (3, 5))[:, 3:-5] for name in everything}
    assert_same(Tokens(**gaps))
    assert_same(Tokens(**{name: getattr(tokens, name).T.contiguous().T for name in everything}))
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert_same(tokens)
    finally:
        torch.set_num_threads(before)


def test_gradcheck() -> None:
    tokens = drawn(3, 5, kept=0.7)
    for clip in (CLIPS[1], CLIPS[3]):
        for kl in (None, "k1", "k2", "k3"):

            def loss(logprobs: Tensor, clip: Any = clip, kl: Any = kl) -> Tensor:
                tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
                return grpo_loss(logprobs, *tensors, **clip, kl=kl, beta=0.3).loss

            assert torch.autograd.gradcheck(loss, tokens.logprobs.clone().requires_grad_())


def test_the_gradient_scales_and_survives_a_second_backward() -> None:
    tokens = drawn(3, 50).to(torch.float32)
    leaf = tokens.logprobs.clone().requires_grad_()
    tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
    result = grpo_loss(leaf, *tensors, **PLAIN, kl="k3", beta=0.1)
    assert [value.requires_grad for value in result] == [True] + [False] * 6
    assert all(value.dtype == torch.float64 and value.shape == () for value in result)
    (3 * result.loss).backward(retain_graph=True)
    first = leaf.grad.clone()
    result.loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, first * 4 / 3)
    torch.testing.assert_close(torch.autograd.grad(-result.loss, leaf)[0], -first / 3)
    with torch.no_grad():
        silent = grpo_loss(leaf, *tensors, **PLAIN, kl="k3", beta=0.1)
    assert torch.stack(silent).equal(torch.stack(result)) and not silent.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_reference_is_needed_without_kl(dtype: torch.dtype) -> None:
    tokens = drawn(3, 9).to(dtype)
    tensors = (tokens.advantages, tokens.mask, tokens.weights)
    without = grpo_loss(tokens.logprobs, tokens.old, None, *tensors, **PLAIN, kl=None, beta=0.5)
    with_one = grpo_loss(tokens.logprobs, tokens.old, tokens.ref, *tensors, **PLAIN, kl=None, beta=0.5)
    assert torch.stack(without).equal(torch.stack(with_one))
    assert float(without.kl_sum) == float(without.kl_max) == 0


# --- what it refuses -------------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> dict[str, Any]:
    tokens = drawn(2, 3)
    return {
        "logprobs": tokens.logprobs,
        "old_logprobs": tokens.old,
        "ref_logprobs": tokens.ref,
        "advantages": tokens.advantages,
        "completion_mask": tokens.mask,
        "weights": tokens.weights,
        "kl": "k3",
        "beta": 0.1,
        **PLAIN,
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"kl": "kl3"}, "kl = 'kl3' is no KL of the fused loss", "did you mean k3?"),
        ({"kl": "reverse"}, "kl = 'reverse' is no KL of the fused loss", "the fused loss has k1, k2, k3"),
        ({"ref_logprobs": None}, "kl = 'k3' needs ref_logprobs, which is None", "pass kl=None for a loss without KL"),
        ({"epsilon_low": 1.0}, "epsilon_low is 1", "choose it in [0, 1)"),
        ({"epsilon_high": -0.1}, "epsilon_high is -0.1", "choose it >= 0"),
        ({"epsilon_high": math.nan}, "epsilon_high is nan", "choose it >= 0"),
        ({"delta": 1.28}, "delta is 1.28", "choose it > 1.28"),
        ({"dual_clip": 1.0}, "dual_clip is 1", "choose it > 1"),
        ({"weights": torch.ones(2, 3)}, "weights is torch.float32 [2, 3], not torch.float64 [2, 3]", ""),
        ({"advantages": torch.ones(2)}, "advantages is torch.float32 [2], not torch.float64 [2, 3]", ""),
        ({"old_logprobs": torch.ones(2, 3, device="meta").double()}, "old_logprobs is on meta, not on cpu", ""),
        ({"logprobs": torch.ones(2, 3).bfloat16()}, "log-probs are torch.bfloat16 [2, 3], not float32 or float64", ""),
        ({"logprobs": torch.ones(6)}, "log-probs are torch.float32 [6], not float32 or float64 [b, T]", ""),
    ],
)
def test_refusals(changed: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(KernelError) as caught:
        grpo_loss(**arguments(**changed))
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith(hint)


def test_two_bounds_are_the_smaller_one() -> None:
    tokens = drawn(9, 60, spread=2.0)
    both, _ = tokens.fused(**PLAIN, delta=4.0, dual_clip=2.0, kl=None, beta=0.0)
    one, _ = tokens.fused(**PLAIN, dual_clip=2.0, kl=None, beta=0.0)
    assert ClipOptions(0.2, 0.2, 4.0, 2.0).bound == 2.0 and ClipOptions(0.2, 0.2).bound == math.inf
    assert torch.stack(both).equal(torch.stack(one)) and float(one.bound_sum) > 0


# --- from logits -----------------------------------------------------------------------------------------------------


def logits_case(
    rows: int, vocabulary: int, dtype: torch.dtype, *, kept: float = 0.8, extreme: bool = False, **scores: float
) -> tuple[Tensor, Tensor, Tensor, Tokens]:
    """Logits, ids, temperatures (0.05 to 20 where ``extreme``) and per-token numbers ``[N]`` (whose log-probs are not
    used).
    """
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    drawn_temperature = torch.rand(rows, generator=generator)
    temperature = 0.05 * 400**drawn_temperature if extreme else 0.5 + drawn_temperature
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logprobs = selective_log_softmax(logits.to(dtype), ids, temperature, **scores).logprobs.double()
    tokens = drawn(1, rows, kept=kept)
    moved = dataclasses.replace(
        tokens, logprobs=logprobs, old=(logprobs + tokens.old - tokens.logprobs), ref=logprobs + tokens.ref / 10
    )
    return logits.to(dtype), ids, temperature, Tokens(*(one.reshape(-1) for one in dataclasses.astuple(moved.to(wide))))


def run_fused(case: tuple[Tensor, Tensor, Tensor, Tokens], **options: Any) -> tuple[GrpoLoss, Any, Tensor]:
    logits, ids, temperature, tokens = case
    leaf = logits.detach().requires_grad_()
    result, stats = grpo_loss_from_logits(
        leaf.view_as(leaf), ids, temperature, tokens.old, tokens.ref, tokens.advantages, tokens.weights,
        mask=tokens.mask, **options,
    )  # fmt: skip
    return detached(result), stats, torch.autograd.grad(2 * result.loss, leaf)[0]


def run_apart(case: tuple[Tensor, Tensor, Tensor, Tokens], **options: Any) -> tuple[GrpoLoss, Any, Tensor]:
    logits, ids, temperature, tokens = case
    shape = {name: options.pop(name) for name in ("softcap", "scale") if name in options}
    leaf = logits.detach().requires_grad_()
    stats = selective_log_softmax(leaf, ids, temperature, mask=tokens.mask, **shape)
    tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
    result = grpo_loss(stats.logprobs[None], *(one[None] for one in tensors), **options)
    return detached(result), stats, torch.autograd.grad(2 * result.loss, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 1500])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 0.7}], ids=str)
def test_from_logits_is_the_two_operations(dtype: torch.dtype, vocabulary: int, options: dict[str, float]) -> None:
    case = logits_case(40, vocabulary, dtype)
    every = {**PLAIN, "delta": 1.5, "kl": "k3", "beta": 0.1}
    result, stats, gradient = run_fused(case, **every, **options)
    right, right_stats, right_gradient = run_apart(case, **every, **options)
    assert torch.stack(result).equal(torch.stack(right))
    for value, wanted in zip(stats, right_stats, strict=True):
        assert value.equal(wanted) and not value.requires_grad
    # Half precision: twice the rounded gradient is the rounded twice the gradient, but for subnormal numbers.
    coarse = 2**-23 if dtype == torch.float16 else 1e-30
    torch.testing.assert_close(gradient, right_gradient, rtol=3e-7 if dtype.itemsize > 2 else 0.01, atol=coarse)
    assert not gradient[~case[3].mask].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda logits: logits,
    "gaps between rows": lambda logits: torch.cat([logits, logits], dim=1)[:, : logits.shape[1]],
    "transposed": lambda logits: logits.t().contiguous().t(),
    "every other": lambda logits: logits.repeat_interleave(2, dim=1)[:, ::2],
}


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 12),
    vocabulary=st.sampled_from([1, 2, 17, 300, 2049]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    kept=st.sampled_from([0.0, 0.7, 1.0]),
    layout=st.sampled_from(list(LAYOUTS)),
    scores=st.sampled_from([{}, {"softcap": 5.0}, {"scale": 0.3}, {"softcap": 20.0, "scale": 2.0}]),
    clip=st.sampled_from(CLIPS),
    kl=st.sampled_from([None, "k1", "k2", "k3"]),
)
def test_from_logits_of_any_shape_dtype_temperature_layout_and_scores(
    rows: int, vocabulary: int, dtype: torch.dtype, kept: float, layout: str, scores: dict[str, float],
    clip: dict[str, float], kl: str | None,
) -> None:  # fmt: skip
    logits, *others = logits_case(rows, vocabulary, dtype, kept=kept, extreme=True, **scores)
    case = (LAYOUTS[layout](logits), *others)
    options = {**clip, "kl": kl, "beta": 0.1}
    result, stats, gradient = run_fused(case, **options, **scores)
    right, right_stats, right_gradient = run_apart(case, **options, **scores)
    for found, wanted in zip((torch.stack(result), *stats), (torch.stack(right), *right_stats), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    largest = float(right_gradient.abs().max()) if right_gradient.numel() else 0.0
    rounding = ROUNDING[dtype] * largest + bounds.SMALLEST[dtype]
    torch.testing.assert_close(gradient, right_gradient, rtol=0, atol=rounding)
    assert gradient.shape == logits.shape and not gradient[~case[3].mask].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_forward_overwrites_the_logits_when_allowed(dtype: torch.dtype) -> None:
    case = logits_case(30, 600, dtype)
    logits, ids, temperature, tokens = case
    _, _, right = run_fused(case, **PLAIN, kl="k2", beta=0.1)
    leaf = logits.clone().requires_grad_()
    work = leaf.clone()
    kept = work * work
    result, _ = grpo_loss_from_logits(
        work, ids, temperature, tokens.old, tokens.ref, tokens.advantages, tokens.weights,
        mask=tokens.mask, **PLAIN, kl="k2", beta=0.1, overwrite_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(work.detach() * 2, right, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(2 * result.loss, leaf, retain_graph=True)
    assert gradient.equal(right) and gradient.data_ptr() == work.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
    with pytest.raises(KernelError, match="a second backward pass reached a fused loss"):
        result.loss.backward()


def test_leaves_are_never_overwritten() -> None:
    logits, ids, temperature, tokens = logits_case(5, 20, torch.float32)
    leaf = logits.clone().requires_grad_()
    options = {"mask": tokens.mask, **PLAIN, "kl": None, "beta": 0.0, "overwrite_logits": True}
    tensors = (tokens.old, None, tokens.advantages, tokens.weights)
    grpo_loss_from_logits(leaf, ids, temperature, *tensors, **options)
    with torch.no_grad():
        grpo_loss_from_logits(leaf * 1, ids, temperature, *tensors, **options)
    assert leaf.equal(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_rows_of_logits_are_not_read(dtype: torch.dtype) -> None:
    logits, ids, temperature, tokens = logits_case(20, 70, dtype, kept=0.5)
    right, _, right_gradient = run_fused((logits, ids, temperature, tokens), **PLAIN, kl="k3", beta=0.1)
    junk = logits.masked_fill(~tokens.mask[:, None], math.nan)
    wild = ids.masked_fill(~tokens.mask, 10**6)
    result, stats, gradient = run_fused((junk, wild, temperature, tokens), **PLAIN, kl="k3", beta=0.1)
    assert torch.stack(result).equal(torch.stack(right)) and gradient.equal(right_gradient)
    assert not any(values[~tokens.mask].any() for values in stats)


@pytest.mark.needs_compiler
def test_from_logits_is_the_same_on_two_threads() -> None:
    case = logits_case(70, 1500, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            result, stats, gradient = run_fused(case, **PLAIN, kl="k3", beta=0.1)
            results.append((torch.stack(result), gradient, torch.stack(tuple(stats))))
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_no_logits(dtype: torch.dtype) -> None:
    case = logits_case(0, 11, dtype)
    result, stats, gradient = run_fused(case, **PLAIN, kl="k3", beta=0.1)
    assert [float(value) for value in result] == [0.0] * 7
    assert gradient.shape == (0, 11) and stats.entropy.shape == (0,)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    logits, ids, temperature, tokens = logits_case(4, 9, torch.float32, kept=1.0)
    ids[2] = 9
    with pytest.raises(KernelError, match="token id 9 is outside the vocabulary of 9 tokens"):
        run_fused((logits, ids, temperature, tokens), **PLAIN, kl="k1", beta=0.1)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
def test_gradcheck_from_logits(kl: str | None, options: dict[str, float]) -> None:
    logits, ids, temperature, tokens = logits_case(5, 12, torch.float64)

    def run(logits: Tensor) -> Tensor:
        return grpo_loss_from_logits(
            logits, ids, temperature, tokens.old, tokens.ref, tokens.advantages, tokens.weights,
            mask=tokens.mask, **CLIPS[3], **options, kl=kl, beta=0.3,
        )[0].loss  # fmt: skip

    assert torch.autograd.gradcheck(lambda logits: Again.apply(run, logits), logits.requires_grad_())


class Again(torch.autograd.Function):
    """A function whose gradient can be asked for often, as gradcheck does: each time it is run anew."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(logits)
        return run(logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return None, torch.autograd.grad(ctx.run(leaf), leaf, upstream)[0]


@pytest.fixture(params=[pytest.param("cpp", marks=pytest.mark.needs_compiler), "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv(dispatch.VARIABLE, "reference")
    else:
        # Not forced: what is float64 is the reference's.
        monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    return str(request.param)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(backend: str, wrong: float) -> None:
    logits, ids, temperature, tokens = logits_case(9, 700, torch.float32, kept=1.0)
    options = {**PLAIN, "kl": "k3", "beta": 0.1}
    _, right, right_gradient = run_fused((logits, ids, temperature, tokens), **options)
    logits[4, 650] = wrong
    result, stats, gradient = run_fused((logits, ids, temperature, tokens), **options)
    others = torch.arange(9) != 4
    for values, wanted in zip((*stats, gradient), (*right, right_gradient), strict=True):
        assert values[others].equal(wanted[others])
    assert stats.logprobs[4].isnan() and gradient[4].isnan().any() and result.loss.isnan()


def extreme_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tokens]:
    """Rows of extreme logits; the old and reference log-probs are moderately away from the exact ones."""
    logits, ids, _, tokens = logits_case(8, 3000, dtype, kept=1.0)
    logits[0, ::2], ids[0] = -math.inf, 1
    logits[1], logits[1, 77], ids[1] = -math.inf, 4.0, 77
    logits[2] = 5.0
    logits[3], logits[3, 100], ids[3] = 0.0, 1e4, 100
    logits[4] += 1e4
    logits[5] -= 1e4
    logits[6], logits[6, 9], ids[6] = 0.0, 60.0, 9
    temperature = torch.tensor([0.7, 1.3] * 4)
    exact = selective_log_softmax(logits.double(), ids, temperature).logprobs
    steps = torch.tensor([0.05, 0.5, -0.7, 0.1, -0.05, 0.02, -0.1, 0.06])
    advantages = torch.tensor([1.0, -1.0, -0.5, 0.8, -1.2, 0.3, -2.0, 1.5])
    # Float32 in every case, so that all formats and the oracle see the same numbers.
    old, ref = ((exact - far).float() for far in (steps, torch.linspace(-0.4, 0.4, 8)))
    return logits, ids, temperature, dataclasses.replace(tokens, old=old, ref=ref, advantages=advantages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adversarial_rows_from_logits(backend: str, dtype: torch.dtype) -> None:
    logits, ids, temperature, tokens = case = extreme_case(dtype)
    wide = {name: getattr(tokens, name).double() for name in ("logprobs", "old", "ref", "advantages")}
    options = {**PLAIN, "kl": "k3", "beta": 0.1}
    result, stats, gradient = run_fused(case, **options)
    exact_tokens = dataclasses.replace(tokens, **wide)
    exact, exact_stats, exact_gradient = run_apart((logits.double(), ids, temperature, exact_tokens), **options)
    bounds.assert_stats(tuple(stats), tuple(one.detach() for one in exact_stats))
    assert float(result.low_sum) == float(exact.low_sum) and float(result.high_sum) == float(exact.high_sum)
    size = 1 + float(exact_stats.logprobs.detach().abs().max())
    assert float(result.loss) == pytest.approx(float(exact.loss), rel=bounds.LOGPROB * size, abs=bounds.LOGPROB * size)
    # A log-prob that is off by its bound moves the ratio, and with it the whole row, by as much.
    driven = 2 * tokens.weights * (tokens.advantages.double().abs() * 2 + 0.1) / temperature.double()
    bounds.assert_gradient(gradient, exact_gradient, driven, slack=size)
    assert not gradient[logits == -math.inf].any()


def test_offsets_of_logits_beyond_two_to_the_31(backend: str) -> None:
    # 4.3 GB of addresses of which three rows are ever touched.
    room = torch.empty(2**31 + 5000, dtype=torch.bfloat16)
    logits = room.as_strided((3, 5000), (2**30, 1))
    values, ids, temperature, tokens = logits_case(3, 5000, torch.bfloat16, kept=1.0)
    logits.copy_(values)
    module = dispatch.backend("grpo_loss", logits.device, logits.dtype)
    tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
    options = {"clip": ClipOptions(0.2, 0.28), "kl": "k3", "beta": 0.1, "softcap": None, "scale": 1.0}
    found = []
    for one, out in ((values, None), (logits, None), (logits, logits)):
        sums, stats, gradient = module.from_logits(
            one, ids, temperature.reciprocal(), *tensors, **options, gradient=True, out=out
        )
        found.append((sums, torch.stack(tuple(stats)), gradient))
    assert found[2][2].data_ptr() == logits.data_ptr()
    for other in found[1:]:
        assert all(one.equal(two) for one, two in zip(found[0], other, strict=True))


def test_checkpointing_gives_the_same_gradient() -> None:
    tokens = drawn(3, 50).to(torch.float32)
    options = {**PLAIN, "kl": "k3", "beta": 0.1}

    def loss(logprobs: Tensor) -> Tensor:
        tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
        return grpo_loss(logprobs.exp().log(), *tensors, **options).loss

    leaf = tokens.logprobs.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (gradient,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert expected.any() and gradient.equal(expected)


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpointing_from_logits_gives_the_same_gradient(overwrite: bool) -> None:
    logits, ids, temperature, tokens = logits_case(12, 40, torch.float32)
    options = {"mask": tokens.mask, **PLAIN, "kl": "k3", "beta": 0.1, "overwrite_logits": overwrite}

    def loss(logits: Tensor) -> Tensor:
        tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.weights)
        return grpo_loss_from_logits(logits * 1, ids, temperature, *tensors, **options)[0].loss

    leaf = logits.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (gradient,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert expected.any() and gradient.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_rows_of_logits_masked(dtype: torch.dtype) -> None:
    logits, ids, temperature, tokens = logits_case(7, 40, dtype, kept=0.0)
    junk = torch.full_like(logits, math.nan)
    result, stats, gradient = run_fused((junk, ids - 100, temperature, tokens), **PLAIN, kl="k3", beta=0.1)
    assert [float(value) for value in result] == [0.0] * 7
    assert not any(values.any() for values in (*stats, gradient))


# --- torch's own tools -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    tokens = drawn(3, 11).to(dtype)
    tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
    operator = torch.ops.grpoforge.grpo_loss.default
    for options in ((0.2, 0.28, None, None, "k3", 0.1), (0.2, 0.2, 1.5, 3.0, None, 0.0)):
        torch.library.opcheck(operator, (tokens.logprobs.clone().requires_grad_(), *tensors, *options))


def test_opcheck_from_logits() -> None:
    logits, ids, temperature, tokens = logits_case(6, 13, torch.float32)
    tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)
    options = (0.2, 0.28, None, None, "k3", 0.1, None, 1.0)
    operator = torch.ops.grpoforge.grpo_loss_from_logits.default
    torch.library.opcheck(operator, (logits.requires_grad_(), ids, temperature, *tensors, *options))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole(compiler: str) -> None:
    tokens = drawn(3, 50).to(torch.float32)
    options = {**PLAIN, "kl": "k3", "beta": 0.1}
    tensors = (tokens.old, tokens.ref, tokens.advantages, tokens.mask, tokens.weights)

    def step(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        result = grpo_loss(logprobs * 1, *tensors, **options)
        return 3 * result.loss, result.region_sum

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    for run in (step, compiled):
        leaf = tokens.logprobs.clone().requires_grad_()
        loss, region = run(leaf)
        result, gradient = tokens.fused(**options)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], 3 * gradient)
        assert float(loss.detach()) == pytest.approx(3 * float(result.loss)) and float(region) == float(
            result.region_sum
        )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_from_logits(compiler: str) -> None:
    logits, ids, temperature, tokens = logits_case(12, 40, torch.float32)
    options = {**PLAIN, "kl": "k3", "beta": 0.1, "softcap": 9.0, "scale": 0.7}

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        result, stats = grpo_loss_from_logits(
            logits * 1, ids, temperature, tokens.old, tokens.ref, tokens.advantages, tokens.weights,
            mask=tokens.mask, **options, overwrite_logits=True,
        )  # fmt: skip
        return 2 * result.loss, stats.entropy

    leaf = logits.clone().requires_grad_()
    loss, entropy = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)(leaf)
    result, stats, gradient = run_fused((logits, ids, temperature, tokens), **options)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], gradient)
    assert float(loss.detach()) == pytest.approx(2 * float(result.loss)) and entropy.equal(stats.entropy)
