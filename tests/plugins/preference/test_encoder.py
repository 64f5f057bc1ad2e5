"""The encoder: what it reads, what it refuses, and what others read of it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpoforge.errors import ModelError
from grpoforge_plugins.preference.encoder import Encoder
from grpoforge_plugins.preference.vocabulary import make_tokenizer, vocabulary_of

TEXTS = ["one two three one", "two plus two is 4", "one is 1, two is 22"]
PROMPTS, COMPLETIONS = ["one two", "three"], ["two is 22", "four, 4"]


def small(seed: int = 0, max_length: int = 32) -> Encoder:
    return Encoder.make(vocabulary_of(TEXTS, 50), hidden_size=32, num_layers=1, max_length=max_length, seed=seed)


def encoded(encoder: Encoder, prompts: list[str], completions: list[str]) -> list[list[str]]:
    tokens = encoder.tokenizer.convert_ids_to_tokens
    return [tokens(row.ids) if row else [] for row in encoder.encode(prompts, completions)]


def test_the_vocabulary_is_a_function_of_the_texts() -> None:
    vocabulary = vocabulary_of(TEXTS, 2)
    assert vocabulary == vocabulary_of(TEXTS, 2)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # `two` stands in the texts 4 times; `is` and `one` 3 times each, and i comes before o.
    assert vocabulary[-2:] == ["two", "is"]
    assert len(vocabulary) == len(set(vocabulary))


def test_words_digits_and_what_is_new_can_be_written() -> None:
    tokenizer = make_tokenizer(vocabulary_of(TEXTS, 50))
    assert tokenizer.tokenize("two is 22, tw") == ["two", "is", "2", "2", ",", "t", "##w"]
    assert tokenizer.tokenize("é") == ["[UNK]"]


def test_prompt_and_completion_are_told_apart() -> None:
    (row,) = small().encode(["one two"], ["is 4"])
    assert row is not None
    assert encoded(small(), ["one two"], ["is 4"]) == [["[CLS]", "one", "two", "[SEP]", "is", "4", "[SEP]"]]
    assert row.segments == [0, 0, 0, 0, 1, 1, 1]


def test_a_long_prompt_is_cut_on_the_left_and_a_completion_never() -> None:
    encoder = small(max_length=8)
    assert encoded(encoder, ["one two one two is"], ["is 4 4"]) == [
        ["[CLS]", "two", "is", "[SEP]", "is", "4", "4", "[SEP]"]
    ]
    # Four tokens leave room for one of the prompt, five for none.
    assert encoded(encoder, ["one two"], ["is 4 4 4"]) == [["[CLS]", "two", "[SEP]", "is", "4", "4", "4", "[SEP]"]]
    assert encoder.encode(["one two"], ["is 4 4 4 4"]) == [None]


def test_a_score_does_not_depend_on_its_neighbors() -> None:
    encoder = small()
    rows = [row for row in encoder.encode([*PROMPTS, "x" * 20], [*COMPLETIONS, "one"]) if row]
    together = encoder.measure(rows)
    alone = torch.cat([encoder.measure([row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-6) and len(set(together.tolist())) == 3


def test_weights_come_from_the_seed_and_leave_the_runs_dice_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = [small(seed).model.state_dict()["classifier.weight"] for seed in (0, 0, 1)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert torch.get_rng_state().equal(before)


def test_transformers_reads_what_was_saved(tmp_path: Path) -> None:
    encoder = small()
    encoder.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(PROMPTS, COMPLETIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits[:, 0]
    rows = [row for row in encoder.encode(PROMPTS, COMPLETIONS) if row]
    assert model.config.num_labels == 1
    assert torch.allclose(found, encoder.measure(rows), atol=1e-6)
    again = Encoder.load(str(tmp_path), max_length=512, seed=9, trained=True)
    assert again.measure(rows).equal(encoder.measure(rows)) and again.max_length == 32


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    sums = []
    for name in ("a", "b"):
        small().save(tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        sums.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert sums[0] == sums[1]


def test_an_encoder_without_a_head_gets_one_to_train_and_is_refused_to_judge(tmp_path: Path) -> None:
    small().save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if not name.startswith("classifier")}
    save_file(weights, file, metadata={"format": "pt"})
    heads = [
        Encoder.load(str(tmp_path), max_length=32, seed=seed).model.state_dict()["classifier.weight"]
        for seed in (1, 1, 2)
    ]
    assert heads[0].equal(heads[1]) and not heads[0].equal(heads[2])
    with pytest.raises(ModelError) as refused:
        Encoder.load(str(tmp_path), max_length=32, seed=1, trained=True)
    assert refused.value.message == f"{tmp_path} has no trained head: `classifier.bias` is missing"
    assert "grpoforge preference train" in refused.value.hint


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError, match=r"there is no encoder folder \./nothing"):
        Encoder.load("./nothing", max_length=32, seed=0)
    (tmp_path / "config.json").write_text("{}")
    with caplog.at_level(logging.CRITICAL), pytest.raises(ModelError) as refused:
        Encoder.load(str(tmp_path), max_length=32, seed=0)
    assert refused.value.message.startswith(f"cannot load the encoder {tmp_path}: ")
    assert refused.value.hint == "give a folder or hub id with config.json, model.safetensors and a tokenizer"


def test_an_encoder_that_lacks_weights_of_its_body_is_refused(tmp_path: Path) -> None:
    small().save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "layer.0.attention.self.query" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of its encoder: bert\.encoder\.layer\.0"):
        Encoder.load(str(tmp_path), max_length=32, seed=0)
