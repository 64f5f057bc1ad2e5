"""Log-probs of a policy, its reference, its adapter, and what it writes to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpoforge.collate import collate
from grpoforge.engine import Engine
from grpoforge.errors import CheckpointError
from grpoforge.metrics import Meter
from grpoforge.objective import Frozen
from grpoforge.policy import Policy, disable_dropout, inference_mode
from grpoforge.precision import Precision
from grpoforge.types import Batch, Rollouts


@pytest.fixture
def batch(make_rollouts: Callable[..., Rollouts]) -> Batch:
    rollouts = make_rollouts([[5, 9, 3], [7]], [[[3, 8, 1], [14]], [[22, 6], [5, 1]]], [[0.7, 1.3], [1.3, 0.7]])
    return collate(rollouts, pad_token_id=0)


@pytest.fixture
def adapted(tiny_policy: Callable[..., Policy]) -> Policy:
    """A policy of which only a LoRA adapter is trained."""
    base = tiny_policy()
    settings = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return Policy(get_peft_model(base.model, settings).double(), base.tokenizer, base.precision)


def test_logprobs_and_entropy_are_those_of_each_row_alone(tiny_policy: Callable[..., Policy], batch: Batch) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        found = policy.logprobs(batch)
        for row in range(batch.num_rows):
            prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
            completion = batch.completion_ids[row][batch.completion_mask[row]]
            logits = policy.model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            table = (logits / batch.temperatures[row]).log_softmax(dim=1)
            size = len(completion)
            expected = table.gather(1, completion[:, None]).squeeze(1)
            torch.testing.assert_close(found.logprobs[row, :size], expected, rtol=0, atol=1e-13)
            torch.testing.assert_close(found.entropy[row, :size], -(table.exp() * table).sum(dim=1), rtol=0, atol=1e-13)
            assert not found.logprobs[row, size:].any() and not found.entropy[row, size:].any()


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_frozen_logprobs_are_the_same_without_gradient(
    micro: int, tiny_policy: Callable[..., Policy], batch: Batch
) -> None:
    policy = tiny_policy()
    frozen = policy.frozen_logprobs(batch, micro).logprobs
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, policy.logprobs(batch).logprobs.detach(), rtol=0, atol=1e-13)


def test_the_reference_does_not_move_with_the_policy(tiny_policy: Callable[..., Policy], batch: Batch) -> None:
    policy = tiny_policy()
    reference = policy.freeze()
    before = policy.frozen_logprobs(batch, 4).logprobs
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.mul_(1.1)
    assert reference.logprobs(batch).logprobs.equal(before)
    assert not policy.frozen_logprobs(batch, 4).logprobs.allclose(before)
    assert not reference.logprobs(batch).logprobs.requires_grad


def test_an_adapter_starts_at_its_base_which_is_the_reference(
    adapted: Policy, tiny_policy: Callable[..., Policy], batch: Batch
) -> None:
    base = tiny_policy().frozen_logprobs(batch, 4).logprobs
    assert adapted.frozen_logprobs(batch, 4).logprobs.equal(base)
    reference = adapted.freeze()
    with torch.no_grad():
        for parameter in adapted.trainable():
            parameter.add_(0.05)
    assert reference.logprobs(batch).logprobs.equal(base)
    assert not adapted.frozen_logprobs(batch, 4).logprobs.allclose(base)


def test_only_the_adapter_is_trained(
    adapted: Policy, make_engine: Callable[..., Engine], make_frozen: Callable[..., Frozen], batch: Batch
) -> None:
    names = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)
    before = {name: parameter.detach().clone() for name, parameter in adapted.model.named_parameters()}
    engine = make_engine(adapted, learning_rate=1.0, reference=adapted.freeze(), beta=0.1)
    old, reference = engine.freeze(batch, Meter())
    engine.update(batch, make_frozen(old.logprobs, reference, torch.tensor([[1.0, -1.0], [0.5, -0.5]])), 8, Meter())
    moved = {name for name, parameter in adapted.model.named_parameters() if not parameter.equal(before[name])}
    # At its start B is 0, so A has no gradient: the first step moves B alone.
    assert moved == {name for name in names if "lora_B" in name}
    assert adapted.version == 1


def test_an_adapter_comes_back_from_disk(
    adapted: Policy, tiny_policy: Callable[..., Policy], batch: Batch, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in adapted.trainable():
            parameter.add_(0.05)
    adapted.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    saved = adapted.frozen_logprobs(batch, 4).logprobs
    with torch.no_grad():
        for parameter in adapted.trainable():
            parameter.zero_()
    adapted.load_weights(tmp_path)
    assert adapted.frozen_logprobs(batch, 4).logprobs.equal(saved)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        tiny_policy().load_weights(tmp_path)


def test_weights_come_back_from_disk(tiny_policy: Callable[..., Policy], batch: Batch, tmp_path: Path) -> None:
    policy, other = tiny_policy(0), tiny_policy(1)
    policy.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    other.load_weights(tmp_path)
    assert other.frozen_logprobs(batch, 4).logprobs.equal(policy.frozen_logprobs(batch, 4).logprobs)


def test_the_experts_of_a_mixture_come_back_from_disk(tiny_policy: Callable[..., Policy], tmp_path: Path) -> None:
    settings = Qwen3MoeConfig(
        vocab_size=24,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    tokenizer, precision = tiny_policy().tokenizer, Precision(torch.float32)
    saved, other = (Policy(Qwen3MoeForCausalLM(settings), tokenizer, precision) for _ in range(2))
    saved.save(tmp_path)
    # On disk each expert stands alone, in memory they are one tensor.
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.down_proj" in other.model.state_dict()
    other.load_weights(tmp_path)
    for name, tensor in saved.model.state_dict().items():
        assert tensor.equal(other.model.state_dict()[name]), name


def test_weights_of_another_size_are_refused(tiny_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = tiny_policy()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    other = copy.deepcopy(policy.model.config)
    other.intermediate_size = 40
    Policy(type(policy.model)(other), policy.tokenizer, policy.precision).save(tmp_path)
    with pytest.raises(CheckpointError) as failure:
        policy.load_weights(tmp_path)
    assert failure.value.message == (
        f"the weights in {tmp_path} do not fit the model: mismatched ['model.layers.0.mlp.down_proj.weight', "
        "'model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight']"
    )
    assert all(tensor.equal(before[name]) for name, tensor in policy.model.state_dict().items())


def test_weights_of_another_model_are_refused(
    adapted: Policy, tiny_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    tiny_policy().save(tmp_path)
    with pytest.raises(CheckpointError) as failure:
        adapted.load_weights(tmp_path)
    assert failure.value.message.startswith(f"the weights in {tmp_path} do not fit the model: missing [")
    assert failure.value.hint == "resume with the model and the LoRA settings that the run was started with"


def test_every_token_that_ends_a_completion(tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy()
    assert policy.eos_token_ids() == {1}
    policy.model.generation_config.eos_token_id = [4, 9]
    assert policy.eos_token_ids() == {1, 4, 9}
    policy.model.generation_config.eos_token_id = None
    assert policy.eos_token_ids() == {1}


def test_dropout_is_off_also_in_training_mode(tiny_policy: Callable[..., Policy], batch: Batch) -> None:
    model = tiny_policy().model
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[0].mlp.extra = torch.nn.Dropout(0.5)
    disable_dropout(model)
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.model.layers[0].mlp.extra.p == 0.0
    policy = Policy(model.train(), SimpleNamespace(eos_token_id=1), Precision(torch.float64))
    assert policy.frozen_logprobs(batch, 4).logprobs.equal(policy.frozen_logprobs(batch, 4).logprobs)


def test_dropout_held_as_numbers_is_off_too() -> None:
    settings = OPTConfig(
        vocab_size=24,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(settings).train()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert not all(model(ids).logits.equal(expected) for _ in range(5))
        disable_dropout(model)
        expected = model(ids).logits
        assert all(model(ids).logits.equal(expected) for _ in range(5))


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode_restores_the_mode(training: bool, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model().train(training)

    def fail_inside() -> None:
        with inference_mode(model):
            assert not model.training and not torch.is_grad_enabled()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_inside()
    assert model.training is training and torch.is_grad_enabled()


def test_facts_about_the_model(tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy()
    # Embedding and head 2 x 24 x 32; per layer q and its bias 32 x 32 + 32, k and v 2 (16 x 32 + 16), o 32 x 32,
    # mlp 3 x 32 x 48, norms 2 x 32; last norm 32.
    layer = 32 * 32 + 32 + 2 * (16 * 32 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert policy.num_parameters == 2 * 24 * 32 + 2 * layer + 32
    assert policy.context_length == 64
    assert policy.device == torch.device("cpu")


def test_precision_casts_the_forward_pass_only() -> None:
    with Precision(torch.float32).context(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with Precision(torch.float32, autocast=torch.bfloat16).context(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_logprobs_are_float32_under_autocast(tiny_model: Callable[..., Any], batch: Batch) -> None:
    precision = Precision(torch.float32, autocast=torch.bfloat16)
    policy = Policy(tiny_model(0, torch.float32), SimpleNamespace(eos_token_id=1), precision)
    exact = Policy(policy.model, policy.tokenizer, Precision(torch.float32)).frozen_logprobs(batch, 4).logprobs
    found = policy.logprobs(batch)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    assert 0 < float((found.logprobs - exact).detach().abs().max()) < 0.2


def test_gradients_reach_every_weight(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_frozen: Callable[..., Frozen],
    batch: Batch,
) -> None:
    policy = tiny_policy()
    old = policy.frozen_logprobs(batch, 4).logprobs
    make_engine(policy).accumulate(batch, make_frozen(old, old, torch.tensor([[1.0, -1.0], [0.5, -0.5]])), 8, Meter())
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in policy.trainable())
