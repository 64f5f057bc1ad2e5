"""Prompt and completion to one score, by an encoder of the BERT class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from grpoforge.distributed import local_device
from grpoforge.errors import ModelError, first_line
from grpoforge.policy import disable_dropout
from grpoforge_plugins.preference.vocabulary import make_tokenizer, vocabulary_of

__all__ = ["Encoded", "Encoder", "Precision"]

Precision = Literal["fp32", "bf16"]

MAX_WORDS = 4000


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt with one completion, as the encoder reads them."""

    ids: list[int]
    segments: list[int]
    """0 on the prompt, 1 on the completion, where the tokenizer tells them apart."""

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """A sequence-classification model with one output, the score ``h(prompt, completion)``, and its tokenizer.

    Dropout is off, as in the policy: a score is a function of the text. A prompt that does not fit is cut on the left,
    a completion never is.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, precision: Precision = "fp32") -> None:
        disable_dropout(model)
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        self.max_length = min([max_length, *(limit for limit in limits if limit)])
        """Tokens of prompt and completion together, special ones included."""
        self._backend = _plain_backend(tokenizer)
        self.device = local_device()
        model.to(self.device).eval()

    @classmethod
    def make(
        cls, vocabulary: Sequence[str], *, hidden_size: int, num_layers: int, max_length: int, seed: int, **how: Any
    ) -> Encoder:
        """A new small BERT over ``vocabulary`` (see `vocabulary_of`), its weights drawn from ``seed``."""
        from transformers import BertConfig, BertForSequenceClassification

        _quiet()
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=max(1, hidden_size // 32),
            max_position_embeddings=max_length,
            num_labels=1,
            pad_token_id=0,
        )
        with _seeded(seed):
            model = BertForSequenceClassification(config)
        return cls(model, make_tokenizer(vocabulary), max_length=max_length, **how)

    @classmethod
    def load(cls, name: str, *, max_length: int, seed: int, trained: bool = False, **how: Any) -> Encoder:
        """The encoder in a folder or of the hub; a head that it lacks is drawn from ``seed``.

        Args:
            trained: refuse an encoder without a head of its own: it has learned no preferences.

        Raises:
            ModelError: there is none, it is no encoder with a fast tokenizer, or it lacks what it needs.
        """
        tokenizer, model, missing = _read(name, seed)
        prefix = f"{model.base_model_prefix}."
        body = [key for key in missing if key.startswith(prefix) and "pooler" not in key]
        if body:
            raise ModelError(
                f"{name} lacks weights of its encoder: {body[0]}", "give an encoder, such as a BERT folder"
            )
        if trained and missing:
            raise ModelError(
                f"{name} has no trained head: `{missing[0]}` is missing",
                "train it: `grpoforge preference train PAIRS.jsonl --model FOLDER --output DIR`",
            )
        return cls(model, tokenizer, max_length=max_length, **how)

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Encoded | None]:
        """The tokens of each row; None where the completion alone is too long for the encoder."""
        backend = self._backend
        room = self.max_length - backend.num_special_tokens_to_add(True)
        rows = zip(
            backend.encode_batch(list(prompts), add_special_tokens=False),
            backend.encode_batch(list(completions), add_special_tokens=False),
            strict=True,
        )
        return [self._joined(prompt, completion, room - len(completion)) for prompt, completion in rows]

    def _joined(self, prompt: Any, completion: Any, room: int) -> Encoded | None:
        """``room``: tokens that the completion leaves to the prompt."""
        if room < 1:
            return None
        if len(prompt) > room:
            prompt.truncate(room, direction="left")
        joined = self._backend.post_process(prompt, completion, True)
        return Encoded(joined.ids, joined.type_ids)

    def scores(self, rows: Sequence[Encoded]) -> Tensor:
        """``h`` of each row, ``[n]`` float32, in one forward pass; with gradient unless it is switched off around."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        inputs = {
            "input_ids": _rectangle([row.ids for row in rows], width, pad, self.device),
            "attention_mask": _rectangle([[1] * len(row) for row in rows], width, 0, self.device),
        }
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = _rectangle([row.segments for row in rows], width, 0, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(**inputs).logits
        scores: Tensor = logits[:, 0].float()
        return scores

    @torch.no_grad()
    def measure(self, rows: Sequence[Encoded], batch_size: int = 64) -> Tensor:
        """`scores` of any number of rows without gradient, ``[n]`` float32 on the CPU; like lengths go together."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        found = torch.empty(len(rows))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            found[part] = self.scores([rows[row] for row in part]).cpu()
        return found

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder that `AutoModelForSequenceClassification` reads."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)


def _rectangle(rows: Sequence[Sequence[int]], width: int, fill: int, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def _plain_backend(tokenizer: Any) -> Any:
    """The tokenizer's own engine, a copy that neither cuts nor pads: folders come with settings of their own."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """New weights come from ``seed``, and the run's own random numbers go on as if none had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _read(name: str, seed: int) -> tuple[Any, Any, list[str]]:
    """Tokenizer, model, and the names of the weights that the folder lacks."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _quiet()
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise ModelError(f"there is no encoder folder {name}", "give a folder with config.json and model.safetensors")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        with _seeded(seed):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                source,
                num_labels=1,
                dtype=torch.float32,
                # Under autocast on a CPU with bf16 units it is 1.7 times as fast as the fused form.
                attn_implementation="eager" if local_device().type == "cpu" else None,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as failure:  # the boundary: transformers raises whatever a folder makes it raise
        raise ModelError(
            f"cannot load the encoder {name}: {first_line(failure)}",
            "give a folder or hub id with config.json, model.safetensors and a tokenizer",
        ) from None
    if not hasattr(tokenizer, "backend_tokenizer") or tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} is not fast, or has no padding token", "give an encoder such as BERT"
        )
    return tokenizer, model, sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def new_vocabulary(texts: Sequence[str]) -> list[str]:
    """The vocabulary of a new encoder that is to read ``texts``."""
    return vocabulary_of(texts, MAX_WORDS)
