"""The policy: a causal language model, its tokenizer, and the log-probs they give to completions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from grpoforge.collate import split
from grpoforge.errors import CheckpointError
from grpoforge.types import Batch, TokenLogprobs
from grpoforge_kernels import ops


@dataclass(frozen=True, slots=True)
class Precision:
    """How numbers are held: the weights' dtype, and the dtype the forward pass is cast to (None: not cast)."""

    weights: torch.dtype
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The autocast region of a forward pass on ``device``."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


class Reference(Protocol):
    """The frozen reference policy."""

    def logprobs(self, batch: Batch) -> TokenLogprobs: ...


class Policy:
    """A model and its tokenizer. ``version`` counts the optimizer steps its weights have taken."""

    def __init__(self, model: Any, tokenizer: Any, precision: Precision, *, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.notes = tuple(notes)
        self.version = 0
        disable_dropout(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def context_length(self) -> int | None:
        """Positions the model was made for; None when its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters that take gradients, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a completion: the tokenizer's EOS and those of the generation configuration."""
        configured = self.model.generation_config.eos_token_id
        several = configured if isinstance(configured, list | tuple) else [configured]
        return frozenset(int(i) for i in (self.tokenizer.eos_token_id, *several) if i is not None)

    def logprobs(self, batch: Batch) -> TokenLogprobs:
        """Log-prob and entropy of the completion tokens at each row's own temperature, ``[b, T]``."""
        return token_logprobs(self.model, batch, self.precision)

    @torch.no_grad()
    def frozen_logprobs(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """`logprobs` of all rows without gradient, ``micro_batch_size`` rows at a time, ``[B, T]``."""
        return micro_batched(self.logprobs, batch, micro_batch_size)

    def freeze(self) -> Reference:
        """The reference policy: this policy as it is now. With LoRA it is the model under a disabled adapter."""
        if hasattr(self.model, "disable_adapter"):
            return AdapterDisabled(self)
        model = copy.deepcopy(self.model).requires_grad_(False).eval()
        return FrozenCopy(model, self.precision)

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder: safetensors weights (or adapter), configuration, tokenizer."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Take the weights that `save` wrote to ``folder``.

        Raises:
            CheckpointError: the weights do not fit this model.
        """
        if hasattr(self.model, "disable_adapter"):
            _load_adapter(self.model, folder)
        else:
            _load_model(self.model, folder)


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    result = set_peft_model_state_dict(model, load_file(file) if file.is_file() else {})
    _check_fit(folder, [name for name in result.missing_keys if "lora_" in name], result.unexpected_keys)


def _load_model(model: Any, folder: Path) -> None:
    """transformers holds some weights by other names and shapes than it saves (a mixture's experts): let it read them.

    The configuration is the live model's, whatever the folder says, so that weights of another model do not fit.
    """
    if not any(folder.glob("model*.safetensors")):
        _check_fit(folder, ["model.safetensors"], [file.name for file in folder.glob("*.safetensors")])
    saved, found = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=model.dtype,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_fit(folder, found["missing_keys"], found["unexpected_keys"], [key for key, *_ in found["mismatched_keys"]])
    model.load_state_dict(saved.state_dict())


def _check_fit(
    folder: Path, missing: Collection[str], unexpected: Collection[str], mismatched: Collection[str] = ()
) -> None:
    problems = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    named = [f"{problem} {sorted(keys)[:3]}" for problem, keys in problems.items() if keys]
    if named:
        raise CheckpointError(
            f"the weights in {folder} do not fit the model: {', '.join(named)}",
            "resume with the model and the LoRA settings that the run was started with",
        )


@dataclass(frozen=True, slots=True)
class FrozenCopy:
    """A copy of the model that never changes."""

    model: Any
    precision: Precision

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> TokenLogprobs:
        return token_logprobs(self.model, batch, self.precision)


@dataclass(frozen=True, slots=True)
class AdapterDisabled:
    """The base model under a LoRA adapter: a reference that costs no memory."""

    policy: Policy

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> TokenLogprobs:
        with self.policy.model.disable_adapter():
            return token_logprobs(self.policy.model, batch, self.policy.precision)


def micro_batched(logprobs: Any, batch: Batch, micro_batch_size: int) -> Tensor:
    """``logprobs(rows).logprobs`` for all rows of ``batch``, a few at a time, ``[B, T]``."""
    parts = [logprobs(batch.rows(rows)).logprobs for rows in split(batch.num_rows, micro_batch_size)]
    return torch.cat(parts)


def token_logprobs(model: Any, batch: Batch, precision: Precision) -> TokenLogprobs:
    """Log-prob and entropy of each completion token, ``[b, T]``, 0 where masked.

    Positions count real tokens only, so the side and the amount of padding change nothing; columns that no row uses
    are not computed. Logits are kept for the completion alone and gathered at real tokens before any float32
    arithmetic.
    """
    prompt_ids, prompt_mask = _used(batch.prompt_ids, batch.prompt_mask)
    completion_ids, completion_mask = _used(batch.completion_ids, batch.completion_mask)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    rows, tokens = completion_mask.nonzero(as_tuple=True)
    # The first completion token is predicted at the prompt's last real token, every other at its left neighbor.
    num_prompt = prompt_ids.shape[1]
    last_prompt = num_prompt - 1 - prompt_mask.flip(1).long().argmax(dim=1)
    predicted_at = torch.where(tokens == 0, last_prompt[rows], num_prompt + tokens - 1)
    first_kept = int(last_prompt.min())
    with precision.context(prompt_ids.device):
        output = model(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=mask.shape[1] - first_kept,
            use_cache=False,
        )
    logits = output.logits[rows, predicted_at - first_kept]
    del output  # the rectangle of logits is the largest tensor of a step: only its real rows live on
    logprobs, entropy = ops.selective_log_softmax(logits, completion_ids[rows, tokens], batch.temperatures[rows])
    empty = torch.zeros(batch.completion_mask.shape, dtype=logprobs.dtype, device=logprobs.device)
    return TokenLogprobs(
        logprobs=empty.index_put((rows, tokens), logprobs),
        entropy=empty.index_put((rows, tokens), entropy),
    )


def _used(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``ids`` and ``mask [b, W]`` from the first to the last column that a row uses (at least one column).

    Completions begin in the first column, so their token numbers stay what they were.
    """
    columns = mask.any(dim=0).nonzero().squeeze(1)
    if not len(columns):
        return ids[:, :1], mask[:, :1]
    used = slice(int(columns[0]), int(columns[-1]) + 1)
    return ids[:, used], mask[:, used]


def disable_dropout(model: Any) -> None:
    """Set every dropout rate to 0: with dropout the step-0 ratio would not be 1.

    Many models hold rates as plain numbers for the functional form: ``dropout``, ``attn_pdrop``, ``layerdrop``.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def inference_mode(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradient inside, the previous mode outside."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
