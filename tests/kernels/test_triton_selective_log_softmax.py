"""The Triton row kernels in the interpreter, against the plain definition in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, spread: float = 3.0):
    """Logits, ids and an inverse temperature for each row."""
    logits = (spread * torch.randn(rows, vocab_size)).to(dtype)
    return logits, torch.randint(0, vocab_size, (rows,)), 1 / torch.linspace(0.5, 2.0, rows)


def compare(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    entropies: tuple[bool, ...] = (True, False),
) -> Tensor:
    """Statistics within bounds, then gradients with and without an entropy term; the last gradient is returned."""
    import bounds

    from grpoforge_kernels.reference import selective_log_softmax as reference
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    # The interpreter cuts what hardware rounds.
    bounds.ROUNDING[torch.bfloat16] = 2.0**-7
    options = {"mask": mask, "softcap": softcap, "scale": scale}
    stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    exact = reference.row_stats(logits.double(), ids, inv_temperature.double(), **options)
    assert all(values.dtype == torch.float32 for values in stats)
    bounds.assert_stats(kernels.finish(stats, inv_temperature), reference.finish(exact, inv_temperature.double()))
    for with_entropy in entropies:
        g, h, l = torch.randn(3, len(ids))  # noqa: E741
        h = h if with_entropy else torch.zeros_like(h)
        given = kernels.row_gradient(logits, ids, inv_temperature, stats, g, h, l, **options)
        true = reference.row_gradient(
            logits.double(), ids, inv_temperature.double(), exact, g.double(), h.double(), l.double(), **options
        )
        assert given.dtype == logits.dtype
        bounds.assert_gradient(given, true, (g.abs() + h.abs() + l.abs()) * inv_temperature * scale)
    return given


def check_float32():
    for vocab_size in (1, 2, 7, 1023, 1024, 1025, 5003):
        compare(*draw(3, vocab_size))


def check_bfloat16():
    for vocab_size in (1, 7, 1024, 5003):
        compare(*draw(3, vocab_size, torch.bfloat16))


def check_float16():
    for vocab_size in (1, 7, 1024, 5003):
        compare(*draw(3, vocab_size, torch.float16))


def check_a_vocabulary_of_151936():
    compare(*draw(1, 151_936, torch.bfloat16), entropies=(True,))


def check_an_odd_vocabulary_with_the_long_loop():
    compare(*draw(2, 20_011, torch.bfloat16), entropies=(False,))


def check_banned_tokens():
    logits, ids, inv_temperature = draw(3, 5003)
    half, first, single = logits.clone(), logits.clone(), torch.full_like(logits, -INF)
    half[:, torch.arange(5003) % 2 == 1] = -INF
    compare(half, ids // 2 * 2, inv_temperature)
    first[:, :4500] = -INF
    compare(first, 4500 + ids % 500, inv_temperature)
    single[torch.arange(3), ids] = 2.0
    gradient = compare(single, ids, inv_temperature)
    gradient[torch.arange(3), ids] = 0
    assert not gradient.any(), "banned tokens have no gradient"
    banned = compare(half, ids // 2 * 2, inv_temperature)[:, 1::2]
    assert not banned.any(), "banned tokens have no gradient"


def check_large_logits():
    logits, ids, inv_temperature = draw(3, 1500)
    compare(logits + 1e4, ids, inv_temperature)
    compare(logits - 1e4, ids, inv_temperature)
    compare(logits * 1e4, ids, inv_temperature)


def check_equal_and_sure_rows():
    logits, ids, inv_temperature = draw(3, 1500)
    compare(torch.full_like(logits, -7.25), ids, inv_temperature)
    sure = torch.zeros_like(logits)
    sure[torch.arange(3), ids] = 30.0
    compare(sure, ids, inv_temperature)


def check_temperatures():
    logits, ids, _ = draw(3, 1500)
    for temperature in (0.05, 1.0, 20.0):
        compare(logits, ids, torch.full((3,), 1 / temperature))
    # One number for all rows is a pointer that stands still.
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    options = {"mask": None, "softcap": None, "scale": 1.0}
    one = kernels.row_stats(logits, ids, torch.tensor([0.7]).expand(3), **options)
    same = kernels.row_stats(logits, ids, torch.full((3,), 0.7), **options)
    assert all(torch.equal(a, b) for a, b in zip(one, same))


def check_softcap_and_scale():
    logits, ids, inv_temperature = draw(3, 1500)
    compare(logits, ids, inv_temperature, softcap=5.0, scale=0.7)
    compare(logits * 100, ids, inv_temperature, softcap=30.0)
    compare(logits * 1e-3, ids, inv_temperature, softcap=30.0, scale=0.1)
    compare(logits, ids, inv_temperature, scale=0.0625)


def check_gradient_is_that_of_autograd():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(4, 300)
    options = {"mask": None, "softcap": 4.0, "scale": 0.5}
    g, h, l = torch.randn(3, 4)  # noqa: E741
    exact = logits.double().requires_grad_()
    z = 4.0 * torch.tanh(exact * 0.5 / 4.0) * inv_temperature.double()[:, None]
    log_p = z.log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    chosen = log_p.gather(1, ids[:, None]).squeeze(1)
    (g * chosen + h * entropy + l * z.logsumexp(dim=1)).sum().backward()
    stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    given = kernels.row_gradient(logits, ids, inv_temperature, stats, g, h, l, **options)
    assert (given.double() - exact.grad).abs().max() <= 2e-6 * exact.grad.abs().max()


def check_masked_rows_are_not_read():
    logits, ids, inv_temperature = draw(4, 1500)
    mask = torch.tensor([True, False, True, False])
    logits[1], ids[1] = math.nan, 10**12
    compare(logits[[0, 2]], ids[[0, 2]], inv_temperature[[0, 2]])

    import interpreter

    from grpoforge_kernels.triton import selective_log_softmax as kernels

    options = {"mask": mask, "softcap": None, "scale": 1.0}
    with interpreter.traffic() as moved:
        stats = kernels.row_stats(logits, ids, inv_temperature, **options)
        assert moved.loaded(logits) == 2 * 4 * (1500 + 1)
    assert not any(values[~mask].any() for values in kernels.finish(stats, inv_temperature))
    g = torch.full((4,), math.nan)
    g[mask] = 1.0
    zero = torch.zeros(4)
    with interpreter.traffic() as moved:
        gradient = kernels.row_gradient(logits, ids, inv_temperature, stats, g, zero, zero, **options)
        assert moved.loaded(logits) == 2 * 4 * 1500
    assert gradient.isfinite().all() and not gradient[~mask].any() and gradient[mask].any()
    none = kernels.row_stats(logits, ids, inv_temperature, mask=torch.zeros_like(mask), softcap=None, scale=1.0)
    assert [values.tolist() for values in none] == [[0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]


def check_rows_without_upstream_are_not_read():
    import interpreter

    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(4, 1500)
    options = {"mask": None, "softcap": None, "scale": 1.0}
    stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    g, zero = torch.tensor([1.0, 0.0, -2.0, 0.0]), torch.zeros(4)
    full = kernels.row_gradient(logits, ids, inv_temperature, stats, torch.ones(4), zero, zero, **options)
    with interpreter.traffic() as moved:
        some = kernels.row_gradient(logits, ids, inv_temperature, stats, g, zero, zero, **options)
    assert moved.loaded(logits) == 2 * 4 * 1500 and not some[[1, 3]].any() and torch.equal(some[0], full[0])


def check_bad_rows_stay_alone():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(4, 1500)
    logits[1, 700], logits[2, 3] = math.nan, INF
    options = {"mask": None, "softcap": None, "scale": 1.0}
    stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    logprobs = kernels.finish(stats, inv_temperature).logprobs
    assert logprobs.isfinite().tolist() == [True, False, False, True]
    gradient = kernels.row_gradient(
        logits, ids, inv_temperature, stats, torch.ones(4), torch.zeros(4), torch.zeros(4), **options
    )
    assert gradient[[0, 3]].isfinite().all() and gradient[1].isnan().any() and gradient[2].isnan().any()
    all_banned = kernels.row_stats(torch.full((1, 9), -INF), ids[:1] % 9, inv_temperature[:1], **options)
    assert kernels.finish(all_banned, inv_temperature[:1]).logprobs.isnan().all()


def check_no_rows():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(0, 100)
    options = {"mask": None, "softcap": None, "scale": 1.0}
    stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    empty = torch.zeros(0)
    gradient = kernels.row_gradient(logits, ids, inv_temperature, stats, empty, empty, empty, **options)
    assert stats.total.shape == (0,) and gradient.shape == (0, 100)


def check_rows_apart_and_unaligned():
    wide = 3 * torch.randn(3, 1601)
    ids, inv_temperature = torch.randint(0, 1500, (3,)), torch.ones(3)
    for first in (0, 1, 3):
        compare(wide[:, first : first + 1500], ids, inv_temperature)
    halves = wide.bfloat16()
    compare(halves[:, 5:1505], ids, inv_temperature)
    compare(torch.zeros(3, 1616)[:, 16:1616].copy_(wide[:, :1600]), ids, inv_temperature)


def check_in_place_is_the_same():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    for vocab_size in (1504, 1501):
        logits, ids, inv_temperature = draw(3, vocab_size, torch.bfloat16)
        options = {"mask": None, "softcap": None, "scale": 1.0}
        stats = kernels.row_stats(logits, ids, inv_temperature, **options)
        upstream = tuple(torch.randn(3, 3))
        apart = kernels.row_gradient(logits, ids, inv_temperature, stats, *upstream, **options)
        over = logits.clone()
        assert kernels.row_gradient(over, ids, inv_temperature, stats, *upstream, **options, out=over) is over
        assert torch.equal(apart, over)


def check_gradient_in_another_format_and_stride():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(3, 1501)
    options = {"mask": None, "softcap": None, "scale": 1.0}
    stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    upstream = tuple(torch.randn(3, 3))
    plain = kernels.row_gradient(logits, ids, inv_temperature, stats, *upstream, **options)
    half = torch.empty(3, 1601, dtype=torch.float16)[:, 7:1508]
    kernels.row_gradient(logits, ids, inv_temperature, stats, *upstream, **options, out=half)
    assert torch.equal(half, plain.half())


def check_alone_or_in_a_batch_and_twice():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    for vocab_size in (1504, 1501):
        logits, ids, inv_temperature = draw(4, vocab_size)
        options = {"mask": None, "softcap": None, "scale": 1.0}
        upstream = tuple(torch.randn(3, 4))

        def run(rows: slice, logits=logits, ids=ids, inv_temperature=inv_temperature, upstream=upstream):
            some = (logits[rows], ids[rows], inv_temperature[rows])
            stats = kernels.row_stats(*some, **options)  # noqa: B023
            gradient = kernels.row_gradient(*some, stats, *(one[rows] for one in upstream), **options)  # noqa: B023
            return torch.cat([torch.stack(stats), gradient.T])

        whole = run(slice(None))
        assert torch.equal(whole, run(slice(None)))
        assert all(torch.equal(whole[:, [row]], run(slice(row, row + 1))) for row in range(4))


def check_slices_of_a_vocabulary():
    from grpoforge_kernels import rows
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(4, 2000)
    mask = torch.tensor([True, True, False, True])
    options = {"mask": mask, "softcap": None, "scale": 1.0}
    upstream = tuple(torch.randn(3, 4))
    whole = kernels.row_stats(logits, ids, inv_temperature, **options)
    cuts = ((0, 7), (7, 1200), (1200, 2000))
    parts = [kernels.row_stats(logits[:, a:b], ids, inv_temperature, **options, first_id=a) for a, b in cuts]
    merged = rows.merge(rows.merge(parts[0], parts[1], inv_temperature), parts[2], inv_temperature)
    for one, other in zip(rows.finish(merged, inv_temperature), rows.finish(whole, inv_temperature)):
        assert (one - other).abs().max() <= 2e-6
    gradient = kernels.row_gradient(logits, ids, inv_temperature, whole, *upstream, **options)
    pieces = [
        kernels.row_gradient(logits[:, a:b], ids, inv_temperature, whole, *upstream, **options, first_id=a)
        for a, b in cuts
    ]
    assert (torch.cat(pieces, dim=1) - gradient).abs().max() <= 1e-6


def check_a_row_over_several_programs():
    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    for vocab_size in (16_384, 16_391):
        logits, ids, inv_temperature = draw(4, vocab_size, torch.bfloat16)
        ids[:3] = torch.tensor([0, vocab_size - 1, 4096])
        mask = torch.tensor([True, True, True, False])
        options = {"mask": mask, "softcap": None, "scale": 1.0}
        alone = kernels.row_stats(logits, ids, inv_temperature, **options)
        config = configs.row_stats_config(logits.dtype, vocab_size, logits.device)
        for slice_size in (3 * config.block, config.block):
            num_parts = -(-vocab_size // slice_size)
            partial = torch.full((4, num_parts, 4), math.nan)
            merged = torch.full((4, 4), math.nan)
            kernels.launch_row_stats(
                config, logits, ids, inv_temperature, mask, partial, num_parts, slice_size, 0, True, None, 1.0
            )
            kernels.launch_merge(partial, inv_temperature, merged)
            assert torch.equal(merged[0], alone.maximum) and torch.equal(merged[3], alone.chosen)
            assert ((merged[1] - alone.total).abs() <= 1e-6 * alone.total).all()
            assert ((merged[2] - alone.weighted).abs() <= 1e-6 * alone.weighted.abs() + 1e-6).all()


def check_when_a_row_is_split():
    from grpoforge_kernels.triton import configs

    device = torch.device("cpu")
    real, configs.multiprocessors = configs.multiprocessors, lambda device: 132
    assert configs.split(264, 151_936, 4096, device) == (1, 151_936)
    num_parts, size = configs.split(8, 151_936, 4096, device)
    assert (num_parts, size) == (8, 5 * 4096) and num_parts * size >= 151_936
    assert configs.split(8, 8000, 4096, device) == (1, 8000)
    os.environ["GRPOFORGE_DETERMINISTIC"] = "1"
    assert configs.split(8, 151_936, 4096, device) == (1, 151_936)
    del os.environ["GRPOFORGE_DETERMINISTIC"]
    configs.multiprocessors = real


def check_offsets_beyond_31_bits():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    storage = torch.empty(2 * 2**30 + 5008, dtype=torch.bfloat16)
    far = storage.as_strided((3, 5008), (2**30, 1))
    near, ids, inv_temperature = draw(3, 5008, torch.bfloat16)
    far.copy_(near)
    options = {"mask": None, "softcap": None, "scale": 1.0}
    stats = kernels.row_stats(far, ids, inv_temperature, **options)
    assert all(torch.equal(a, b) for a, b in zip(stats, kernels.row_stats(near, ids, inv_temperature, **options)))
    upstream = tuple(torch.randn(3, 3))
    gradient = kernels.row_gradient(near, ids, inv_temperature, stats, *upstream, **options)
    kernels.row_gradient(far, ids, inv_temperature, stats, *upstream, **options, out=far)
    assert torch.equal(far, gradient)


def check_minimal_bytes():
    import interpreter

    from grpoforge_kernels.triton import selective_log_softmax as kernels

    rows = 3
    for vocab_size in (5008, 5003):
        for dtype in DTYPES:
            logits, ids, inv_temperature = draw(rows, vocab_size, dtype)
            options = {"mask": None, "softcap": None, "scale": 1.0}
            with interpreter.traffic() as moved:
                stats = kernels.row_stats(logits, ids, inv_temperature, **options)
            size = dtype.itemsize
            assert moved.loaded(logits) == rows * (vocab_size + 1) * size, "each logit once, the chosen one twice"
            assert moved.loaded() + moved.stored() == rows * ((vocab_size + 1) * size + 28)
            out = torch.empty_like(logits)
            with interpreter.traffic() as moved:
                kernels.row_gradient(logits, ids, inv_temperature, stats, *torch.randn(3, rows), **options, out=out)
            assert moved.loaded(logits) == moved.stored(out) == rows * vocab_size * size, "each logit once"
            blocks = -(-(vocab_size + 16 // size - 1) // 2048)
            assert moved.loaded() - moved.loaded(logits) <= rows * blocks * 49
            assert moved.stored() == moved.stored(out)


def check_the_byte_of_a_mask():
    import interpreter

    from grpoforge_kernels.triton import selective_log_softmax as kernels

    rows, vocab_size = 4, 5008
    logits, ids, inv_temperature = draw(rows, vocab_size)
    options = {"mask": torch.tensor([True, True, False, True]), "softcap": None, "scale": 1.0}
    with interpreter.traffic() as moved:
        stats = kernels.row_stats(logits, ids, inv_temperature, **options)
    # A masked row: its mask and four statistics. Any other: what an unmasked call moves, and the mask.
    assert moved.loaded(options["mask"]) == rows
    assert moved.loaded() + moved.stored() == 3 * ((vocab_size + 1) * 4 + 28 + 1) + 16 + 1
    upstream, out = tuple(torch.ones(3, rows)), torch.empty_like(logits)
    with interpreter.traffic() as moved:
        kernels.row_gradient(logits, ids, inv_temperature, stats, *upstream, **options, out=out)
    assert moved.loaded(logits) == 3 * vocab_size * 4 and moved.stored() == rows * vocab_size * 4
    blocks = moved.loaded(options["mask"]) // rows
    assert blocks >= 1 and moved.loaded(options["mask"]) == rows * blocks, "one byte for each block of a row"
    # Three upstream derivatives and the mask decide; id, inverse temperature and three statistics are for live rows.
    assert moved.loaded() - moved.loaded(logits) == blocks * (rows * 13 + 3 * (8 + 4 + 12))


def check_bytes_of_a_row_over_several_programs():
    import interpreter

    from grpoforge_kernels.triton import configs
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    rows, vocab_size = 3, 16_384
    logits, ids, inv_temperature = draw(rows, vocab_size, torch.bfloat16)
    config = configs.row_stats_config(logits.dtype, vocab_size, logits.device)
    for parts in (2, 4):
        partial, merged = torch.empty(4, parts, rows), torch.empty(4, rows)
        slice_size = vocab_size // parts
        with interpreter.traffic() as moved:
            kernels.launch_row_stats(
                config, logits, ids, inv_temperature, None, partial, parts, slice_size, 0, True, None, 1.0
            )
        assert moved.loaded(logits) == rows * (vocab_size + 1) * 2, "as often as by one program"
        assert moved.loaded() - moved.loaded(logits) == rows * 12 * parts and moved.stored() == rows * 16 * parts
        with interpreter.traffic() as merging:
            kernels.launch_merge(partial, inv_temperature, merged)
        assert merging.loaded() == rows * (16 * parts + 4) and merging.stored() == rows * 16
        total = moved.loaded() + moved.stored() + merging.loaded() + merging.stored()
        assert total == rows * ((vocab_size + 1) * 2 + 28 + 44 * parts - 8)


def check_ids_out_of_range_are_not_read():
    import interpreter

    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(3, 100)
    ids[0], ids[1] = -1, 100
    with interpreter.traffic() as moved:
        stats = kernels.row_stats(logits, ids, inv_temperature, mask=None, softcap=None, scale=1.0)
    assert moved.loaded(logits) == 4 * (3 * 100 + 1)
    assert stats.chosen[:2].tolist() == [-INF, -INF]


def check_without_entropy():
    from grpoforge_kernels.triton import selective_log_softmax as kernels

    logits, ids, inv_temperature = draw(3, 1500)
    options = {"mask": None, "softcap": None, "scale": 1.0}
    full = kernels.row_stats(logits, ids, inv_temperature, **options)
    lean = kernels.row_stats(logits, ids, inv_temperature, **options, entropy=False)
    assert torch.equal(lean.maximum, full.maximum) and torch.equal(lean.total, full.total)
    assert not lean.weighted.any()


def check_the_operation_runs_on_these_kernels():
    os.environ["GRPOFORGE_KERNELS"] = "triton"
    from grpoforge_kernels import dispatch, ops

    logits, ids, _ = draw(3, 1500)
    assert dispatch.backend_name("selective_log_softmax", logits.device, logits.dtype) == "triton"
    logits.requires_grad_()
    results = ops.selective_log_softmax(logits, ids, 0.7)
    (results.logprobs.sum() + 0.1 * results.entropy.sum()).backward()
    given, logits.grad = logits.grad, None
    (logits / 0.7).log_softmax(dim=1).gather(1, ids[:, None]).sum().backward(retain_graph=True)
    log_p = (logits / 0.7).log_softmax(dim=1)
    (-0.1 * (log_p.exp() * log_p).sum()).backward()
    assert (given - logits.grad).abs().max() <= 2e-6
    del os.environ["GRPOFORGE_KERNELS"]
    dispatch.forget()


@pytest.mark.parametrize("name", [name for name in list(globals()) if name.startswith("check_")])
def test_in_the_interpreter(name: str, interpreted: Callable[[str], dict[str, str]]) -> None:
    failure = interpreted(__file__)[name]
    assert not failure, failure


if __name__ == "__main__":
    import interpreter

    interpreter.main(dict(globals()))
