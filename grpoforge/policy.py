"""The policy: a causal language model, its tokenizer, and the log-probs they give to completions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from grpoforge.collate import split
from grpoforge.errors import CheckpointError
from grpoforge.logprobs import CausalForward, OnDistributions, OnRows
from grpoforge.precision import Precision
from grpoforge.shared_prefix import SharedPrefixMode
from grpoforge.types import Batch, TokenLogprobs


class Reference(Protocol):
    """The frozen reference policy."""

    def logprobs(self, batch: Batch) -> TokenLogprobs: ...

    def distributions(self, batch: Batch) -> tuple[TokenLogprobs, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Reader:
    """What a policy reads with: its tokenizer, and how far it reads. No weights."""

    tokenizer: Any
    context_length: int | None
    """Positions the model was made for; None when its configuration does not say."""
    notes: tuple[str, ...] = ()
    """What a person should know: ``no chat template: plain prompt template``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySize:
    """What a policy will hold, known from its configuration alone; bytes per token are those of all layers together."""

    num_parameters: int
    num_trainable: int
    weight_bytes: int
    trainable_bytes: int
    """Of the trainable parameters as they are held; gradients have as many."""
    autocast_bytes: int
    """Copies of the weights that the forward pass makes in a narrower dtype."""
    has_adapter: bool
    num_layers: int
    vocab_size: int
    context_length: int | None
    hidden_bytes_per_token: int
    """Of the hidden state between two layers, one of them."""
    saved_bytes_per_token: int
    """Kept for the backward pass without gradient checkpointing."""
    cache_bytes_per_token: int
    """Keys and values."""


class Policy:
    """A model and its tokenizer. ``version`` counts the optimizer steps its weights have taken."""

    def __init__(self, model: Any, tokenizer: Any, precision: Precision, *, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.notes = tuple(notes)
        self.version = 0
        disable_dropout(model)
        self.forward = CausalForward(model, precision)

    def share_prefix(self, mode: SharedPrefixMode) -> str:
        """Choose whether batches are packed with what rows share once; returns why they are not, else nothing.

        The reference of a later `freeze` does as the policy does.
        """
        self.forward = CausalForward(self.model, self.precision, mode)
        return "" if mode == "off" else self.forward.prefix.obstacle()

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
        return self.forward.logprobs(batch)

    def distributions(self, batch: Batch) -> tuple[TokenLogprobs, Tensor]:
        """`logprobs`, and the log-probs of the whole vocabulary at the ``n`` real tokens, ``[n, V]``, row-major."""
        return self.forward.distributions(batch)

    def backward(self, batch: Batch, on_rows: OnRows) -> float:
        """Add the gradient of ``on_rows`` over the rows of ``batch`` to the parameters; returns its value."""
        return self.forward.backward(batch, on_rows)

    def backward_distributions(self, batch: Batch, on_distributions: OnDistributions) -> float:
        """As `backward`, for an objective that reads `distributions`."""
        return self.forward.backward_distributions(batch, on_distributions)

    @torch.no_grad()
    def frozen_logprobs(self, batch: Batch, micro_batch_size: int) -> TokenLogprobs:
        """`logprobs` of all rows without gradient, ``micro_batch_size`` rows at a time."""
        return micro_batched(self.logprobs, batch, micro_batch_size)

    def freeze(self) -> Reference:
        """The reference policy: this policy as it is now. With LoRA it is the model under a disabled adapter."""
        if hasattr(self.model, "disable_adapter"):
            return AdapterDisabled(self)
        model = copy.deepcopy(self.model).requires_grad_(False).eval()
        forward = CausalForward(model, self.precision, self.forward.prefix.mode)
        return FrozenCopy(forward, original=self, version=self.version)

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

    forward: CausalForward
    original: Policy
    version: int
    """Of the policy when it was copied."""

    def equals(self, policy: Policy) -> bool:
        """True while ``policy`` is the one that was copied and has not moved since."""
        return policy is self.original and policy.version == self.version

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> TokenLogprobs:
        return self.forward.logprobs(batch)

    @torch.no_grad()
    def distributions(self, batch: Batch) -> tuple[TokenLogprobs, Tensor]:
        return self.forward.distributions(batch)


@dataclass(frozen=True, slots=True)
class AdapterDisabled:
    """The base model under a LoRA adapter: a reference that costs no memory."""

    policy: Policy

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> TokenLogprobs:
        with self.policy.model.disable_adapter():
            return self.policy.forward.logprobs(batch)

    @torch.no_grad()
    def distributions(self, batch: Batch) -> tuple[TokenLogprobs, Tensor]:
        with self.policy.model.disable_adapter():
            return self.policy.forward.distributions(batch)


def micro_batched(logprobs: Callable[[Batch], TokenLogprobs], batch: Batch, micro_batch_size: int) -> TokenLogprobs:
    """``logprobs(rows)`` for all rows of ``batch``, a few at a time."""
    parts = [logprobs(batch.rows(rows)) for rows in split(batch.num_rows, micro_batch_size)]
    return TokenLogprobs(
        logprobs=torch.cat([part.logprobs for part in parts]), entropy=torch.cat([part.entropy for part in parts])
    )


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
