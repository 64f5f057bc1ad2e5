"""Models and tokenizers that cannot be used, and a hub that cannot be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., tuple[str, str]]


def test_a_model_without_configuration(refused: Refused, model: Callable[..., str]) -> None:
    assert refused("train", "--model", model("m", "config.json")) == (
        "the model folder m has no config.json",
        "give a folder saved by `save_pretrained`",
    )


def test_pickled_weights_are_refused_unread(refused: Refused, model: Callable[..., str], tmp_path: Path) -> None:
    name = model("m", "model.safetensors")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert refused("train", "--model", name) == (
        "the model folder m has no *.safetensors weights",
        "convert it: pickled weights (.bin, .pt) can run code and are never loaded",
    )
    assert not (tmp_path / "pwned").exists()


def test_a_model_without_tokenizer(refused: Refused, model: Callable[..., str]) -> None:
    assert refused("train", "--model", model("m", "tokenizer.json", "tokenizer_config.json")) == (
        "the model folder m has no tokenizer",
        "add its tokenizer.json and tokenizer_config.json",
    )


AGAIN = "save or download the folder again: it needs config.json, *.safetensors and a tokenizer"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "model.safetensors",
            b"\xff" * 100,
            "cannot load the model ./m: Error while deserializing header: header too large",
        ),
        ("model.safetensors", b"", "cannot load the model ./m: Error while deserializing header: header too small"),
        (
            "tokenizer.json",
            b"{",
            "cannot load the tokenizer of m: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        (
            "config.json",
            b"{",
            "cannot load the tokenizer of m: "
            "It looks like the config file at 'm/config.json' is not a valid JSON file.",
        ),
    ],
)
def test_damaged_model_files(
    refused: Refused, model: Callable[..., str], tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    name = model("m")
    (tmp_path / "m" / file).write_bytes(content)
    assert refused("train", "--model", name) == (message, AGAIN)


def test_weights_of_another_shape(refused: Refused, model: Callable[..., str]) -> None:
    assert refused("train", "--model", model("m", config={"intermediate_size": 64})) == (
        "the weights of ./m do not fit its config.json: `model.layers.0.mlp.down_proj.weight` is [128, 256] and should "
        "be [128, 64]",
        "use the config.json that the weights were saved with",
    )


def test_weights_that_lack_a_layer(refused: Refused, model: Callable[..., str]) -> None:
    larger = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    assert refused("train", "--model", model("m", config=larger)) == (
        "the weights of ./m lack 12 of the model's tensors, `model.layers.3.input_layernorm.weight` first",
        "use weights of this architecture with a language model head, complete",
    )


def test_a_tokenizer_without_eos(refused: Refused, model: Callable[..., str]) -> None:
    assert refused("train", "--model", model("m", tokenizer_config={"eos_token": None})) == (
        "the tokenizer of m has no EOS token",
        "set `eos_token` in its tokenizer_config.json",
    )


def test_a_tokenizer_larger_than_the_embeddings(refused: Refused, model: Callable[..., str], tmp_path: Path) -> None:
    more = {"extra_special_tokens": ["<|im_start|>", *(f"<|new{number}|>" for number in range(20))]}
    name = model("m", tokenizer_config=more)
    rows = json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"]
    message, hint = refused("train", "--model", name)
    assert message == f"the tokenizer of ./m has {rows + 20} tokens but the model has embeddings for {rows}"
    assert hint == "use the tokenizer that the model was trained with"


def test_a_chat_template_that_raises(refused: Refused, model: Callable[..., str], tmp_path: Path) -> None:
    name = model("m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ raise_exception('no \x1b[31msystem') }}")
    message, hint = refused("train", "--model", name)
    assert message == "tiny-math/train:1: the tokenizer's chat template failed: no \\x1b[31msystem"
    assert hint == ("correct the template in the model folder, or leave out `data.system_prompt` if it takes none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nobody/nothing"), "cannot load the tokenizer of nobody/nothing: We couldn't connect to "),
        (("--dataset", "nobody/nothing"), "cannot load the dataset `nobody/nothing` (split train): "),
    ],
)
def test_the_hub_without_network(tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "grpoforge", "train", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"error: {message}" in done.stderr
    assert "hint: check the name and the network" in done.stderr
    assert list(tmp_path.glob("runs/*")) == []
    assert time.monotonic() - start < 60


def test_what_a_tokenizer_lacks_is_said(
    cli: Callable[..., Any], model: Callable[..., str], small: Sequence[str]
) -> None:
    name = model("m", "chat_template.jinja", tokenizer_config={"pad_token": None})
    said = cli("train", "--model", name, *small, "--set", "trackers=[{name: console}]")
    assert said.code == 0, said.err
    assert "the tokenizer has no pad token: EOS is used (masks come from lengths)" in said.err
    assert "the tokenizer has no chat template: a plain prompt template is used" in said.err
