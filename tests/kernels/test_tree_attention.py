"""Attention over packed trees against an oracle in float64 that follows each token's path by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpoforge_kernels import dispatch
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.ops import Forest, tree_attention
from grpoforge_kernels.reference import tree_attention as reference

BOUND = 5e-7
"""Error of a number in float32, as a part of what `sizes` says: eight roundings."""
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of results in half precision: that of the result, and that of the output, which gradients are made from."""
GROUPS = (1, 2, 3, 7)
SIZES = (1, 3, 8, 16, 20, 32, 64)


@dataclass(frozen=True)
class Case:
    """Inputs ``[N, h, d]``, two of ``[N, k, d]``, the gradient of the output, and the tokens' depths."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    positions: Tensor
    scale: float

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (one.to(dtype) for one in (*self.inputs(), self.grad))
        return Case(*tensors, self.positions, self.scale)


Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output, and gradients of query, key and value."""


def case(
    positions: list[int], *, d: int, group: int, kv_heads: int = 2, scale: float | None = None, seed: int = 0
) -> Case:
    made = torch.Generator().manual_seed(seed)
    shapes = [(len(positions), heads, d) for heads in (group * kv_heads, kv_heads, kv_heads, group * kv_heads)]
    tensors = (torch.randn(shape, generator=made) for shape in shapes)
    return Case(*tensors, torch.tensor(positions), d**-0.5 if scale is None else scale)


def ancestors(positions: list[int]) -> Iterator[list[int]]:
    """Of each token, root first, itself last."""
    path: dict[int, int] = {}
    for token, position in enumerate(positions):
        path[position] = token
        yield [path[depth] for depth in range(position + 1)]


def attended(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> Tensor:
    """The definition, one token after the other, differentiable by autograd in the dtype of the inputs."""
    group, rows = query.shape[1] // key.shape[1], []
    for token, path in enumerate(ancestors(positions.tolist())):
        keys, values = (one[path].repeat_interleave(group, dim=1) for one in (key, value))
        weights = (scale * (keys * query[token]).sum(dim=2)).softmax(dim=0)
        rows.append((weights[..., None] * values).sum(dim=0))
    return torch.stack(rows)


def differentiated(of: Callable[[Tensor, Tensor, Tensor], Tensor], given: Case) -> Results:
    leaves = [one.detach().requires_grad_() for one in given.inputs()]
    out = of(*leaves)
    d_query, d_key, d_value = torch.autograd.grad(out, leaves, given.grad)
    return out.detach(), d_query, d_key, d_value


def exact(given: Case) -> Results:
    wide = given.to(torch.float64)
    return differentiated(lambda q, k, v: attended(q, k, v, wide.positions, wide.scale), wide)


def ours(given: Case) -> Results:
    forest = Forest.of(given.positions)
    return differentiated(lambda q, k, v: tree_attention(q, k, v, forest, scale=given.scale), given)


def sizes(given: Case) -> Results:
    """What errors are measured in: the sums of the terms' sizes, where a term is as wrong as its score.

    A score is wrong by roundings of ``|q| . |k|``, and a weight by so much of itself.
    """
    q, k, v, g = (one.double().transpose(0, 1) for one in (*given.inputs(), given.grad))
    kv_heads, group = len(k), len(q) // len(k)
    k, v = (one.repeat_interleave(group, dim=0) for one in (k, v))
    hidden = torch.ones(2 * given.positions.shape, dtype=torch.bool)
    for token, path in enumerate(ancestors(given.positions.tolist())):
        hidden[token, path] = False
    weights = (given.scale * (q @ k.mT)).masked_fill(hidden, -math.inf).softmax(dim=2)
    q, k, v, g = (one.abs() for one in (q, k, v, g))
    weights = weights * (1 + given.scale * (q @ k.mT).masked_fill(hidden, 0.0).amax(dim=2, keepdim=True))
    out = weights @ v
    slopes = given.scale * weights * (g @ v.mT + (g * out).sum(dim=2, keepdim=True))
    shared = (slopes.mT @ q, weights.mT @ g)
    d_key, d_value = (one.unflatten(0, (kv_heads, group)).sum(dim=1) for one in shared)
    return tuple(one.transpose(0, 1) for one in (out, slopes @ k, d_key, d_value))  # type: ignore[return-value]


def assert_close(given: Case, dtype: torch.dtype = torch.float32) -> None:
    case_in = given.to(dtype)
    for name, mine, true, size in zip(
        ("out", "d_query", "d_key", "d_value"), ours(case_in), exact(case_in), sizes(case_in), strict=True
    ):
        assert mine.dtype == dtype
        share = ((mine.double() - true).abs() / (size * (BOUND + ROUNDING[dtype]) + 1e-300)).max()
        assert share <= 1, f"{name}: {float(share):.2f} of the bound"


@st.composite
def forests(draw: st.DrawFn) -> list[int]:
    """Chains, tries of long and of short runs, single tokens; 1 to 6 trees."""
    positions: list[int] = []
    for _ in range(draw(st.integers(1, 6))):
        positions.append(0)
        for _ in range(draw(st.integers(0, 4))):
            last = positions[-1]
            start = draw(st.integers(min(1, last), last + 1))
            positions += range(max(1, start), max(1, start) + draw(st.sampled_from([1, 1, 2, 3, 11, 40])))
    return positions


@settings(max_examples=150, deadline=None)
@given(
    positions=forests(), d=st.sampled_from(SIZES), group=st.sampled_from(GROUPS), kv_heads=st.integers(1, 2),
    scale=st.sampled_from([0.05, 0.3, 1.0]), seed=st.integers(0, 100),
)  # fmt: skip
def test_values_and_gradients(positions: list[int], d: int, group: int, kv_heads: int, scale: float, seed: int) -> None:
    assert_close(case(positions, d=d, group=group, kv_heads=kv_heads, scale=scale, seed=seed))


def trie(prompt: int, *, beginnings: int, shared: int, own: int, each: int) -> list[int]:
    """A prompt, completions that begin in one of some ways, and what each adds to that."""
    end = prompt + shared
    return [*range(prompt), *(beginnings * [*range(prompt, end), *(each * [*range(end, end + own)])])]


LARGE = {
    # More places than are computed at a time (128), and blocks that begin and end anywhere in them.
    "a chain": [*range(300)],
    "completions": trie(130, beginnings=1, shared=1, own=17, each=5),
    "a trie": trie(9, beginnings=3, shared=6, own=21, each=4),
    "leaves": trie(5, beginnings=4, shared=2, own=1, each=40),
    "rows": [*range(3), 0, 0, *range(40), 0, 1, 2, 1, 2, 0],
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("d", "group"), [(8, 2), (64, 7), (20, 1), (12, 70)])
def test_large_trees(name: str, d: int, group: int) -> None:
    assert_close(case(LARGE[name], d=d, group=group, kv_heads=1))


def test_of_a_single_token_the_output_is_its_value() -> None:
    given = case([0], d=3, group=2)
    out, d_query, d_key, d_value = ours(given)
    assert torch.equal(out, given.value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(d_value, given.grad.view(1, 2, 2, 3).sum(dim=2))
    torch.testing.assert_close((d_query, d_key), (torch.zeros(1, 4, 3), torch.zeros(1, 2, 3)), rtol=0, atol=1e-6)


def test_by_hand() -> None:
    # Scores are all 0, so a token's output is the mean of the values on its path: 0 - 1 - 2, 0 - 1 - 3, 0 - 4, 5.
    values = torch.tensor([1.0, 2.0, 6.0, 9.0, 5.0, 7.0]).view(6, 1, 1)
    key = torch.zeros(6, 1, 1)
    out = tree_attention(torch.ones(6, 1, 1), key, values, torch.tensor([0, 1, 2, 2, 1, 0]), scale=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5, 3.0, 4.0, 3.0, 7.0]))


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Torch's attention of one row of tokens."""
    group = query.shape[1] // key.shape[1]
    shared = (one.repeat_interleave(group, dim=1) for one in (key, value))
    q, k, v = (one.transpose(0, 1)[None] for one in (query, *shared))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)


def test_a_chain_is_causal_attention() -> None:
    given = case(LARGE["a chain"], d=16, group=3)
    plain = differentiated(lambda q, k, v: causal(q, k, v, given.scale), given)
    for mine, theirs in zip(ours(given), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.needs_compiler
@pytest.mark.parametrize(("d", "group"), [(8, 2), (32, 1), (64, 7)])
def test_errors_are_no_greater_than_those_of_torch(d: int, group: int) -> None:
    given = case(LARGE["a chain"], d=d, group=group, kv_heads=1)
    plain = differentiated(lambda q, k, v: causal(q, k, v, given.scale), given)
    wide = given.to(torch.float64)
    true = differentiated(lambda q, k, v: causal(q, k, v, given.scale), wide)
    for mine, theirs, one in zip(ours(given), plain, true, strict=True):
        assert (mine - one).norm() <= 1.25 * (theirs - one).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_close(case(LARGE["a trie"], d=16, group=2), dtype)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores(size: float) -> None:
    given = case(LARGE["a trie"], d=4, group=2, scale=1.0)
    given.query[..., 0], given.key[..., 0] = size, 1.0
    assert_close(given)


def test_one_key_that_takes_all() -> None:
    given = case([*range(20)], d=4, group=1, scale=1.0)
    given.key[7] = 0.0
    given.query[8:, :, 0], given.key[7, :, 0] = 1e4, 1.0
    given.key[8:, :, 0], given.key[:7, :, 0] = -1.0, -1.0
    out, d_query, *_ = ours(given)
    assert torch.equal(out[8:], given.value[7].expand(12, 2, 4))
    assert float(d_query[8:].abs().max()) < 1e-6


def two_trees() -> Case:
    return case([0, 1, 2, 3, 2, 1, 0, 1, 1, 2], d=8, group=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_stays_in_its_tree(which: int, bad: float) -> None:
    clean, given = two_trees(), two_trees()
    (*given.inputs(), given.grad)[which][2] = bad
    for mine, true in zip(ours(given), ours(clean), strict=True):
        assert torch.equal(mine[6:], true[6:])


def test_a_later_token_changes_nothing_before_it() -> None:
    clean, given = two_trees(), two_trees()
    for one in given.inputs():
        one[3] = 1e4
    others = [0, 1, 2, 4, 5]
    assert torch.equal(ours(given)[0][others], ours(clean)[0][others])


def test_tokens_may_lie_apart() -> None:
    given = case(LARGE["a trie"], d=8, group=2)
    fused = torch.cat(given.inputs(), dim=1).requires_grad_()
    out = tree_attention(*fused.split([4, 2, 2], dim=1), given.positions, scale=given.scale)
    (gradient,) = torch.autograd.grad(out, fused, given.grad)
    apart = ours(given)
    torch.testing.assert_close((out, gradient), (apart[0], torch.cat(apart[1:], dim=1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["heads first", "numbers first"])
def test_any_strides(layout: str) -> None:
    given = case(LARGE["a trie"], d=8, group=2)
    order = (1, 0, 2) if layout == "heads first" else (2, 1, 0)
    moved = (one.permute(order).contiguous().permute(order) for one in (*given.inputs(), given.grad))
    assert_close(Case(*moved, given.positions, given.scale))


def backends() -> list[ModuleType]:
    """The reference, and what runs float32 here."""
    return [reference, dispatch.backend("tree_attention", torch.device("cpu"), torch.float32)]


def test_gradients_go_where_they_are_told() -> None:
    given = case(LARGE["a trie"], d=8, group=2)
    forest, inputs = Forest.of(given.positions), given.inputs()
    for module in backends():
        out, logsumexp = module.forward(*inputs, forest, given.scale)
        rest = (given.grad, *inputs, out, logsumexp, forest, given.scale)
        fused = torch.full((len(forest), 8, 8), math.nan)
        into = fused.split([4, 2, 2], dim=1)
        for half in (into, [one.to(torch.bfloat16) for one in into]):
            written = module.backward(*rest, *half)
            assert all(one is given for one, given in zip(written, half, strict=True))
            for one, true in zip(written, module.backward(*rest), strict=True):
                assert torch.equal(one, true.to(one.dtype))
        assert not fused.isnan().any()


def test_logsumexp_is_that_of_the_scores() -> None:
    given = case(LARGE["a chain"], d=8, group=2, kv_heads=1)
    path = torch.arange(300)
    scores = given.scale * torch.einsum("ihd,jd->hij", given.query.double(), given.key[:, 0].double())
    true = scores.masked_fill(path[None, :] > path[:, None], -math.inf).logsumexp(dim=2).t()
    for module in backends():
        mine = module.forward(*given.inputs(), Forest.of(given.positions), given.scale)[1]
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-6)


def test_the_reference_has_the_gradient_of_its_values() -> None:
    given = case([0, 1, 2, 2, 1, 0, 1], d=3, group=2, kv_heads=1).to(torch.float64)
    leaves = [one.requires_grad_() for one in given.inputs()]
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, given.positions, scale=0.7), leaves)


def test_there_is_no_second_derivative() -> None:
    given = two_trees()
    query = given.query.requires_grad_()
    out = tree_attention(query, given.key, given.value, given.positions, scale=1.0)
    (d_query,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_query.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same(compiler: str) -> None:
    given = case(LARGE["a trie"], d=8, group=2)
    compiled = torch.compile(
        lambda q, k, v: tree_attention(q, k, v, given.positions, scale=given.scale), backend=compiler, fullgraph=True
    )
    for mine, true in zip(differentiated(compiled, given), ours(given), strict=True):
        assert torch.equal(mine, true)


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    given = two_trees()
    leaves = [one.requires_grad_() for one in given.inputs()]
    torch.library.opcheck(torch.ops.grpoforge.tree_attention.default, (*leaves, given.positions, 0.5))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.needs_compiler
@pytest.mark.parametrize(("d", "group", "kv_heads"), [(64, 7, 1), (32, 2, 2)])
def test_bits_do_not_depend_on_threads_or_on_the_run(
    d: int, group: int, kv_heads: int, threads: Callable[[int], None]
) -> None:
    chains = [*range(400), *(3 * [*range(250, 400)])]
    for positions in (chains, chains + chains[:300] + [*range(9)] + 300 * [8, 9] + chains):
        given, found = case(positions, d=d, group=group, kv_heads=kv_heads), []
        for n in (1, 2, 2, 5):
            threads(n)
            found.append(ours(given))
        assert all(torch.equal(one, first) for other in found[1:] for one, first in zip(other, found[0], strict=True))


def test_bits_do_not_depend_on_the_trees_beside_it() -> None:
    alone = case(LARGE["a trie"], d=16, group=2)
    n = len(alone.positions)
    many = case(LARGE["completions"] + LARGE["a trie"] + LARGE["leaves"], d=16, group=2)
    tree = slice(len(LARGE["completions"]), len(LARGE["completions"]) + n)
    for one, other in zip((*many.inputs(), many.grad), (*alone.inputs(), alone.grad), strict=True):
        one[tree] = other
    for mine, true in zip(ours(many), ours(alone), strict=True):
        assert torch.equal(mine[tree], true)


def test_no_tokens() -> None:
    given = case([], d=4, group=2)
    empty = torch.empty(0, dtype=torch.int64)
    results = ours(Case(*given.inputs(), given.grad, empty, 1.0))
    assert [one.shape for one in results] == [(0, 4, 4), (0, 4, 4), (0, 2, 4), (0, 2, 4)]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([1, 2], "token 0 has position 1: it is the first, so it may have 0 to 0"),
        ([0, 1, 3, 9], "token 2 has position 3: token 1 has 1, so it may have 0 to 2"),
        ([0, 1, -1], "token 2 has position -1: token 1 has 1, so it may have 0 to 2"),
    ],
)
def test_depths_that_are_no_preorder(positions: list[int], message: str) -> None:
    with pytest.raises(KernelError, match=message) as caught:
        ours(case(positions, d=2, group=1))
    assert "depth-first preorder" in caught.value.hint


def test_positions_of_the_wrong_kind() -> None:
    for positions in (torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(KernelError, match=r"not torch.int64 \[N\]"):
            Forest.of(positions)
    with pytest.raises(KernelError, match="the forest has 2 tokens and query 10"):
        tree_attention(*two_trees().inputs(), torch.tensor([0, 1]), scale=1.0)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (((6, 8), (6, 2, 8), (6, 2, 8)), r"query is torch.float32 \[6, 8\]"),
        (((6, 4, 0), (6, 2, 0), (6, 2, 0)), r"query is torch.float32 \[6, 4, 0\]"),
        (((6, 4, 8), (6, 3, 8), (6, 3, 8)), r"key has shape \[6, 3, 8\], not \[6, k, 8\] with k a divisor of 4"),
        (((6, 4, 8), (5, 2, 8), (5, 2, 8)), r"key has shape \[5, 2, 8\]"),
        (((6, 4, 8), (6, 2, 8), (6, 2, 4)), r"value has shape \[6, 2, 4\]"),
    ],
)
def test_shapes_that_do_not_fit(heads: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        tree_attention(*(torch.zeros(shape) for shape in heads), torch.arange(6), scale=1.0)


def test_dtypes_that_do_not_fit() -> None:
    given = two_trees()
    with pytest.raises(KernelError, match=r"value is torch\.float64 on cpu, not"):
        tree_attention(given.query, given.key, given.value.double(), given.positions, scale=1.0)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def force(name: str) -> None:
        monkeypatch.setenv("GRPOFORGE_KERNELS", name)

    yield force
    monkeypatch.undo()
    dispatch.forget()


def test_the_reference_may_be_forced(forced: Callable[[str], None]) -> None:
    forced("reference")
    assert dispatch.backend_name("tree_attention", torch.device("cpu"), torch.float32) == "reference"
    assert_close(case(LARGE["rows"], d=8, group=2))


def test_a_force_that_is_impossible(forced: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    forced("triton")
    with pytest.raises(KernelError, match="cannot run tree_attention: it does not run on cpu"):
        ours(two_trees())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.forget()
    with pytest.raises(KernelError, match="cannot run tree_attention: it has no tree_attention"):
        ours(two_trees())


@pytest.mark.needs_compiler
def test_on_the_cpu_it_is_cpp_but_for_float64() -> None:
    names = [dispatch.backend_name("tree_attention", torch.device("cpu"), dtype) for dtype in dispatch.DTYPES]
    assert set(names) == {"cpp"}
    assert dispatch.backend_name("tree_attention", torch.device("cpu"), torch.float64) == "reference"
