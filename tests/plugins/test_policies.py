"""Loading a policy from a folder: what is accepted, what is refused, and how its numbers are held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from grpoforge.collate import collate
from grpoforge.config import LoRAConfig, ModelConfig
from grpoforge.engine import Engine
from grpoforge.errors import ModelError
from grpoforge.metrics import Meter
from grpoforge.objective import Frozen
from grpoforge.policy import Policy
from grpoforge.precision import Precision
from grpoforge.types import Batch, Prompt, Rollouts
from grpoforge_plugins.policies.huggingface import choose_precision, load, load_tokenizer
from grpoforge_plugins.samplers.hf import HFSampler

CPU = torch.device("cpu")
DAMAGED = "save or download the folder again: it needs config.json, *.safetensors and a tokenizer"


def tokenizer(words: Sequence[str], **special: str) -> Any:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=words[0], **special)


WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuv"]


@pytest.fixture(scope="module")
def saved(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(0, torch.float32).save_pretrained(folder)
    tokenizer(WORDS, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def batch(make_rollouts: Callable[..., Rollouts]) -> Batch:
    rollouts = make_rollouts([[5, 9, 3], [7]], [[[3, 8, 1], [14]], [[22, 6], [5, 1]]], [[0.7, 1.3], [1.3, 0.7]])
    return collate(rollouts, pad_token_id=0)


def test_a_saved_model_gives_the_same_logprobs(saved: Path, tiny_policy: Callable[..., Policy], batch: Batch) -> None:
    policy = load(ModelConfig(name=str(saved)))
    assert policy.precision == Precision(torch.float32)
    assert policy.frozen_logprobs(batch, 4).logprobs.equal(
        tiny_policy(dtype=torch.float32).frozen_logprobs(batch, 4).logprobs
    )
    assert policy.eos_token_ids() == {1} and policy.tokenizer.pad_token_id == 0
    assert policy.notes == ("the tokenizer has no chat template: a plain prompt template is used",)
    assert len(policy.trainable()) == len(list(policy.model.parameters()))


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path: Path) -> None:
    tokenizer(WORDS, eos_token="<eos>").save_pretrained(tmp_path)
    loaded, notes = load_tokenizer(str(tmp_path), None)
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    assert notes[0] == "the tokenizer has no pad token: EOS is used (masks come from lengths)"


@pytest.mark.parametrize(
    ("precision", "lora", "expected"),
    [
        ("auto", None, Precision(torch.float32)),
        ("fp32", None, Precision(torch.float32)),
        ("bf16", None, Precision(torch.float32, autocast=torch.bfloat16)),
        ("bf16", LoRAConfig(), Precision(torch.bfloat16, autocast=torch.bfloat16)),
    ],
)
def test_precision_on_the_cpu(precision: Any, lora: LoRAConfig | None, expected: Precision) -> None:
    assert choose_precision(ModelConfig(precision=precision, lora=lora), CPU) == expected


def test_trained_weights_stay_in_float32_under_bf16(saved: Path) -> None:
    whole = load(ModelConfig(name=str(saved), precision="bf16"))
    assert {parameter.dtype for parameter in whole.trainable()} == {torch.float32}
    adapted = load(ModelConfig(name=str(saved), precision="bf16", lora=LoRAConfig(r=2, alpha=4)))
    held = {parameter.dtype for parameter in adapted.model.parameters() if not parameter.requires_grad}
    assert held == {torch.bfloat16}
    assert {parameter.dtype for parameter in adapted.trainable()} == {torch.float32}


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2, alpha=4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_way_of_holding_the_model_takes_a_step_from_ratio_1(
    lora: LoRAConfig | None,
    precision: Any,
    checkpointing: bool,
    saved: Path,
    make_engine: Callable[..., Engine],
    make_frozen: Callable[..., Frozen],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    config = ModelConfig(name=str(saved), precision=precision, lora=lora, gradient_checkpointing=checkpointing)
    policy = load(config)
    engine = make_engine(policy, reference=policy.freeze(), beta=0.1, group_size=4)
    prompts = make_prompts([[5, 9, 3], [7]])
    rollouts = HFSampler(temperature=1.3, max_completion_length=5).sample(policy, prompts, 4, seed=0)
    meter = Meter()
    batch = collate(rollouts, pad_token_id=0)
    old, reference = engine.freeze(batch, meter)
    engine.update(batch, make_frozen(old.logprobs, reference, torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 2)), 5, meter)
    assert meter.totals["invariant/ratio_dev_step0"][0] <= 1e-6
    assert meter.totals["invariant/kl_step0"][0] <= 1e-6
    assert meter.totals["grad_norm"][0] > 0
    gap = meter.totals["sampling/sampling_logp_difference/max"][0]
    assert gap < (1e-5 if precision == "fp32" else 0.3)


def test_gradient_checkpointing_gives_equal_gradients(
    saved: Path,
    make_engine: Callable[..., Engine],
    make_frozen: Callable[..., Frozen],
    batch: Batch,
    flat_gradient: Callable[[Policy], torch.Tensor],
) -> None:
    found = []
    for checkpointing in (False, True):
        policy = load(ModelConfig(name=str(saved), gradient_checkpointing=checkpointing))
        assert policy.model.is_gradient_checkpointing is checkpointing
        engine = make_engine(policy)
        old, reference = engine.freeze(batch, Meter())
        frozen = make_frozen(old.logprobs, reference, torch.tensor([[1.0, -1.0], [0.5, -0.5]]))
        engine.accumulate(batch, frozen, 8, Meter())
        found.append(flat_gradient(policy))
    assert float((found[1] - found[0]).norm() / found[0].norm()) <= 1e-6


def failure_of(name: str | Path, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as failure:
        load(ModelConfig(name=str(name), **settings))
    return failure.value


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "missing", "a/b/c", "~/missing"])
def test_no_such_folder(name: str) -> None:
    error = failure_of(name)
    assert error.message == f"there is no model folder {name}"
    assert error.hint == "give a folder with config.json and *.safetensors, or a hub id"


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = failure_of(folder)
    assert error.message == f"the model folder {folder} has no config.json"
    assert error.hint == "give a folder saved by `save_pretrained`"


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = failure_of(folder)
    assert error.message == f"the model folder {folder} has no *.safetensors weights"
    assert error.hint == "convert it: pickled weights (.bin, .pt) can run code and are never loaded"


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    error = failure_of(folder)
    assert error.message == f"the model folder {folder} has no tokenizer"
    assert error.hint == "add its tokenizer.json and tokenizer_config.json"


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    error = failure_of(folder)
    assert error.message.startswith(f"cannot load the tokenizer of {folder}: ")
    assert error.hint == DAMAGED


def test_a_tokenizer_without_eos(tmp_path: Path) -> None:
    tokenizer(WORDS).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as failure:
        load_tokenizer(str(tmp_path), None)
    assert failure.value.message == f"the tokenizer of {tmp_path} has no EOS token"
    assert failure.value.hint == "set `eos_token` in its tokenizer_config.json"


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    tokenizer([*WORDS, "w", "<|endoftext|>"], eos_token="<eos>").save_pretrained(folder)
    error = failure_of(folder)
    assert error.message == f"the tokenizer of {folder} has 26 tokens but the model has embeddings for 24"
    assert error.hint == "use the tokenizer that the model was trained with"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\x00"),
        lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
        lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "none-such"}), encoding="utf-8"),
    ],
    ids=["weights", "config", "unknown-type"],
)
def test_a_damaged_model(damage: Callable[[Path], Any], folder: Path) -> None:
    damage(folder)
    error = failure_of(folder)
    assert error.message.startswith((f"cannot load the model {folder}: ", f"cannot load the tokenizer of {folder}: "))
    assert error.hint == DAMAGED


def test_weights_of_another_size(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:20].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    error = failure_of(folder)
    assert error.message == (
        f"the weights of {folder} do not fit its config.json: `lm_head.weight` is [20, 32] and should be [24, 32]"
    )
    assert error.hint == "use the config.json that the weights were saved with"


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    error = failure_of(folder)
    assert error.message == f"the weights of {folder} lack 1 of the model's tensors, `model.norm.weight` first"
    assert error.hint == "use weights of this architecture with a language model head, complete"


def test_a_model_can_be_saved_whatever_its_generation_configuration_says(folder: Path, tmp_path: Path) -> None:
    odd = {"temperature": 0.6, "do_sample": False, "eos_token_id": [1, 4], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(odd), encoding="utf-8")
    policy = load(ModelConfig(name=str(folder)))
    assert policy.eos_token_ids() == {1, 4} and policy.model.generation_config.pad_token_id == 0
    assert "the model's generation configuration contradicts itself: only its token ids are kept" in policy.notes
    policy.model.generation_config.eos_token_id = [4]
    policy.save(tmp_path / "again")
    assert load(ModelConfig(name=str(tmp_path / "again"))).eos_token_ids() == {1, 4}


def test_bf16_is_chosen_only_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision(ModelConfig(), torch.device("cuda")) == Precision(torch.float32)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision(ModelConfig(), torch.device("cuda")).autocast == torch.bfloat16


def test_an_adapter_remembers_where_its_base_model_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    adapted = load(ModelConfig(name=f"./{folder.name}", lora=LoRAConfig(r=2, alpha=4)))
    adapted.save(folder.parent / "adapter")
    described = json.loads((folder.parent / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert described["base_model_name_or_path"] == str(folder)


def test_modules_that_no_adapter_fits_are_named(saved: Path) -> None:
    model = ModelConfig(name=str(saved), lora=LoRAConfig(r=2, target_modules="nothing"))
    with pytest.raises(ModelError, match=r"no adapter fits `model\.lora\.target_modules` 'nothing': ") as failure:
        load(model)
    assert failure.value.hint == "use `all-linear`, or names of the model's linear layers such as `q_proj`"
