"""Models of many architectures, adapters and dtypes under the sampler `native`, against transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from grpoforge.config import ModelConfig
from grpoforge.plugins import load_plugins
from grpoforge.policy import Policy
from grpoforge.precision import Precision
from grpoforge.types import Prompt
from grpoforge_kernels import decode as kernel
from grpoforge_plugins.samplers import decoders
from grpoforge_plugins.samplers.hf import HFSampler
from grpoforge_plugins.samplers.native import NativeSampler

ROOT = Path(__file__).parents[2]
COMPILED = kernel.obstacle() is None
FIRST = "cpp" if COMPILED else "torch"
PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6], [2, 3] * 9, list(range(2, 24)) * 2]
SMALL = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, FIRST),
    "llama with biases, tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        FIRST,
    ),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}, FIRST),
    "linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
        FIRST,
    ),
    "dynamic rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
        "torch",
    ),
    "one head": ("Llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 34}, FIRST),
    "seven heads on one": ("Qwen2", {"num_attention_heads": 7, "num_key_value_heads": 1}, FIRST),
    "qwen2": ("Qwen2", {}, FIRST),
    "qwen3": ("Qwen3", {"head_dim": 16}, FIRST),
    "a sliding window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "torch"),
    "another activation": ("Llama", {"hidden_act": "gelu"}, "torch"),
    "gemma": ("Gemma", {}, "torch"),
    "gemma2": ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}, "torch"),
    "gemma3": ("Gemma3Text", {"sliding_window": 8, "query_pre_attn_scalar": 8}, "torch"),
    "gpt2": ("GPT2", {}, "torch"),
    "mixture": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "torch"),
}
"""The architecture, what its configuration has beside `SMALL`, and the decoder that should run it."""


def config_of(architecture: str, more: dict[str, Any]) -> Any:
    if architecture == "GPT2":
        return transformers.GPT2Config(
            vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=96, bos_token_id=None, eos_token_id=1,
            pad_token_id=0,
        )  # fmt: skip
    return getattr(transformers, f"{architecture}Config")(**{**SMALL, **more})


def model_of(architecture: str, more: dict[str, Any]) -> Any:
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(
        architecture, f"{architecture}ForCausalLM"
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config_of(architecture, more))
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 2.0 if parameter.ndim > 1 else 1.0
            parameter.add_(torch.randn_like(parameter) * wide / max(parameter.shape[-1], 16) ** 0.5)
    return model.eval()


@pytest.fixture
def policy_of(tiny_policy: Callable[..., Policy]) -> Callable[..., Policy]:
    tokenizer = tiny_policy(dtype=torch.float32).tokenizer

    def make(name: str, precision: Precision | None = None) -> Policy:
        architecture, more, _ = MODELS[name]
        return Policy(model_of(architecture, more), tokenizer, precision or Precision(torch.float32))

    return make


@pytest.fixture
def prompts(make_prompts: Callable[..., tuple[Prompt, ...]]) -> tuple[Prompt, ...]:
    return make_prompts(PROMPTS)


def check_against_generate(policy: Policy, prompts: tuple[Prompt, ...], decoder: Any = "auto") -> None:
    """The greedy tokens are those of `generate`; sampled log-probs are those of one forward pass without a cache."""
    options = {"max_completion_length": 20, "decoder": decoder}
    ours = NativeSampler(**options, batch_size=3).greedy(policy, prompts).flat()
    theirs = HFSampler(max_completion_length=20).greedy(policy, prompts).flat()
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    rollouts = NativeSampler(**options, batch_size=4).sample(policy, prompts, 3, seed=1)
    for prompt, one in zip(rollouts.flat_prompts(), rollouts.flat(), strict=True):
        ids = torch.tensor([[*prompt.token_ids, *one.token_ids]])
        with torch.no_grad():
            logits = policy.model(ids, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
        own = logits.log_softmax(dim=1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]
        assert one.logprobs == pytest.approx(own.tolist(), abs=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name: str, policy_of: Callable[..., Policy], prompts: tuple[Prompt, ...]) -> None:
    policy = policy_of(name)
    assert decoders.choose(policy, "auto").name == MODELS[name][2]
    check_against_generate(policy, prompts)


@pytest.mark.parametrize("decoder", decoders.DECODERS if COMPILED else ["torch"])
def test_lora_adapters_are_merged(decoder: str, policy_of: Callable[..., Policy], prompts: tuple[Prompt, ...]) -> None:
    from peft import LoraConfig, get_peft_model

    policy = policy_of("qwen2")
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(policy.model, adapter)
    policy = Policy(model, policy.tokenizer, policy.precision)
    plain = NativeSampler(max_completion_length=20, decoder=decoder)  # type: ignore[arg-type]
    check_against_generate(policy, prompts, decoder)
    with_adapter = plain.greedy(policy, prompts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert plain.greedy(policy, prompts) != with_adapter
    check_against_generate(policy, prompts, decoder)


def test_bfloat16_is_the_torch_decoders(policy_of: Callable[..., Policy], prompts: tuple[Prompt, ...]) -> None:
    policy = policy_of("qwen2", Precision(torch.float32, autocast=torch.bfloat16))
    assert decoders.choose(policy, "auto").name == "torch"
    rollouts = NativeSampler(max_completion_length=6).sample(policy, prompts, 2, seed=0)
    for prompt, one in zip(rollouts.flat_prompts(), rollouts.flat(), strict=True):
        ids = torch.tensor([[*prompt.token_ids, *one.token_ids]])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = policy.model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
        own = logits.log_softmax(dim=1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]
        assert one.logprobs == pytest.approx(own.tolist(), abs=0.2)


@pytest.fixture(scope="module")
def shared() -> Path:
    """The folder with the models and the data that no package may carry."""
    folder = Path(os.environ.get("GRPOFORGE_SHARED", ROOT.parent / "shared"))
    assert (folder / "models/stories260K").is_dir(), f"{folder} has no models/stories260K; set GRPOFORGE_SHARED"
    assert (folder / "data/gsm8k/train.jsonl").is_file(), f"{folder} has no data/gsm8k; set GRPOFORGE_SHARED"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("decoder", decoders.DECODERS if COMPILED else ["torch"])
@pytest.mark.parametrize("model", ["tiny-math", "stories260K"])
def test_200_greedy_completions_are_those_of_generate(decoder: Any, model: str, shared: Path) -> None:
    name = model if model == "tiny-math" else str(shared / "models" / model)
    policy = load_plugins([]).hook.load_policy(model=ModelConfig(name=name, precision="fp32"))
    lines = (shared / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [json.loads(line)["question"][:60] for line in lines]
    prompts = [
        Prompt(text=text, token_ids=tuple(policy.tokenizer(text)["input_ids"]), columns={}, index=index)
        for index, text in enumerate(texts)
    ]
    ours = NativeSampler(max_completion_length=32, batch_size=48, decoder=decoder).greedy(policy, prompts).flat()
    theirs = HFSampler(max_completion_length=32).greedy(policy, prompts).flat()
    different = [row for row in range(200) if ours[row].token_ids != theirs[row].token_ids]
    assert not different
    gaps = [abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x.logprobs, y.logprobs)]
    assert sorted(gaps)[len(gaps) // 2] < 2e-6


@pytest.mark.slow
def test_memory_stays_flat(policy_of: Callable[..., Policy], prompts: tuple[Prompt, ...]) -> None:
    """50 steps of sampling and new weights, after 10 that warm up: less than 8 MB more at the end."""

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    policy, sampler = policy_of("qwen2"), NativeSampler(max_completion_length=40)
    sizes = []
    for step in range(60):
        sampler.sample(policy, prompts, 32, seed=step)
        with torch.no_grad():
            policy.model.lm_head.weight.mul_(1.001)
        policy.version += 1
        sizes.append(resident())
    assert sizes[-1] - sizes[9] < 8


@pytest.mark.slow
def test_without_a_compiler_the_same_is_drawn(tmp_path: Path, policy_of: Callable[..., Policy]) -> None:
    import subprocess
    import sys

    script = (
        "import sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(1)\n"
        "from conftest import make_prompts, tiny_policy\n"
        "from grpoforge_plugins.samplers.native import NativeSampler\n"
        "policy = tiny_policy(dtype=torch.float32)\n"
        "drawn = NativeSampler(max_completion_length=12).sample(policy, make_prompts([[5, 9, 3], [7]]), 8, seed=3)\n"
        "print([one.token_ids for one in drawn.flat()])\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ("GRPOFORGE_KERNELS", "CXX")}
    printed = []
    for environment in ({}, {"PATH": "/nowhere", "GRPOFORGE_CACHE": str(tmp_path)}):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            env={**inherited, **environment}, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        assert done.stderr.count("need a compiler") == (1 if environment else 0), done.stderr
    assert printed[0] == printed[1]
