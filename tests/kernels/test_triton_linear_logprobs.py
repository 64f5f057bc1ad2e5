"""The Triton kernel of the fused head in the interpreter, against materialized logits in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
"""Of values: operands are exact and sums float32 in every format."""


def draw(rows: int = 5, vocab_size: int = 300, hidden_size: int = 40, dtype: torch.dtype = torch.float32):
    """Hidden states, head, ids and inverse temperatures."""
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (0.4 * torch.randn(vocab_size, hidden_size)).to(dtype)
    return hidden, weight, torch.randint(0, vocab_size, (rows,)), 1 / torch.linspace(0.5, 2.0, rows)


def compare(hidden: Tensor, weight: Tensor, ids: Tensor, inv_temperature: Tensor, **options) -> None:
    from grpoforge_kernels.reference import selective_log_softmax as reference
    from grpoforge_kernels.triton import linear_logprobs as kernels

    stats = kernels.linear_stats(hidden, weight, ids, inv_temperature, **options)
    bias = options.pop("bias", None)
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    options = {"mask": None, "softcap": None, "scale": 1.0} | options
    exact = reference.row_stats(logits, ids, inv_temperature.double(), **options)
    results = kernels.finish(stats, inv_temperature)
    for one, true in zip(results, reference.finish(exact, inv_temperature.double())):
        assert one.dtype == torch.float32
        assert ((one - true).abs() <= BOUND[hidden.dtype] * (1 + true.abs())).all(), (one, true)


def check_formats():
    for dtype in BOUND:
        compare(*draw(dtype=dtype))


def check_sizes():
    for rows, vocab_size, hidden_size in ((1, 1, 1), (1, 64, 16), (70, 65, 17), (3, 500, 64)):
        compare(*draw(rows, vocab_size, hidden_size))


def check_bias_softcap_and_scale():
    compare(*draw(), bias=torch.randn(300), softcap=4.0, scale=0.6)
    compare(*draw(dtype=torch.bfloat16), bias=torch.randn(300).bfloat16())


def check_masked_rows():
    hidden, weight, ids, inv_temperature = draw(70)
    mask = torch.arange(70) < 3
    hidden[~mask], ids[5] = math.nan, 10**12
    hidden_clean = hidden.nan_to_num(0)
    from grpoforge_kernels.triton import linear_logprobs as kernels

    stats = kernels.linear_stats(hidden, weight, ids, inv_temperature, mask=mask)
    clean = kernels.linear_stats(hidden_clean, weight, ids.clamp(max=299), inv_temperature, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(stats, clean))
    assert not any(values[~mask].any() for values in kernels.finish(stats, inv_temperature))
    compare(hidden_clean[:3], weight, ids[:3], inv_temperature[:3])

    import interpreter

    with interpreter.traffic() as moved:
        kernels.linear_stats(hidden[3:], weight, ids[3:], inv_temperature[3:], mask=mask[3:])
    assert moved.loaded(weight) == moved.loaded(hidden) == 0, "a block of masked rows costs nothing"


def check_a_slice_of_the_vocabulary():
    from grpoforge_kernels import rows
    from grpoforge_kernels.triton import linear_logprobs as kernels

    hidden, weight, ids, inv_temperature = draw()
    whole = kernels.linear_stats(hidden, weight, ids, inv_temperature)
    parts = [
        kernels.linear_stats(hidden, weight[a:b], ids, inv_temperature, first_id=a) for a, b in ((0, 90), (90, 300))
    ]
    merged = rows.merge(*parts, inv_temperature)
    for one, other in zip(rows.finish(merged, inv_temperature), rows.finish(whole, inv_temperature)):
        assert (one - other).abs().max() <= 4e-6


def check_split_over_programs():
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton import linear_logprobs as kernels

    problem = draw(vocab_size=500)
    alone = kernels.linear_stats(*problem)
    real, configs.multiprocessors = configs.multiprocessors, lambda device: 2
    split = kernels.linear_stats(*problem)
    assert not torch.equal(split.total, alone.total), "it was split"
    compare(*problem)
    os.environ["GRPOFORGE_DETERMINISTIC"] = "1"
    fixed = kernels.linear_stats(*problem)
    first = kernels.linear_stats(problem[0][:1], problem[1], problem[2][:1], problem[3][:1])
    assert all(torch.equal(a[:1], b) for a, b in zip(fixed, first)), "a row gives the same bits in any batch"
    del os.environ["GRPOFORGE_DETERMINISTIC"]
    configs.multiprocessors = real


def check_nothing_but_statistics_is_stored():
    import interpreter

    from grpoforge_kernels.triton import linear_logprobs as kernels

    problem = draw()
    with interpreter.traffic() as moved:
        kernels.linear_stats(*problem)
    assert moved.stored() == 5 * 16
    hidden, weight, *_ = problem
    assert moved.loaded(hidden) == hidden.numel() * 4 * -(-300 // 64), "once for each tile of columns"
    assert moved.loaded(weight) == weight.numel() * 4, "once for the only block of rows"
    assert kernels.linear_stats(hidden[:0], *problem[1:2], *(one[:0] for one in problem[2:])).total.shape == (0,)


def check_unaligned_and_transposed_operands():
    hidden, weight, ids, inv_temperature = draw()
    compare(torch.randn(5, 47)[:, 3:43].copy_(hidden), torch.randn(40, 300).copy_(weight.T).T, ids, inv_temperature)


def check_the_contender_of_the_benchmark():
    from grpoforge_kernels.bench import accuracy, ours, problems
    from grpoforge_kernels.bench.plan import Case

    problem = problems.build(Case("linear_logprobs", "fp32", (40, 300, 48)))
    found = accuracy.errors(ours.one_kernel_step(problem)(), problems.exact(problem))
    assert found.within(accuracy.BOUNDS["linear_logprobs", "fp32"]), found


def check_the_tile_is_that_of_the_form():
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton import linear_logprobs as kernels

    hidden, weight, ids, inv_temperature = draw(5, 300, 64, torch.bfloat16)
    real, configs.architecture = configs.architecture, lambda device: "sm_90"
    product, sparing = configs.Linear(128, 256, 64, 8, 3), configs.Linear(128, 128, 32, 8, 3)

    def tile(hidden=hidden, weight=weight, bias=None, mask=None, softcap=None, scale=1.0):
        operands = (hidden, weight, bias, ids, inv_temperature, mask)
        return kernels._config(torch.bfloat16, operands, softcap, scale)

    assert tile() == product
    assert tile(bias=torch.zeros(300)) == tile(mask=ids > 0) == tile(softcap=30.0) == tile(scale=0.5) == sparing
    assert tile(hidden=hidden[:, :48], weight=weight[:, :48]) == sparing, "48 units are no multiple of 64"
    assert tile(weight=torch.zeros(300, 65)[:, :64]) == sparing, "rows that are not aligned"
    configs.architecture = real


@pytest.mark.parametrize("name", [name for name in list(globals()) if name.startswith("check_")])
def test_in_the_interpreter(name: str, interpreted: Callable[[str], dict[str, str]]) -> None:
    failure = interpreted(__file__)[name]
    assert not failure, failure


if __name__ == "__main__":
    import interpreter

    interpreter.main(dict(globals()))
