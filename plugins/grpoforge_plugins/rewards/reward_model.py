"""What does a trained classifier think of it?"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from grpoforge.distributed import local_device
from grpoforge.errors import ConfigError, ModelError, first_line

__all__ = ["RewardModel"]

logger = logging.getLogger(__name__)

DECIMALS = 4
"""Scores are rounded: what a batch's padding changes is less, and would be noise between equal completions."""


def check_source(model: str) -> str:
    """``model``, or a ConfigError where it names a folder that is not there or has no weights that can be loaded."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise ConfigError(
                f"option `model` of the reward is `{model}`, and there is no such folder",
                "give a folder with a sequence classifier, or a hub id `owner/name`",
            )
    elif not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"option `model` of the reward is `{model}`, a folder without config.json and *.safetensors",
            "give a folder saved by `save_pretrained`; pickled weights (.bin, .pt) can run code and are never loaded",
        )
    return model


class RewardModel:
    """The score that a sequence classifier gives to prompt and completion.

    Any model that transformers loads as ``AutoModelForSequenceClassification``: a trained reward model (one label), a
    toxicity or sentiment classifier (choose a `label`). The prompt is the dataset's column ``question`` where there is
    one, else the prompt as the policy sees it. `form` ``chat`` writes both by the chat template of the model's own
    tokenizer, ``pair`` as a pair of texts; by default the template decides, if there is one.

    A text that is too long loses the beginning of the prompt. A completion that does not fit by itself is not scored
    (None) and counted in `too_long`: half a completion is another completion.

    Deterministic: evaluation mode, no gradient, scores rounded to `DECIMALS` decimals, which hides what the rest of a
    batch changes (less than 1e-5 in fp32; with bf16 it may show). The model is shared by all rewards of the process
    that name it. It is no judge of what it was not trained on, and a policy finds that out:
    keep a `kl` penalty and a reward that checks something beside it.
    """

    def __init__(
        self,
        *,
        model: Annotated[str, AfterValidator(check_source), "folder or hub id of a sequence classifier"],
        revision: Annotated[str | None, "of a hub id: a commit, tag or branch"] = None,
        label: Annotated[str | None, "whose score counts, by name or number; needed where there are several"] = None,
        output: Annotated[Literal["logit", "sigmoid"], "the score as it is, or between 0 and 1"] = "logit",
        form: Annotated[Literal["auto", "chat", "pair"], "how prompt and completion are written"] = "auto",
        max_length: Annotated[int | None, Field(ge=8), "tokens at most; default: what the model can take"] = None,
        batch_size: Annotated[int, Field(ge=1), "completions scored at a time"] = 16,
        precision: Annotated[Literal["fp32", "bf16"], "of weights and scores"] = "fp32",
        device: Annotated[Literal["auto", "cpu", "cuda"], "auto: the device of the run"] = "auto",
    ) -> None:
        self._network, self._tokenizer = _load(os.path.expanduser(model), revision, precision, _device(device))
        self._column = _column(self._network.config, label, model)
        self._output, self._batch_size = output, batch_size
        self._is_chat = _is_chat(self._tokenizer, form, model)
        self._max_length = _max_length(self._network.config, self._tokenizer, max_length, model)
        if self._tokenizer.pad_token_id is None and batch_size > 1:
            raise ModelError(
                f"the tokenizer of {model} has no pad token, and {batch_size} completions are scored at a time",
                "set `pad_token` in its tokenizer_config.json to what it was trained with, or use `batch_size=1`",
            )
        self.too_long = 0
        """Completions not scored because they did not fit, since this reward was built."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], question: Sequence[object] | None = None
    ) -> list[float | None]:
        asked = prompts if question is None else list(map(str, question))
        encoded = [self._fit(_utf8(one), _utf8(other)) for one, other in zip(asked, completions, strict=True)]
        self._count_too_long(encoded)
        # The longest first: what does not fit into memory shows at once, and a batch is padded little.
        order = sorted((row for row, one in enumerate(encoded) if one), key=lambda row: -len(encoded[row]["input_ids"]))
        rewards: list[float | None] = [None] * len(encoded)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            for row, score in zip(rows, self._scores([encoded[row] for row in rows]), strict=True):
                rewards[row] = round(score, DECIMALS)
        return rewards

    def _fit(self, prompt: str, completion: str) -> dict[str, list[int]]:
        """Prompt and completion as tokens, without as much of the beginning of the prompt as it takes; else empty."""
        encoded = self._encode(prompt, completion)
        while (excess := len(encoded["input_ids"]) - self._max_length) > 0:
            if not prompt:
                return {}
            prompt = self._without_start(prompt, excess)
            encoded = self._encode(prompt, completion)
        return encoded

    def _without_start(self, prompt: str, num_tokens: int) -> str:
        """``prompt`` without the text of its first tokens: at least one character shorter."""
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        places = self._tokenizer(prompt, **options)["offset_mapping"]
        return prompt[max(1, places[num_tokens][0]) :] if num_tokens < len(places) else ""

    def _encode(self, prompt: str, completion: str) -> dict[str, list[int]]:
        if not self._is_chat:
            return dict(self._tokenizer(prompt, completion, verbose=False))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        return dict(self._tokenizer(text, add_special_tokens=False, verbose=False))

    @torch.no_grad()
    def _scores(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        if len(encoded) == 1:
            batch = {name: torch.tensor([values]) for name, values in encoded[0].items()}
        else:
            batch = dict(self._tokenizer.pad(encoded, return_tensors="pt"))
        logits = self._network(**{name: values.to(self._network.device) for name, values in batch.items()}).logits
        scores = logits[:, self._column].double()
        found: list[float] = (scores.sigmoid() if self._output == "sigmoid" else scores).tolist()
        return found

    def _count_too_long(self, encoded: Sequence[dict[str, list[int]]]) -> None:
        too_long = sum(not one for one in encoded)
        if too_long and not self.too_long:
            logger.warning(
                "%d of %d completions are longer than the %d tokens that the reward model takes; such rows are not "
                "scored, and `rewards/*/unscored` counts them",
                too_long,
                len(encoded),
                self._max_length,
            )
        self.too_long += too_long


def _utf8(text: str) -> str:
    """``text`` with a mark for what no tokenizer takes: half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


@lru_cache(maxsize=4)
def _load(source: str, revision: str | None, precision: str, device: torch.device) -> tuple[Any, Any]:
    """The classifier, ready for evaluation, and its tokenizer: one for every reward that names it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=revision,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as failure:  # the boundary: what a damaged file raises, nobody documents
        raise ModelError(
            f"cannot load the reward model {source}: {first_line(failure)}",
            "give a folder or hub id of a sequence classifier with its tokenizer",
        ) from None
    if loading["missing_keys"]:
        raise ModelError(
            f"the reward model {source} has no weights for {sorted(loading['missing_keys'])[0]}: its scores would be "
            "random",
            "give a model that was trained as a sequence classifier",
        )
    if network.config.pad_token_id is None:
        # Decoders find the last token of a row by it.
        network.config.pad_token_id = tokenizer.pad_token_id
    return network.requires_grad_(False).eval().to(device), tokenizer


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("option `device` of the reward is `cuda`, and there is no CUDA device", "use `device=cpu`")
    return local_device() if name in ("auto", "cuda") else torch.device(name)


def _column(config: Any, label: str | None, model: str) -> int:
    """Which of the model's outputs is the score."""
    names: dict[int, str] = {int(number): str(name) for number, name in config.id2label.items()}
    if label is None and len(names) == 1:
        return 0
    shown = ", ".join(names[number] for number in sorted(names))
    if label is None:
        raise ConfigError(
            f"the reward model {model} has {len(names)} labels, and option `label` does not say which is the score",
            f"choose one of: {shown}",
        )
    for number, name in names.items():
        if label in (name, str(number)):
            return number
    raise ConfigError(f"option `label` of the reward is `{label}`, which {model} does not have", f"it has: {shown}")


def _is_chat(tokenizer: Any, form: str, model: str) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if form == "chat" and not has_template:
        raise ConfigError(
            f"option `form` of the reward is `chat`, and the tokenizer of {model} has no chat template",
            "use `form=pair`",
        )
    return has_template if form == "auto" else form == "chat"


def _max_length(config: Any, tokenizer: Any, chosen: int | None, model: str) -> int:
    """Tokens that the model is given at most."""
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    if "roberta" in config.model_type:
        positions -= config.pad_token_id + 1  # it counts positions from there
    possible = min(positions, tokenizer.model_max_length)
    if chosen is not None and chosen > possible:
        raise ConfigError(
            f"option `max_length` of the reward is {chosen}, and {model} takes {possible} tokens",
            f"use {possible} or less",
        )
    return int(chosen or possible)
