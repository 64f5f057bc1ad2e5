from __future__ import annotations

import logging
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpoforge.errors import ConfigError, GrpoforgeError
from grpoforge.registry import make_component
from grpoforge_plugins.rewards.reward_model import RewardModel

HOSTILE: tuple[Any, ...] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "hostile_completions.py"))[
    "HOSTILE"
]

PROMPTS = ["what is 2 + 2 ?", "what is 3 + 4 ?", "name a color", "why ?"] * 3
COMPLETIONS = [
    "4",
    "it is 7 , I am sure",
    "blue",
    "because",
    "four",
    "7",
    "",
    "no",
    "5",
    "12",
    "red or green",
    "x" * 60,
]


def logits(folder: Path, *texts: str) -> torch.Tensor:
    """What the model says of a text or a pair, through transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(**AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")).logits[0]
    return found


def refusal(**options: Any) -> tuple[str, str]:
    component = make_component("reward", "reward_model", "grpoforge", RewardModel)
    with pytest.raises(GrpoforgeError) as caught:
        component.build(options)
    return caught.value.message, caught.value.hint


def test_the_score_is_the_logit_of_the_pair(classifier: Path) -> None:
    found = RewardModel(model=str(classifier))(PROMPTS, COMPLETIONS)
    expected = [float(logits(classifier, *pair)) for pair in zip(PROMPTS, COMPLETIONS)]
    assert found == pytest.approx(expected, abs=6e-5)
    assert len(set(found)) == len(found)


def test_sigmoid(classifier: Path) -> None:
    (found,) = RewardModel(model=str(classifier), output="sigmoid")(["a"], ["b"])
    assert found == pytest.approx(float(logits(classifier, "a", "b").sigmoid()), abs=6e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_the_batch_changes_nothing(classifier: Path, batch_size: int) -> None:
    reward = RewardModel(model=str(classifier), batch_size=batch_size)
    raw = torch.tensor([reward._scores([reward._fit(*pair)]) for pair in zip(PROMPTS, COMPLETIONS)])[:, 0]
    order = list(range(12))
    for rows in (order, order[::-1], order[6:] + order[:6]):
        encoded = [reward._fit(PROMPTS[row], COMPLETIONS[row]) for row in rows]
        together = torch.tensor(reward._scores(encoded))
        torch.testing.assert_close(together, raw[rows], atol=1e-5, rtol=0.0)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(raw.tolist(), abs=6e-5)


def test_dropout_is_off_and_random_state_untouched(classifier: Path) -> None:
    reward = RewardModel(model=str(classifier))
    before = torch.get_rng_state()
    assert reward(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in reward._network.parameters())


def test_one_model_for_all_rewards_that_name_it(classifier: Path) -> None:
    assert RewardModel(model=str(classifier))._network is RewardModel(model=str(classifier), batch_size=3)._network


def test_the_question_is_taken_where_there_is_one(classifier: Path) -> None:
    reward = RewardModel(model=str(classifier))
    assert reward(["Question: why ?\nAnswer:"], ["no"], ["why ?"]) == reward(["why ?"], ["no"])
    assert reward(["Question: why ?\nAnswer:"], ["no"]) != reward(["why ?"], ["no"])


def test_a_long_prompt_loses_its_beginning(classifier: Path) -> None:
    # Three special tokens, nine letters of completion, so 84 letters of the prompt are left.
    prompt = "a " * 50 + "b " * 84
    reward = RewardModel(model=str(classifier))
    assert reward([prompt], ["completed"]) == reward(["b " * 84], ["completed"])
    assert reward([prompt], ["completed"]) != reward(["b " * 83], ["completed"])
    short = RewardModel(model=str(classifier), max_length=16)
    assert short([prompt], ["completed"]) == reward(["b b b b"], ["completed"])


def test_a_long_completion_is_not_cut_but_not_scored(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModel(model=str(classifier))
    fits, too_long = "x" * 93, "x" * 94
    with caplog.at_level(logging.WARNING):
        found = reward(["why ?"] * 3, [too_long, fits, too_long])
        reward(["why ?"], [too_long])
    assert found[0] is None and found[1] == reward([""], [fits])[0] and found[2] is None
    assert reward.too_long == 3
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("2 of 3 completions are longer than the 96 tokens that the reward model takes")


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_chat_template(tmp_path: Path, save_classifier: Callable[..., Path]) -> None:
    folder = save_classifier(tmp_path / "chat", chat_template=TEMPLATE)
    reward = RewardModel(model=str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = "<user>why ?<assistant>no"
    with torch.no_grad():
        encoded = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")
        expected = float(model(**encoded).logits)
    assert reward(["why ?"], ["no"]) == [pytest.approx(expected, abs=6e-5)]
    pair = RewardModel(model=str(folder), form="pair")(["why ?"], ["no"])
    assert pair == [pytest.approx(float(logits(folder, "why ?", "no")), abs=6e-5)]
    # 17 characters of markup (no special tokens) and 2 of completion leave 77 for the prompt.
    assert reward(["a " * 50 + "b " * 77], ["no"]) == reward(["b " * 77], ["no"])
    assert reward(["a " * 50 + "b " * 77], ["no"]) != reward(["b " * 76], ["no"])


def test_labels(tmp_path: Path, save_classifier: Callable[..., Path]) -> None:
    folder = save_classifier(tmp_path / "three", num_labels=3)
    expected = logits(folder, "why ?", "no").tolist()
    for label, column in (("LABEL_0", 0), ("2", 2), ("LABEL_1", 1)):
        found = RewardModel(model=str(folder), label=label)(["why ?"], ["no"])
        assert found == [pytest.approx(expected[column], abs=6e-5)]
    assert refusal(model=str(folder)) == (
        f"the reward model {folder} has 3 labels, and option `label` does not say which is the score",
        "choose one of: LABEL_0, LABEL_1, LABEL_2",
    )
    assert refusal(model=str(folder), label="good") == (
        f"option `label` of the reward is `good`, which {folder} does not have",
        "it has: LABEL_0, LABEL_1, LABEL_2",
    )


def test_tokenizer_without_a_pad_token(tmp_path: Path, save_classifier: Callable[..., Path]) -> None:
    folder = save_classifier(tmp_path / "no_pad", pad=False)
    assert refusal(model=str(folder)) == (
        f"the tokenizer of {folder} has no pad token, and 16 completions are scored at a time",
        "set `pad_token` in its tokenizer_config.json to what it was trained with, or use `batch_size=1`",
    )
    found = RewardModel(model=str(folder), batch_size=1)(PROMPTS, COMPLETIONS)
    assert found == pytest.approx([float(logits(folder, *pair)) for pair in zip(PROMPTS, COMPLETIONS)], abs=6e-5)


@pytest.mark.parametrize("name", ["./missing", "/nowhere/at/all", "missing", "~/missing"])
def test_unknown_folder_is_told_when_options_are_checked(name: str) -> None:
    component = make_component("reward", "reward_model", "grpoforge", RewardModel)
    with pytest.raises(ConfigError) as caught:
        component.validate({"model": name})
    assert caught.value.message == f"option `model` of the reward is `{name}`, and there is no such folder"
    assert caught.value.hint == "give a folder with a sequence classifier, or a hub id `owner/name`"


def test_folders_that_cannot_be_used(tmp_path: Path, classifier: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    message, hint = refusal(model=str(pickled))
    assert message == f"option `model` of the reward is `{pickled}`, a folder without config.json and *.safetensors"
    assert "can run code and are never loaded" in hint
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in classifier.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
    message, hint = refusal(model=str(broken))
    assert message.startswith(f"cannot load the reward model {broken}: ")
    assert hint == "give a folder or hub id of a sequence classifier with its tokenizer"


def test_a_model_without_a_trained_head(tmp_path: Path, classifier: Path) -> None:
    from transformers import AutoModel

    folder = tmp_path / "headless"
    AutoModel.from_pretrained(classifier).save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    message, hint = refusal(model=str(folder))
    assert message == (f"the reward model {folder} has no weights for classifier.bias: its scores would be random")
    assert hint == "give a model that was trained as a sequence classifier"


def test_other_options(classifier: Path) -> None:
    name = str(classifier)
    assert refusal(model=name, form="chat") == (
        f"option `form` of the reward is `chat`, and the tokenizer of {name} has no chat template", "use `form=pair`",
    )  # fmt: skip
    assert refusal(model=name, max_length=97) == (
        f"option `max_length` of the reward is 97, and {name} takes 96 tokens", "use 96 or less",
    )  # fmt: skip
    assert refusal()[0] == "option `model` of reward `grpoforge:reward_model` is required"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="there is no CUDA device"):
            RewardModel(model=name, device="cuda")


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_completions(classifier: Path, hostile: Any) -> None:
    (found,) = RewardModel(model=str(classifier))(["why ?"], [hostile.text])
    assert found is None or abs(found) < 1e3
