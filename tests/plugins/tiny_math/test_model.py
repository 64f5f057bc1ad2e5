"""The saved warm-started model folder: size, configuration, tokenizer, chat template, what it knows."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from grpoforge_plugins.tiny_math import KINDS, MODEL_DIR, sample_problems
from grpoforge_plugins.tiny_math.problems import split_of

ALLOWED_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()


def test_folder_holds_only_an_ordinary_model_of_at_most_4_mb() -> None:
    files = list(MODEL_DIR.iterdir())
    assert {file.name for file in files} == ALLOWED_FILES
    assert sum(file.stat().st_size for file in files) <= 4_000_000


def test_no_file_names_a_place_on_a_machine() -> None:
    for file in MODEL_DIR.iterdir():
        if file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert "/home/" not in text and str(Path.cwd()) not in text


def test_configuration_is_a_small_qwen2_with_a_common_head_size() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen2"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["hidden_size"] // config["num_attention_heads"] in (32, 64)
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["tie_word_embeddings"] is True


def test_parameters(model: Any, tokenizer: Any) -> None:
    assert model.num_parameters() <= 1_500_000
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_special_tokens_are_distinct_and_known_to_the_model(model: Any, tokenizer: Any) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    for settings in (model.config, model.generation_config):
        assert settings.pad_token_id == tokenizer.pad_token_id
        assert settings.eos_token_id == tokenizer.eos_token_id


def test_chat_template_renders_turns(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    messages.append({"role": "assistant", "content": "5"})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n5<|im_end|>\n")


def test_special_tokens_are_single_ids(tokenizer: Any) -> None:
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]


def test_digits_are_split(tokenizer: Any) -> None:
    assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]


def test_ordinary_words_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize(" apples") == ["Ġapples"]


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n\t x ", "na\u00efve caf\u00e9", "日本語 12３", "🙂👩\u200d👧", "a\x00b\u200b", "#### 7<<1+2=3>>"],
)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_round_trips_up_to_normal_form_c(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "caf\u00e9"
    rng = random.Random(0)
    points = [*range(0x20, 0xD800), *range(0xE000, 0x110000)]
    for _ in range(100):
        text = "".join(map(chr, rng.sample(points, 20)))
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_greedy_accuracy_is_middling_and_completions_end(model: Any, tokenizer: Any) -> None:
    from grpoforge_plugins.tiny_math.warm_start import complete

    problems = sample_problems("test", 160, seed=11)
    completions = complete(model, tokenizer, [problem.question for problem in problems], sample=False)
    right = [text.endswith(f"\n#### {p.result}") for p, (text, _) in zip(problems, completions, strict=True)]
    assert 0.35 <= sum(right) / len(right) <= 0.65
    assert max(length for _, length in completions) < 64


def test_careless_demonstrations_are_wrong_and_always_shorter(tokenizer: Any) -> None:
    from grpoforge_plugins.tiny_math.problems import solution_text
    from grpoforge_plugins.tiny_math.warm_start import CARELESS_KINDS, careless

    assert set(CARELESS_KINDS) < {kind.name for kind in KINDS}
    for problem in sample_problems("train", 1000, 4):
        ops = CARELESS_KINDS.get(problem.kind.name)
        if ops is None:
            continue
        steps = careless(problem, ops)
        assert steps[-1].result != problem.result
        wrong, right = tokenizer([solution_text(steps), problem.solution()])["input_ids"]
        assert len(wrong) < len(right)


def test_the_teacher_is_mostly_careless_on_its_kinds_and_right_elsewhere() -> None:
    from grpoforge_plugins.tiny_math.warm_start import CARELESS_KINDS, WarmStart, demonstration

    plan, rng = WarmStart(), random.Random(0)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for problem in sample_problems("train", 2000, 9):
        assert split_of(problem.question) == "train"
        text = demonstration(problem, rng, plan)
        right[problem.kind.name in CARELESS_KINDS].append(text.endswith(f"\n#### {problem.result}"))
    assert all(right[False])
    assert abs(sum(right[True]) / len(right[True]) - (1 - plan.careless_share)) < 0.05
