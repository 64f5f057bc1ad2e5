"""Rows as a trie: the layout by hand, its laws on random rows, and gradients where rows share what they can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpoforge import logprobs, shared_prefix
from grpoforge.collate import collate
from grpoforge.logprobs import CausalForward, Places
from grpoforge.packing import CannotShare, PromptsOnce
from grpoforge.precision import Precision
from grpoforge.trie import Trie
from grpoforge.types import Batch, Rollouts, TokenLogprobs

EXACT = Precision(torch.float64)


def make_batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]], side: str = "left") -> Batch:
    """A batch of these prompts and completions, a completion of no tokens among them, padded on that side."""
    num_prompt, num_completion = (max(1, *(len(row[part]) for row in rows)) for part in (0, 1))
    prompt_ids, completion_ids = torch.zeros(len(rows), num_prompt), torch.zeros(len(rows), num_completion)
    prompt_mask, completion_mask = prompt_ids.bool(), completion_ids.bool()
    for row, (prompt, completion) in enumerate(rows):
        at = slice(num_prompt - len(prompt), None) if side == "left" else slice(len(prompt))
        prompt_ids[row, at], prompt_mask[row, at] = torch.tensor(prompt).float(), True
        completion_ids[row, : len(completion)] = torch.tensor(completion).float()
        completion_mask[row, : len(completion)] = True
    return Batch(
        prompt_ids=prompt_ids.long(),
        prompt_mask=prompt_mask,
        completion_ids=completion_ids.long(),
        completion_mask=completion_mask,
        sampling_logprobs=torch.zeros(completion_ids.shape),
        temperatures=torch.ones(len(rows), dtype=torch.float64),
    )


def paths(packed: Trie) -> list[tuple[int, ...]]:
    """The tokens up to each token, told by the positions alone; no position may leave its path."""
    path: list[int] = []
    found = []
    for token, position in zip(packed.input_ids[0].tolist(), packed.position_ids[0].tolist(), strict=True):
        assert 0 <= position <= len(path)
        path = [*path[:position], token]
        found.append(tuple(path))
    return found


def test_a_trie_by_hand(make_rollouts: Callable[..., Rollouts]) -> None:
    """Three prompts of two groups that begin alike, and completions that begin alike.

    0: 5     1: 9     2: 3
                      3: 4     4: 6        the second row of prompt [5 9 3] goes on 4 6 1
                      5: 8                 its first row goes on 8 1, its third row is the same
             6: 10    7: 8                 prompt [5 10]
    8: 7     9: 2                          prompt [7]
    """
    rollouts = make_rollouts(
        [[5, 9, 3], [5, 10], [7]], [[[8, 1], [4, 6, 1], [8, 1]], [[8, 1], [3], [4]], [[2, 1], [2, 6], []]]
    )
    packed = Trie.of(collate(rollouts, pad_token_id=0))
    assert packed.input_ids.tolist() == [[5, 9, 3, 4, 6, 8, 10, 8, 7, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 1, 2, 0, 1]]
    # Row by row: 8 1 | 4 6 1 | 8 1 || 8 1 | 3 | 4 || 2 1 | 2 6
    assert packed.predicted_at.tolist() == [2, 5, 2, 3, 4, 2, 5, 6, 7, 6, 6, 8, 9, 8, 9]
    assert packed.longest == 5


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.lists(st.integers(0, 2), max_size=5)),
        min_size=1,
        max_size=12,
    ),
    side=st.sampled_from(["left", "right"]),
)
def test_each_beginning_of_a_row_stands_once_and_its_completion_is_predicted_after_it(
    rows: list[tuple[list[int], list[int]]], side: str
) -> None:
    packed = Trie.of(make_batch(rows, side))
    found = paths(packed)
    computed = [(*prompt, *completion[:-1]) for prompt, completion in rows]
    beginnings = {row[: end + 1] for row in computed for end in range(len(row))}
    assert len(found) == packed.num_tokens == len(beginnings) and set(found) == beginnings
    asked = [(*prompt, *completion[:end]) for prompt, completion in rows for end in range(len(completion))]
    assert [found[place] for place in packed.predicted_at.tolist()] == asked
    assert packed.longest == max(len(row) for row in computed)


def test_large_token_ids_are_in_the_order_of_numbers() -> None:
    """Bytes of little numbers would put 256 before 1."""
    packed = Trie.of(make_batch([([256, 1], [2, 2]), ([1, 7], [2]), ([256, 3], [2])]))
    assert packed.input_ids.tolist() == [[1, 7, 256, 1, 2, 3]]


MIXED = [[0.7, 1.3, 0.7, 1.0]]
SHARING = {
    "beginnings at every depth": ([[5, 9]], [[[3, 4, 5, 6], [3, 4, 5, 7], [3, 4, 8], [3, 9]]], None),
    "equal completions": ([[5, 9]], [[[3, 4, 1]] * 4], None),
    "equal completions at several temperatures": ([[5, 9]], [[[3, 4, 1]] * 4], MIXED),
    "one is the beginning of another": ([[5, 9]], [[[3, 4, 5, 6], [3, 4], [3], [3, 4, 5, 6, 7]]], MIXED),
    "prompts begin alike": ([[5, 9, 3], [5, 9, 4, 2], [5]], [[[3, 4], [3, 5]]] * 3, None),
    "a prompt goes on as a completion does": ([[5], [5, 9], [5, 9, 3]], [[[9, 3, 7], [9, 4]]] * 3, None),
    "equal prompts of two groups": ([[5, 9], [5, 9]], [[[3, 4], [3, 5, 7]], [[3, 5, 7], [6]]], None),
    "groups apart with equal prompts": ([[5, 9], [6], [5, 9]], [[[3, 4], [3, 5, 7]]] * 3, None),
    "a row without a token": ([[5, 9], [4]], [[[3, 4], []], [[], []]], None),
}


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, vocab_size=24, num_key_value_heads=2, max_position_embeddings=64)  # type: ignore[arg-type]
    made = Qwen2ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return made


def objective(rows: slice, current: TokenLogprobs) -> Tensor:
    """Weighs every cell differently, so that no two tokens with one answer have one gradient."""
    weights = torch.linspace(-1, 1, 11, dtype=torch.float64)[: current.logprobs.shape[1]]
    weights = weights * (1 + torch.arange(rows.start, rows.stop, dtype=torch.float64))[:, None]
    return (weights * current.logprobs.exp()).square().sum() + (weights * current.entropy).sum()


@pytest.fixture(params=[Trie, PromptsOnce], ids=lambda packing: packing.__name__)
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "packings", lambda device, dtype: (request.param,))


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("logits_bytes", [2**28, 24 * 8 * 6], ids=["all logits", "in runs"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen head"])
@pytest.mark.parametrize("case", SHARING)
def test_what_rows_share_gives_the_log_probs_and_gradients_of_padded_rows(
    case: str, frozen: bool, logits_bytes: int, make_rollouts: Callable[..., Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", logits_bytes)
    batch = collate(make_rollouts(*SHARING[case]), pad_token_id=0)
    policy = model()
    policy.lm_head.requires_grad_(not frozen)
    found = []
    for mode in ("on", "off"):
        forward = CausalForward(policy, EXACT, mode)  # type: ignore[arg-type]
        with torch.no_grad():
            said = forward.logprobs(batch)
        value = forward.backward(batch, objective)
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
        found.append([torch.tensor(value), said.logprobs, said.entropy, *gradients])
        policy.zero_grad(set_to_none=True)
    assert bool((found[1][1] != 0).any())
    for one, other in zip(*found, strict=True):
        # transformers' norms compute in float32.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_rows_that_are_all_masked_have_no_gradient_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "packings", lambda device, dtype: (Trie,))
    batch = make_batch([([5, 9], []), ([5, 9], []), ([4], [])])
    policy = model()
    forward = CausalForward(policy, EXACT, "on")
    assert forward.backward(batch, lambda rows, current: current.logprobs.sum()) == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in policy.parameters())


def test_the_head_answers_once_for_equal_tokens_at_one_place_and_temperature() -> None:
    """Rows 3 4, 3 5 and 3 4, the last at another temperature: 3 and 3, 4, 5, then 3 and 4 anew."""
    batch = replace(make_batch([([7], [3, 4]), ([7], [3, 5]), ([7], [3, 4])]), temperatures=torch.tensor([1.0, 1.0, 2]))
    places, predicted_at = Places.of(batch).merged(Trie.of(batch).predicted_at)
    answered = sorted(zip(predicted_at.tolist(), places.ids.tolist(), places.temperatures.tolist(), strict=True))
    assert answered == [(0, 3, 1.0), (0, 3, 2.0), (1, 4, 1.0), (1, 4, 2.0), (1, 5, 1.0)]
    assert places.each(places.ids).tolist() == [3, 4, 3, 5, 3, 4]
    assert places.each(places.temperatures).tolist() == [1, 1, 1, 1, 2, 2]
    rectangle = places.scatter(places.ids * 10 + places.temperatures.long())
    assert rectangle.tolist() == [[31, 41], [31, 51], [32, 42]]


def test_a_run_needs_the_answers_of_its_rows_once() -> None:
    batch = make_batch([([7], [3, 4]), ([7], [5]), ([7], [5, 3]), ([7], [5])])
    places, _ = Places.of(batch).merged(Trie.of(batch).predicted_at)
    assert places.ids.tolist() == [3, 5, 4, 3]
    part, needed = places.of_run(slice(1, 4), slice(2, 6))
    assert needed.tolist() == [1, 3] and part.ids.tolist() == [5, 3]
    assert part.scatter(part.ids).tolist() == [[5, 0], [5, 3], [5, 0]]


def test_tokens_that_have_nothing_in_common_stay_as_they_are() -> None:
    batch = make_batch([([7], [3, 4]), ([7], [5, 4])])
    places = Places.of(batch)
    merged, predicted_at = places.merged(Trie.of(batch).predicted_at)
    assert merged is places and merged.each(places.ids) is places.ids
    assert predicted_at.tolist() == [0, 1, 0, 2]


def test_it_pays_by_what_the_trie_saves(
    make_rollouts: Callable[..., Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of one row: 13 trunk tokens each, of which the trie shares 10 and the other packing none."""
    beginning = list(range(2, 12))
    batch = collate(make_rollouts([[*beginning, 3], [*beginning, 4]], [[[5, 6, 7]], [[8, 9, 2]]]), pad_token_id=0)
    for choice, tokens in ((Trie, 16), (PromptsOnce, 26)):
        assert choice.of(batch).num_tokens == tokens
        monkeypatch.setattr(shared_prefix, "packings", lambda device, dtype, choice=choice: (choice,))
        sharing = shared_prefix.SharedPrefix(model().model, EXACT, "auto")
        with contextlib.ExitStack() as held:
            assert (sharing.hidden(batch, held) is not None) == (choice is Trie)


def test_capped_scores_are_another_packing_s() -> None:
    packed = Trie.of(make_batch([([7], [3, 4])]))
    with pytest.raises(CannotShare, match="soft cap"):
        packed.attend(*torch.randn(3, 2, 1, 8), scale=1.0, softcap=30.0)


def test_rows_are_a_trie_only_where_a_kernel_attends_over_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"cpp": (Trie, PromptsOnce), "reference": (PromptsOnce,)}
    for backend, expected in chosen.items():
        monkeypatch.setattr(shared_prefix, "backend_name", lambda op, device, dtype, backend=backend: backend)
        assert shared_prefix.packings(torch.device("cpu"), torch.float32) == expected
    assert shared_prefix.packings(torch.device("cuda"), torch.float32) == (PromptsOnce,)


@pytest.mark.parametrize("forced", ["reference", "triton"])
def test_a_forced_backend_without_the_kernel_packs_each_prompt_once(
    forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPOFORGE_KERNELS", forced)
    assert shared_prefix.packings(torch.device("cpu"), torch.float32) == (PromptsOnce,)
