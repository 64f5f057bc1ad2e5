"""Packed rows with shared prompts give the log-probs and gradients of padded rows, or are not used."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma2 import modeling_gemma2

from grpoforge import fused_trunk, shared_prefix
from grpoforge.assembly import share_prefix
from grpoforge.collate import collate
from grpoforge.errors import ModelError
from grpoforge.layers import build
from grpoforge.logprobs import CausalForward
from grpoforge.packing import CannotShare, Packed, PromptsOnce, num_plain_tokens
from grpoforge.policy import Policy, disable_dropout
from grpoforge.precision import Precision
from grpoforge.trie import Trie
from grpoforge.types import Batch, Rollouts, TokenLogprobs

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8}


def gpt2() -> Any:
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    # Small caps, so that they bend: the ones of Gemma 2 are 50 and 30.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_logit_softcapping=0.5, final_logit_softcapping=2.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gpt2": gpt2,
}


class WideNorm(torch.nn.Module):
    """RMSNorm in the dtype of its input: transformers' compute in float32, where 1e-10 has no meaning."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.shift = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.shift)


def make(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1).add_(0.05 * torch.randn_like(parameter))
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if "RMSNorm" in type(child).__name__:
                    setattr(module, name, WideNorm(child))
    return model.eval()


@pytest.fixture(autouse=True)
def wide_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's own attention takes its softmax in float32; the plain way is held to 1e-10 only with a wider one."""
    original = torch.nn.functional.softmax

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return original(scores, dim=dim, dtype=None if scores.dtype == torch.float64 else dtype)

    monkeypatch.setattr(modeling_gemma2.nn.functional, "softmax", softmax)


@pytest.fixture(params=["fused", "trie", "prompts once"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Packed]:
    """Every packing in turn is the first to be asked for, in every dtype; a trie through fused layers too."""
    first = PromptsOnce if request.param == "prompts once" else Trie
    monkeypatch.setattr(shared_prefix, "packings", lambda device, dtype: tuple(dict.fromkeys((first, PromptsOnce))))
    if request.param != "fused":
        monkeypatch.setattr(fused_trunk, "obstacle", lambda trunk, precision: "not in this test")
    return first


every_packing = pytest.mark.usefixtures("packing")


def ragged(make_rollouts: Callable[..., Rollouts], group: int, num_prompts: int = 3) -> Batch:
    """Prompts and completions of many lengths, an empty completion among them, at two temperatures."""
    draw = torch.Generator().manual_seed(group)

    def some(least: int, most: int) -> list[int]:
        size = int(torch.randint(least, most + 1, (1,), generator=draw))
        return torch.randint(2, 24, (size,), generator=draw).tolist()

    prompts = [some(1, 9) for _ in range(num_prompts)]
    completions = [[some(1, 7) for _ in range(group)] for _ in range(num_prompts)]
    if group > 2:
        completions[1][1] = []
    heat = [[(0.7, 1.3)[row % 2] for row in range(group)] for _ in range(num_prompts)]
    return collate(make_rollouts(prompts, completions, heat), pad_token_id=0)


def objective_of(batch: Batch) -> Callable[[slice, TokenLogprobs], Tensor]:
    weights = torch.linspace(-1, 1, batch.completion_mask.numel(), dtype=torch.float64).reshape(
        batch.completion_mask.shape
    )

    def objective(rows: slice, current: TokenLogprobs) -> Tensor:
        part = weights[rows].to(current.logprobs)
        return (part * current.logprobs.exp()).sum(dim=1).square().sum() + (part * current.entropy).sum()

    return objective


def gradients_of(model: Any) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return found


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), 1e-3)


TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def compare(model: Any, batch: Batch, dtype: torch.dtype, micro: int = 1000) -> shared_prefix.Way:
    """Log-probs, entropies and the gradient of every parameter, packed and plain; returns how it was packed."""
    tolerance = TOLERANCES[dtype]
    ways = {mode: CausalForward(model, Precision(dtype), mode) for mode in ("on", "off")}  # type: ignore[arg-type]
    with torch.no_grad():
        packed, plain = (ways[mode].logprobs(batch) for mode in ("on", "off"))
    assert bool((plain.logprobs != 0).any())
    close(packed.logprobs, plain.logprobs, tolerance)
    close(packed.entropy, plain.entropy, tolerance)
    objective = objective_of(batch)
    found: dict[str, tuple[float, list[Tensor]]] = {}
    for mode, forward in ways.items():
        value = 0.0
        for start in range(0, batch.num_rows, micro):
            rows = slice(start, min(start + micro, batch.num_rows))

            def on_rows(part: slice, current: TokenLogprobs, start: int = start) -> Tensor:
                return objective(slice(start + part.start, start + part.stop), current)

            value += forward.backward(batch.rows(rows), on_rows)
        found[mode] = value, gradients_of(model)
    assert found["on"][0] == pytest.approx(found["off"][0], rel=tolerance)
    # A gradient that is 0 in exact arithmetic (of a key's bias: softmax does not see it) is rounding both ways.
    largest = max(float(one.abs().max()) for one in found["off"][1])
    for one, other in zip(found["on"][1], found["off"][1], strict=True):
        assert float((one - other).abs().max()) <= tolerance * max(float(other.abs().max()), 1e-2 * largest)
    way = ways["on"].prefix.way
    assert way is not None
    return way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_log_probs_and_every_gradient_are_those_of_padded_rows(
    family: str,
    dtype: torch.dtype,
    packing: type[Packed],
    make_rollouts: Callable[..., Rollouts],
    request: pytest.FixtureRequest,
) -> None:
    found = compare(make(family, dtype), ragged(make_rollouts, 4), dtype)
    assert found.packing is (PromptsOnce if family == "gemma2" else packing), "the scores of Gemma 2 have a cap"
    has_kernels = family in ("llama", "qwen2", "qwen3") and dtype == torch.float32
    is_fused = has_kernels and request.node.callspec.params["packing"] == "fused"
    assert found.run is (fused_trunk.hidden_states if is_fused else shared_prefix._run)


@every_packing
@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
def test_groups_of_any_size(group: int, make_rollouts: Callable[..., Rollouts]) -> None:
    compare(make("qwen2", torch.float64), ragged(make_rollouts, group), torch.float64)


@every_packing
@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_may_hold_parts_of_groups(micro: int, make_rollouts: Callable[..., Rollouts]) -> None:
    compare(make("qwen2", torch.float64), ragged(make_rollouts, 4), torch.float64, micro)


@every_packing
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding_changes_nothing(side: Any, make_rollouts: Callable[..., Rollouts]) -> None:
    rollouts = make_rollouts([[5, 9, 3], [7]], [[[3, 8, 1], [14]], [[22, 6], [5, 7, 9, 11, 1]]])
    compare(make("llama", torch.float64), collate(rollouts, pad_token_id=0, padding_side=side, extra=2), torch.float64)


@every_packing
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_adapters_and_gradient_checkpointing(
    family: str, checkpointing: bool, make_rollouts: Callable[..., Rollouts]
) -> None:
    model = make(family, torch.float64)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, settings).double()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        disable_dropout(model)
        model.train()
    compare(model, ragged(make_rollouts, 4), torch.float64)


def test_layers_are_run_again_on_packed_rows_under_checkpointing(
    packing: type[Packed], make_rollouts: Callable[..., Rollouts]
) -> None:
    model = make("qwen2", torch.float64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    widths: list[int] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    batch = ragged(make_rollouts, 4)
    forward = CausalForward(model, Precision(torch.float64), "on")
    assert forward.prefix.obstacle() == ""
    widths.clear()
    forward.backward(batch, objective_of(batch))
    assert widths == [packing.of(batch).num_tokens] * 2
    assert model.config._attn_implementation == "sdpa", "the model is left as it was"


@every_packing
def test_distributions_and_their_gradient(make_rollouts: Callable[..., Rollouts]) -> None:
    model, batch = make("qwen2", torch.float64), ragged(make_rollouts, 4)
    found = []
    for mode in ("on", "off"):
        forward = CausalForward(model, Precision(torch.float64), mode)  # type: ignore[arg-type]
        with torch.no_grad():
            current, table = forward.distributions(batch)
        value = forward.backward_distributions(
            batch, lambda now, whole: now.logprobs.sum() + (whole.exp() * whole.square()).sum()
        )
        found.append(([current.logprobs, table, torch.tensor(value)], gradients_of(model)))
    for one, other in zip(*(values + gradients for values, gradients in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_rows_of_one_token_need_no_completion_in_the_trunk(
    packing: type[Packed], make_rollouts: Callable[..., Rollouts]
) -> None:
    batch = collate(make_rollouts([[5, 9, 3], [7]], [[[3], [4]], [[5], [6]]]), pad_token_id=0)
    assert packing.of(batch).input_ids.tolist() == [[5, 9, 3, 7]]
    compare(make("qwen2", torch.float64), batch, torch.float64)


def test_packing_by_hand(make_rollouts: Callable[..., Rollouts]) -> None:
    """Two prompts; the last token of a completion predicts nothing and stays out."""
    rollouts = make_rollouts([[5, 9, 3], [7]], [[[3, 8, 1], [14]], [[22, 6], [5, 7, 9, 1]]])
    batch = collate(rollouts, pad_token_id=0)
    packed = PromptsOnce.of(batch)
    assert packed.input_ids.tolist() == [[5, 9, 3, 7, 3, 8, 22, 5, 7, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 3, 4, 1, 1, 2, 3]]
    # Row by row: 3 8 1 | 14 | 22 6 | 5 7 9 1
    assert packed.predicted_at.tolist() == [2, 4, 5, 2, 3, 6, 3, 7, 8, 9]
    assert packed.longest == 5
    assert packed.num_tokens == 10 and num_plain_tokens(batch) == 4 * (3 + 4)


def test_equal_prompts_of_neighboring_groups_are_one(make_rollouts: Callable[..., Rollouts]) -> None:
    batch = collate(make_rollouts([[5, 9], [5, 9], [9]], [[[3, 1], [4]]] * 3), pad_token_id=0)
    assert PromptsOnce.of(batch).levels.prompts.rows == 2
    compare(make("qwen2", torch.float64), batch, torch.float64)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_that_of_the_whole_mask(softcap: float | None, make_rollouts: Callable[..., Rollouts]) -> None:
    """Against softmax over the mask that is never made."""
    packed = PromptsOnce.of(ragged(make_rollouts, 4))
    num_tokens, levels, num_prompt = packed.num_tokens, packed.levels, packed.levels.num_prompt_tokens
    group, row = torch.zeros(num_tokens, dtype=torch.long), torch.full((num_tokens,), -1)
    group[:num_prompt] = levels.prompts.cells // levels.prompts.width
    group[num_prompt:] = levels.asking.cells // levels.asking.width
    row[num_prompt:] = levels.completions.cells // levels.completions.width
    place = torch.arange(num_tokens)
    sees = (group[:, None] == group) & (place[:, None] >= place) & ((row == -1) | (row[:, None] == row))
    torch.manual_seed(0)
    query = torch.randn(num_tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, num_tokens, 2, 8, dtype=torch.float64).requires_grad_().unbind()
    scores = torch.einsum("ihd,jhd->hij", query, key.repeat_interleave(2, 1)) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=2)
    expected = torch.einsum("hij,jhd->ihd", weights, value.repeat_interleave(2, 1))
    found = packed.attend(query, key, value, scale=0.3, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [query, key, value], upstream, retain_graph=True)
    for one, other in zip(torch.autograd.grad(found, [query, key, value], upstream), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every_packing
def test_a_sliding_window_is_taken_packed_only_where_it_hides_nothing(
    make_rollouts: Callable[..., Rollouts], caplog: pytest.LogCaptureFixture
) -> None:
    """A window of 10: rows of 9 trunk tokens are packed, rows of 13 are not, and both are right."""
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=10, max_window_layers=1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).double().eval()
    forward = CausalForward(model, Precision(torch.float64))
    plain = CausalForward(model, Precision(torch.float64), "off")
    assert forward.prefix.obstacle() == ""
    caplog.set_level(logging.INFO, logger="grpoforge.shared_prefix")
    for completion, is_packed in ((4, True), (8, False), (8, False)):
        batch = collate(
            make_rollouts([[5, 9, 3, 7, 8, 2]], [[list(range(3, 3 + completion))] * 3], max_completion_length=9),
            pad_token_id=0,
        )
        with torch.no_grad(), contextlib.ExitStack() as held:
            assert (forward.prefix.hidden(batch, held) is not None) == is_packed
        with torch.no_grad():
            close(forward.logprobs(batch).logprobs, plain.logprobs(batch).logprobs, 1e-6)
    assert len([one for one in caplog.records if "sliding window" in one.message]) == 1
    assert model.config._attn_implementation == "sdpa"


class Foreign(torch.nn.Module):
    """A trunk whose layers do what no packed attention knows: each token is mixed with the one before it."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.config = trunk.config

    def get_input_embeddings(self) -> Any:
        return self.trunk.get_input_embeddings()

    def forward(self, **given: Any) -> Any:
        output = self.trunk(**given)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.roll(1, dims=1)
        return output


@every_packing
def test_a_model_that_cannot_be_packed_takes_the_plain_way_and_says_so(
    make_rollouts: Callable[..., Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make("qwen2", torch.float64), ragged(make_rollouts, 4)
    inner = model.model
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self.foreign if hasattr(self, "foreign") else inner)
    monkeypatch.setattr(type(model), "base_model_prefix", "foreign")
    model.foreign = Foreign(inner)
    original = type(model).forward

    def whole(self: Any, **given: Any) -> Any:
        output = original(self, **{name: one for name, one in given.items() if name != "logits_to_keep"})
        hidden = self.foreign(**{name: one for name, one in given.items() if name != "logits_to_keep"})
        output.logits = self.lm_head(hidden.last_hidden_state)
        return output

    monkeypatch.setattr(type(model), "forward", whole)
    forward = CausalForward(model, Precision(torch.float64))
    assert forward.head is not None and isinstance(forward.head.trunk, Foreign)
    assert "packed rows give other hidden states" in forward.prefix.obstacle()
    plain = CausalForward(model, Precision(torch.float64), "off")
    with torch.no_grad():
        assert torch.equal(forward.logprobs(batch).logprobs, plain.logprobs(batch).logprobs)
    with pytest.raises(ModelError, match="is `on`, and this model cannot be run on packed rows") as failure:
        CausalForward(model, Precision(torch.float64), "on").backward(batch, objective_of(batch))
    assert "batch.shared_prefix=auto" in failure.value.hint


@every_packing
def test_it_is_used_only_where_it_saves_work(make_rollouts: Callable[..., Rollouts]) -> None:
    model = make("qwen2", torch.float64)
    auto = CausalForward(model, Precision(torch.float64)).prefix
    always = CausalForward(model, Precision(torch.float64), "on").prefix
    never = CausalForward(model, Precision(torch.float64), "off").prefix
    alone = collate(make_rollouts([[5, 9, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]], [[[3, 8]]]), pad_token_id=0)
    group = collate(make_rollouts([[5, 9, 3]], [[[3, 8], [4, 4], [5, 1]]]), pad_token_id=0)
    packed = []
    with torch.no_grad():
        for batch in (alone, group):
            for prefix in (auto, always, never):
                with contextlib.ExitStack() as held:
                    packed.append(prefix.hidden(batch, held) is not None)
    assert packed == [False, True, False, True, True, False]


@every_packing
def test_under_autocast(make_rollouts: Callable[..., Rollouts]) -> None:
    model, batch = make("qwen3", torch.float32), ragged(make_rollouts, 4)
    precision = Precision(torch.float32, autocast=torch.bfloat16)
    with torch.no_grad():
        packed, plain = (CausalForward(model, precision, mode).logprobs(batch).logprobs for mode in ("on", "off"))  # type: ignore[arg-type]
        exact = CausalForward(model, Precision(torch.float32), "off").logprobs(batch).logprobs
    gap = float((plain - exact).abs().max())
    assert gap > 0 and float((packed - exact).abs().max()) <= 2 * gap


def test_a_run_notes_why_it_does_not_share_or_refuses_to_start(
    tiny_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(trunk: Any, precision: Precision, way: shared_prefix.Way) -> None:
        raise CannotShare("its attention is not plain: s_aux")

    policy = tiny_policy()
    share_prefix(build([("a.yaml", {})]), policy)
    assert policy.notes == ()
    monkeypatch.setattr(shared_prefix, "_probe", probe)
    share_prefix(build([("a.yaml", {"batch": {"shared_prefix": "off"}})]), policy)
    assert policy.notes == ()
    share_prefix(build([("a.yaml", {})]), policy)
    assert policy.notes == ("every prompt is computed once per completion: its attention is not plain: s_aux",)
    with pytest.raises(ModelError) as failure:
        share_prefix(build([("a.yaml", {"batch": {"shared_prefix": "on"}})]), policy)
    assert failure.value.message == (
        "`batch.shared_prefix` is `on`, and this model cannot be run on packed rows: its attention is not plain: s_aux"
    )
    assert "batch.shared_prefix=auto" in failure.value.hint
    assert policy.freeze().forward.prefix.mode == "on"


@every_packing
def test_an_argument_that_attention_does_not_know_is_refused(make_rollouts: Callable[..., Rollouts]) -> None:
    """As the sinks of gpt-oss: another way to attend, handed over by name."""
    model, batch = make("qwen2", torch.float64), ragged(make_rollouts, 4)
    inner = model.model.layers[1].self_attn
    original = inner.forward
    inner.forward = lambda *given, **named: original(*given, **named, s_aux=torch.zeros(4))
    forward = CausalForward(model, Precision(torch.float64))
    assert forward.prefix.obstacle() == "its attention is not plain: s_aux"
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        plain = CausalForward(model, Precision(torch.float64), "off").logprobs(batch).logprobs
        assert torch.equal(forward.logprobs(batch).logprobs, plain)


def test_off_the_cpu_it_is_not_used_where_scores_would_be_many(
    make_rollouts: Callable[..., Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of three: prompts of 4 and 2 tokens, completions of at most 5."""
    rollouts = make_rollouts([[2, 3, 4, 5], [6, 7]], [[[8] * 5, [9], [10] * 2], [[11], [12], [13]]])
    batch = collate(rollouts, pad_token_id=0)
    # Own 6 x 5 x 5, asked 6 x 5 x 4, prompts 2 x 4 x 4; 7 heads of float32.
    assert shared_prefix.scores_bytes(batch, 7) == 4 * 7 * 150
    trunk = make("qwen2", torch.float32).model
    sharing = shared_prefix.SharedPrefix(trunk, Precision(torch.float32), "auto")
    assert sharing._fits(batch)
    elsewhere = batch.to(torch.device("meta"))
    heads = trunk.config.num_attention_heads
    monkeypatch.setattr(shared_prefix, "scores_bytes", lambda asked, asked_heads: {heads: 2**28}[asked_heads])
    assert sharing._fits(elsewhere)
    monkeypatch.setattr(shared_prefix, "scores_bytes", lambda *_: 2**28 + 1)
    assert not sharing._fits(elsewhere)
