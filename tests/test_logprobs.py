"""Trunk and head apart give what the whole model gives, however few tokens the head sees at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from grpoforge import logprobs
from grpoforge.collate import collate
from grpoforge.head import find_head
from grpoforge.logprobs import CausalForward, Places
from grpoforge.precision import Precision
from grpoforge.types import Batch, Rollouts, TokenLogprobs

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PLAIN = Precision(torch.float32)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def gemma2() -> Any:
    config = Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0, query_pre_attn_scalar=16)
    return Gemma2ForCausalLM(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gemma2": gemma2,
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
}


@pytest.fixture
def batch(make_rollouts: Callable[..., Rollouts]) -> Batch:
    prompts = [[5, 9, 3], [7], [4, 4]]
    completions = [[[3, 8, 1], [14]], [[22, 6], [5, 7, 9, 11, 1]], [[9], [2, 2]]]
    return collate(make_rollouts(prompts, completions, [[0.7, 1.3], [1.3, 0.7], [1.0, 2.0]]), pad_token_id=0)


def by_hand(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of every real token: each row by itself, no padding."""
    logprob = torch.zeros(batch.completion_mask.shape, dtype=torch.float64)
    entropy = torch.zeros_like(logprob)
    for row in range(batch.num_rows):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        completion = batch.completion_ids[row][batch.completion_mask[row]]
        ids = torch.cat([prompt, completion])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].double() / batch.temperatures[row]
        table = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
        logprob[row, : len(completion)] = table.gather(1, completion[:, None]).squeeze(1)
        entropy[row, : len(completion)] = -(table.exp() * table).sum(dim=1)
    return logprob, entropy


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_heads_of_other_families(family: str, batch: Batch) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    forward = CausalForward(model, PLAIN)
    assert forward.head is not None, "it has a head that can be told from its trunk"
    with torch.no_grad():
        found = forward.logprobs(batch)
        expected = by_hand(model, batch)
    torch.testing.assert_close(found.logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_logits_in_its_own_way_is_taken_whole(
    tiny_model: Callable[..., Any], batch: Batch
) -> None:
    model = tiny_model()
    original = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = shifted
    forward = CausalForward(model, Precision(torch.float64))
    assert forward.head is None
    with torch.no_grad():
        torch.testing.assert_close(forward.logprobs(batch).logprobs, by_hand(model, batch)[0], rtol=1e-10, atol=1e-10)


def gradient_of(model: Any, batch: Batch, weights: Tensor) -> tuple[float, list[Tensor]]:
    """Value and gradients of a made-up objective that mixes log-probs and entropy within each row."""
    forward = CausalForward(model, Precision(torch.float64))
    seen: list[int] = []

    def objective(rows: slice, current: TokenLogprobs) -> Tensor:
        seen.extend(range(rows.start, rows.stop))
        part = weights[rows]
        return (part * current.logprobs.exp()).sum(dim=1).square().sum() + (part * current.entropy).sum()

    value = forward.backward(batch, objective)
    assert seen == list(range(batch.num_rows))
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return value, gradients


@pytest.mark.parametrize("tokens", [1, 3, 5, 1000])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_number_of_tokens_at_a_time_changes_nothing(
    tokens: int,
    adapter: bool,
    tiny_model: Callable[..., Any],
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    if adapter:
        torch.manual_seed(0)
        settings = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, settings).double()
    weights = torch.linspace(-1, 1, batch.completion_mask.numel(), dtype=torch.float64).reshape(6, 5)
    value, gradients = gradient_of(model, batch, weights)
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", tokens * 24 * 8)
    with torch.no_grad():
        policy = CausalForward(model, Precision(torch.float64))
        torch.testing.assert_close(policy.logprobs(batch).logprobs, by_hand(model, batch)[0], rtol=1e-10, atol=1e-10)
    again, found = gradient_of(model, batch, weights)
    assert again == pytest.approx(value, rel=1e-12)
    assert len(found) == len(gradients) > 0
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_distributions_are_log_probs_of_every_token(tiny_model: Callable[..., Any], batch: Batch) -> None:
    forward = CausalForward(tiny_model(), Precision(torch.float64))
    current, table = forward.distributions(batch)
    mask = batch.completion_mask
    assert table.shape == (int(mask.sum()), 24)
    torch.testing.assert_close(table.exp().sum(dim=1), torch.ones(len(table), dtype=torch.float64))
    chosen = table.gather(1, batch.completion_ids[mask][:, None]).squeeze(1)
    torch.testing.assert_close(current.logprobs[mask], chosen, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chosen, by_hand(forward.model, batch)[0][mask], rtol=1e-10, atol=1e-12)


def test_runs_hold_whole_rows(batch: Batch) -> None:
    places = Places.of(batch)  # rows of 3, 1, 2, 5, 1 and 2 tokens
    runs = [(rows.start, rows.stop, tokens.start, tokens.stop) for rows, tokens in places.runs(4)]
    assert runs == [(0, 2, 0, 4), (2, 3, 4, 6), (3, 4, 6, 11), (4, 6, 11, 14)]
    part, needed = places.of_run(slice(2, 3), slice(4, 6))
    assert part.rows.tolist() == [0, 0] and needed.tolist() == [4, 5]


def test_a_batch_without_tokens(tiny_model: Callable[..., Any], make_rollouts: Callable[..., Rollouts]) -> None:
    empty = collate(make_rollouts([[5], [6]], [[[], []], [[], []]]), pad_token_id=0)
    with torch.no_grad():
        found = CausalForward(tiny_model(), Precision(torch.float64)).logprobs(empty)
    assert found.logprobs.shape == empty.completion_mask.shape and not found.logprobs.any()


def test_a_head_with_a_bias_is_recognized(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    model.lm_head = torch.nn.Linear(32, 24, bias=True, dtype=torch.float64)
    head = find_head(model, Precision(torch.float64))
    assert head is not None and head.layer.bias is not None


def test_a_wrapper_that_changes_the_logits_is_taken_whole(tiny_model: Callable[..., Any]) -> None:
    class Prefixed(torch.nn.Module):
        """Like an adapter that puts learned states before the prompt: the base model alone answers otherwise."""

        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base

        def get_base_model(self) -> Any:
            return self.base

        def forward(self, **inputs: Any) -> Any:
            output = self.base(**inputs)
            output.logits = output.logits.flip(-1)
            return output

    model = tiny_model()
    assert find_head(model, Precision(torch.float64)) is not None
    assert find_head(Prefixed(model), Precision(torch.float64)) is None


def test_under_autocast_the_head_computes_as_it_does_in_the_model(tiny_model: Callable[..., Any], batch: Batch) -> None:
    precision = Precision(torch.float32, autocast=torch.bfloat16)
    forward = CausalForward(tiny_model(0, torch.float32), precision)
    outputs = forward.outputs(batch, Places.of(batch))
    assert outputs.dtype == forward.head.raw_logits(outputs).dtype == precision.computed  # type: ignore[union-attr]
