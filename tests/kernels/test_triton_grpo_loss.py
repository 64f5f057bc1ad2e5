"""The Triton loss kernel in the interpreter, against the plain equations in float64."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import pytest
import torch

VALUE = 1e-6
GRADIENT = 2e-6


def draw(b: int = 5, t: int = 130):
    """Log-probs and what belongs to them; masked positions hold NaN, advantages are expanded."""
    logprobs = -4 * torch.rand(b, t)
    old, ref = logprobs + 0.3 * torch.randn(b, t), logprobs + 0.3 * torch.randn(b, t)
    mask = torch.rand(b, t) > 0.3
    weights = torch.rand(b, t, dtype=torch.float64)
    weights[0] = 0
    for values in (logprobs, old, ref):
        values[~mask] = math.nan
    return logprobs, old, ref, torch.randn(b, 1).expand(b, t), mask, weights


def compare(tokens, **options) -> None:
    from grpoforge_kernels.reference import grpo_loss as reference
    from grpoforge_kernels.triton import grpo_loss as kernels

    wide = [one.double() if one is not None and one.dtype == torch.float32 else one for one in tokens]
    sums, gradient = kernels.forward_backward(*tokens, **options)
    exact, exact_gradient = reference.forward_backward(*wide, **options)
    assert sums.dtype == torch.float64 and gradient.dtype == torch.float32 and gradient.is_contiguous()
    assert ((sums - exact).abs() <= VALUE * (1 + exact.abs())).all(), (sums, exact)
    assert (gradient - exact_gradient).abs().max() <= GRADIENT * exact_gradient.abs().max()
    assert not gradient[~tokens[4]].any() and not gradient[0].any()


def clips():
    from grpoforge_kernels.grpo_loss import ClipOptions

    for delta, dual_clip in itertools.product((None, 1.5), (None, 3.0)):
        yield ClipOptions(0.2, 0.28, delta, dual_clip)


def check_every_option():
    for clip, kl in itertools.product(clips(), (None, "k1", "k2", "k3")):
        compare(draw(), clip=clip, kl=kl, beta=0.04)


def check_small_differences_have_an_exact_k3():
    logprobs, old, _, advantages, mask, weights = draw()
    tokens = (logprobs, old, logprobs + 1e-3 * torch.randn(5, 130), advantages, mask, weights)
    from grpoforge_kernels.triton import grpo_loss as kernels

    sums, _ = kernels.forward_backward(*tokens, clip=next(clips()), kl="k3", beta=1.0)
    x = torch.where(mask, logprobs - tokens[2], 0.0).double()
    exact = (torch.expm1(-x) + x).sum()
    assert abs(sums[1] - exact) <= 1e-6 * exact, "relative to a sum of 1e-4, not to 1"


def check_ties_are_split_as_torch_splits_them():
    tokens = (torch.zeros(2, 40), torch.zeros(2, 40), torch.zeros(2, 40), torch.randn(2, 1).expand(2, 40))
    weights = torch.ones(2, 40, dtype=torch.float64)
    weights[0] = 0
    for clip in clips():
        compare((*tokens, torch.ones(2, 40, dtype=torch.bool), weights), clip=clip, kl="k3", beta=0.04)


def check_extreme_ratios():
    from grpoforge_kernels.grpo_loss import ClipOptions
    from grpoforge_kernels.triton import grpo_loss as kernels

    logprobs, old, ref, _, mask, weights = draw(2, 40)
    old = old - 200
    bound = kernels.forward_backward(
        logprobs, old, ref, torch.ones(2, 40), mask, weights, clip=ClipOptions(0.2, 0.2), kl=None, beta=0.0
    )
    assert bound[0][0].isfinite() and not bound[1].any(), "the clip binds: no gradient, not 0 * inf"
    logprobs[1, mask[1].nonzero()[0]] = math.nan
    sums, _ = kernels.forward_backward(
        logprobs, old, ref, torch.ones(2, 40), mask, weights, clip=ClipOptions(0.2, 0.2), kl=None, beta=0.0
    )
    assert sums[0].isnan() and sums[5].isnan(), "a NaN is seen in the loss and in the largest deviation"


def check_nothing_to_do():
    from grpoforge_kernels.triton import grpo_loss as kernels

    options = {"clip": next(clips()), "kl": "k3", "beta": 0.04}
    empty = [one[:, :0] for one in draw()]
    sums, gradient = kernels.forward_backward(*empty, **options)
    assert not sums.any() and gradient.shape == (5, 0)
    logprobs, old, ref, advantages, mask, weights = draw()
    sums, gradient = kernels.forward_backward(
        logprobs, old, ref, advantages, torch.zeros_like(mask), weights, **options
    )
    assert not sums.any() and not gradient.any()
    assert kernels.forward_backward(*draw(), **options, gradient=False)[1] is None


def check_minimal_bytes():
    import interpreter

    from grpoforge_kernels.triton import grpo_loss as kernels

    *tokens, _, weights = draw(4, 128)
    everything = torch.ones(4, 128, dtype=torch.bool)
    with interpreter.traffic() as moved:
        kernels.forward_backward(*tokens, everything, weights, clip=next(clips()), kl="k3", beta=0.04)
    assert moved.loaded() == 4 * 128 * 25 and moved.stored() == 4 * 128 * 4 + 7 * 8


def check_bytes_by_what_is_asked():
    import interpreter

    from grpoforge_kernels.triton import grpo_loss as kernels

    logprobs, old, ref, advantages, _, weights = draw(4, 128)
    everything = torch.ones(4, 128, dtype=torch.bool)
    for kl, gradient, loaded, stored in (("k3", True, 25, 4), ("k1", False, 25, 0), (None, True, 21, 4)):
        with interpreter.traffic() as moved:
            kernels.forward_backward(
                *(logprobs, old, ref, advantages, everything, weights),
                clip=next(clips()), kl=kl, beta=0.04, gradient=gradient,
            )  # fmt: skip
        assert moved.loaded() == 4 * 128 * loaded and moved.stored() == 4 * 128 * stored + 7 * 8
    half = torch.arange(4 * 128).view(4, 128) % 2 == 0
    with interpreter.traffic() as moved:
        kernels.forward_backward(logprobs, old, ref, advantages, half, weights, clip=next(clips()), kl="k3", beta=0.04)
    assert moved.loaded() == 4 * 128 * 1 + 4 * 64 * 24, "of a masked token its mask alone is read"


def check_bytes_from_statistics():
    import interpreter

    from grpoforge_kernels.triton import grpo_loss as kernels

    tokens, size = 512, 96
    logits, ids, inv_temperature = torch.randn(tokens, size), torch.randint(0, size, (tokens,)), torch.ones(tokens)
    old, ref, advantages = torch.randn(3, tokens)
    mask, weights = torch.ones(tokens, dtype=torch.bool), torch.rand(tokens, dtype=torch.float64)
    arguments = (logits, ids, inv_temperature, old, ref, advantages, mask, weights)
    with interpreter.traffic() as alone:
        stats = kernels.row_stats(logits, ids, inv_temperature, mask=mask, softcap=None, scale=1.0)
    assert len(stats.total) == tokens
    with interpreter.traffic() as moved:
        kernels.from_logits(*arguments, clip=next(clips()), kl="k3", beta=0.04, gradient=False)
    by_token = moved.loaded() + moved.stored() - alone.loaded() - alone.stored()
    assert by_token == tokens * 37 + 7 * 8, "12 of statistics, 4 of temperature, 21 of what else belongs to a token"
    with interpreter.traffic() as moved:
        _, _, gradient = kernels.from_logits(*arguments, clip=next(clips()), kl="k3", beta=0.04)
    read = moved.loaded(logits) - alone.loaded(logits)
    assert read == tokens * size * 4, "each logit once more"
    assert moved.stored(gradient) == tokens * size * 4


def check_bytes_of_scaling():
    import interpreter

    from grpoforge_kernels.triton import grpo_loss as kernels

    for dtype, shape in ((torch.float32, (64, 80)), (torch.bfloat16, (50, 77))):
        values, factor = torch.randn(shape).to(dtype), torch.tensor(2.0, dtype=torch.float64)
        with interpreter.traffic() as moved:
            kernels.scale_(values, factor)
        programs = -(-values.numel() // kernels.SCALE_BLOCK)
        assert moved.loaded(values) == moved.stored() == values.numel() * dtype.itemsize, "read once, written once"
        assert moved.loaded() - moved.loaded(values) == 8 * programs


def check_from_logits():
    from grpoforge_kernels.reference import grpo_loss as reference
    from grpoforge_kernels.triton import grpo_loss as kernels
    from grpoforge_kernels.triton import selective_log_softmax as rows

    logits, ids, inv_temperature = 3 * torch.randn(6, 1000), torch.randint(0, 1000, (6,)), torch.rand(6) + 0.5
    mask = torch.tensor([True, True, False, True, True, True])
    logits[2] = math.nan
    stats = rows.row_stats(logits, ids, inv_temperature, mask=mask, softcap=None, scale=1.0)
    logprobs = rows.finish(stats, inv_temperature).logprobs
    old, ref = logprobs + 0.3 * torch.randn(6), logprobs + 0.3 * torch.randn(6)
    tokens = (old, ref, torch.randn(6), mask, torch.rand(6, dtype=torch.float64))
    for clip, kl in itertools.product(clips(), ("k1", "k3")):
        options = {"clip": clip, "kl": kl, "beta": 0.04}
        sums, _, gradient = kernels.from_logits(logits, ids, inv_temperature, *tokens, **options)
        composed, g = kernels.forward_backward(logprobs, *tokens, **options)
        assert ((sums - composed).abs() <= VALUE * (1 + composed.abs())).all()
        zero = torch.zeros(6)
        same = rows.row_gradient(logits, ids, inv_temperature, stats, g, zero, zero, mask=mask, softcap=None, scale=1.0)
        assert (gradient - same).abs().max() <= 1e-6 * same.abs().max() and not gradient[2].any()
        wide = [one.double() if one.dtype == torch.float32 else one for one in tokens]
        exact, _, exact_gradient = reference.from_logits(
            logits.double().nan_to_num(0), ids, inv_temperature.double(), *wide, **options
        )
        assert ((sums - exact).abs() <= 2e-6 * (1 + exact.abs())).all()
        assert (gradient - exact_gradient).abs().max() <= 4e-6 * exact_gradient.abs().max()
    over = logits.clone()
    sums, _, result = kernels.from_logits(over, ids, inv_temperature, *tokens, **options, out=over)
    assert result is over and torch.equal(over, gradient)


def check_scaling():
    import interpreter

    from grpoforge_kernels.triton import grpo_loss as kernels

    for shape in ((50, 77), (64, 80)):
        values = torch.randn(shape)
        assert torch.equal(kernels.scale_(values.clone(), torch.tensor(2.0)), values * 2)
        assert torch.equal(kernels.scale_(values.clone(), torch.tensor(0.25, dtype=torch.float64)), values * 0.25)
        once = values.clone()
        with interpreter.traffic() as moved:
            kernels.scale_(once, torch.tensor(1.0))
        assert torch.equal(once, values) and moved.loaded(once) == moved.stored() == 0, "a factor of 1 moves nothing"
    wide = torch.ones(4, 10)
    kernels.scale_(wide[:, :5], torch.tensor(3.0))
    assert wide.tolist() == [[3.0] * 5 + [1.0] * 5] * 4
    assert kernels.scale_(torch.zeros(0, 5), torch.tensor(3.0)).shape == (0, 5)


def check_the_operation_runs_on_these_kernels():
    os.environ["GRPOFORGE_KERNELS"] = "triton"
    from grpoforge_kernels import dispatch, ops

    logprobs, old, ref, advantages, mask, weights = draw()
    logprobs, old, ref = (one.nan_to_num(0) for one in (logprobs, old, ref))
    options = {"epsilon_low": 0.2, "epsilon_high": 0.28, "kl": "k3", "beta": 0.04}
    results = []
    for name in ("triton", "reference"):
        os.environ["GRPOFORGE_KERNELS"] = name
        leaf = logprobs.clone().requires_grad_()
        loss = ops.grpo_loss(leaf, old, ref, advantages, mask, weights, **options)
        (3 * loss.loss).backward()
        assert dispatch.backend_name("grpo_loss", leaf.device, leaf.dtype) == name
        results.append((torch.stack(loss).detach(), leaf.grad))
    (sums, gradient), (exact, exact_gradient) = results
    assert ((sums - exact).abs() <= VALUE * (1 + exact.abs())).all()
    assert (gradient - exact_gradient).abs().max() <= GRADIENT * exact_gradient.abs().max()


@pytest.mark.parametrize("name", [name for name in list(globals()) if name.startswith("check_")])
def test_in_the_interpreter(name: str, interpreted: Callable[[str], dict[str, str]]) -> None:
    failure = interpreted(__file__)[name]
    assert not failure, failure


if __name__ == "__main__":
    import interpreter

    interpreter.main(dict(globals()))
