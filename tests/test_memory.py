"""The memory of a run before it starts: exact where it can be, by hand where it is a formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch

from grpoforge.config import BatchConfig, Config, DataConfig, EvalConfig, KLPart, LoRAConfig, ModelConfig
from grpoforge.memory import RESERVE, describe, estimate
from grpoforge.policy import PolicySize
from grpoforge_plugins.policies import huggingface
from grpoforge_plugins.policies.size import policy_size
from grpoforge_plugins.tiny_math import MODEL_DIR

SIZE = PolicySize(
    num_parameters=1000,
    num_trainable=10,
    weight_bytes=2000,
    trainable_bytes=40,
    autocast_bytes=0,
    has_adapter=False,
    num_layers=4,
    vocab_size=100,
    context_length=64,
    hidden_bytes_per_token=8,
    saved_bytes_per_token=400,
    cache_bytes_per_token=16,
)


def config(**sections: object) -> Config:
    return Config(
        data=DataConfig(max_prompt_length=30),
        batch=BatchConfig(prompts_per_step=4, completions_per_prompt=2, micro_batch_size=2),
        eval=EvalConfig(batch_size=6),
        **sections,  # type: ignore[arg-type]
    )


def test_the_parts_by_hand() -> None:
    found = estimate(config(kl=KLPart(name="k3", beta=0.1)), SIZE, max_completion_length=20, rows_at_a_time=4)
    assert [(usage.name, usage.num_bytes) for usage in found.held] == [
        ("weights", 2000),
        ("reference", 2000),
        ("gradients", 40),
        ("optimizer", 80),
    ]
    # 2 rows x (30 + 20) tokens; logits and their gradient of 2 x 20 tokens. 6 rows of the evaluation decode at a time.
    assert [usage.num_bytes for usage in found.phases] == [400 * 100 + 2 * 40 * 100 * 4, 16 * 6 * 50 + 3 * 6 * 100 * 4]
    assert found.total == int((2000 + 2000 + 40 + 80 + 72_000) * (1 + RESERVE))


def test_gradient_checkpointing_keeps_inputs_and_makes_one_layer_again() -> None:
    found = estimate(config(model=ModelConfig(gradient_checkpointing=True)), SIZE, 20, None)
    assert found.phases[0].num_bytes == 4 * 8 * 100 + 400 * 100 // 4 + 2 * 40 * 100 * 4


def test_no_reference_with_an_adapter_or_without_a_kl_term() -> None:
    adapted = dataclasses.replace(SIZE, has_adapter=True)
    with_kl, without = config(kl=KLPart(name="k3", beta=0.1)), config(kl=KLPart(name="k3", beta=0.0))
    for found in (estimate(with_kl, adapted, 20, None), estimate(without, SIZE, 20, None)):
        assert found.held[1].num_bytes == 0
        assert found.held[1].how.startswith("none: ")


def test_a_row_is_no_longer_than_the_context() -> None:
    found = estimate(config(), SIZE, max_completion_length=60, rows_at_a_time=None)
    assert "2 x 64 tokens" in found.phases[0].how


def test_what_is_unknown_is_said() -> None:
    sampler = SimpleNamespace(max_completion_length=20)
    assert describe(config(), None, sampler) == ["not estimated: the configuration of tiny-math is not on this machine"]
    assert describe(config(), SIZE, object()) == [
        "not estimated: sampler `native` does not say how long its completions may be"
    ]


def test_sizes_are_those_of_the_policy_that_is_then_loaded() -> None:
    for lora in (None, LoRAConfig(r=4)):
        model = ModelConfig(name=str(MODEL_DIR), precision="bf16", lora=lora)
        size, policy = policy_size(model), huggingface.load(model)
        assert size is not None
        trainable = policy.trainable()
        assert size.num_parameters == policy.num_parameters
        assert size.num_trainable == sum(parameter.numel() for parameter in trainable)
        assert size.trainable_bytes == sum(parameter.numel() * parameter.element_size() for parameter in trainable)
        assert size.weight_bytes == sum(p.numel() * p.element_size() for p in policy.model.parameters())
        assert size.context_length == policy.context_length


def test_activations_are_those_that_a_forward_pass_keeps() -> None:
    model = ModelConfig(name=str(MODEL_DIR), precision="fp32")
    size, policy = policy_size(model), huggingface.load(model)
    assert size is not None
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros((3, 50), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.forward.head.trunk(input_ids=ids, use_cache=False)  # type: ignore[union-attr]
    measured = sum(storage.nbytes() for storage in saved.values()) / ids.numel()
    assert abs(size.saved_bytes_per_token / measured - 1) < 0.1


def test_the_published_sizes_of_the_recipes_models() -> None:
    expected = {"Qwen/Qwen2.5-3B-Instruct": 3_085_938_688, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768}
    for name, num_parameters in expected.items():
        size = policy_size(ModelConfig(name=name))
        assert size is not None and size.num_parameters == num_parameters
    assert policy_size(ModelConfig(name="nobody/nothing")) is None


def test_a_folder_that_is_no_causal_model_has_no_size(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    assert policy_size(ModelConfig(name=str(tmp_path))) is None
