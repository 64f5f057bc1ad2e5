"""Sampling through transformers' ``generate``: slow, but right for every causal language model it supports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from grpoforge.collate import split
from grpoforge.policy import inference_mode
from grpoforge.types import Completion, FinishReason, PolicyView, Prompt, Rollouts
from grpoforge_plugins.samplers import options


class HFSampler:
    """Draws every completion of a group at one temperature.

    The log-probs it reports are those of the whole distribution ``softmax(logits / temperature)``. ``top_k``, ``top_p``
    and ``min_p`` cut that distribution when a token is drawn but not in the log-prob, so that current, old and
    reference log-probs stay comparable; the draws are then off-policy by that much.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, "logits are divided by it before softmax"] = 1.0,
        max_completion_length: Annotated[int, "tokens per completion at most"] = 512,
        top_p: Annotated[float, "draw from the smallest set of tokens with this much probability"] = 1.0,
        top_k: Annotated[int, "draw from this many most probable tokens; 0 for all"] = 0,
        min_p: Annotated[float, "leave out tokens below this share of the top token's probability"] = 0.0,
        batch_size: Annotated[int, "completions decoded at a time; 0 for all at once"] = 0,
    ) -> None:
        options.check(
            options.positive("temperature", temperature),
            options.at_least_one("max_completion_length", max_completion_length),
            *options.cuts(top_p, top_k, min_p),
            options.or_all("batch_size", batch_size),
        )
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.batch_size = batch_size
        self.cuts = {"top_p": top_p, "top_k": top_k, "min_p": min_p or None}

    @property
    def rows_at_a_time(self) -> int | None:
        """Completions decoded at a time; None for all of a step."""
        return self.batch_size or None

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        """``group_size`` completions per prompt; all randomness comes from ``seed``."""
        with seeded(seed, policy.device):
            return self._rollouts(policy, prompts, group_size, do_sample=True, **self.cuts)

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        """The most probable completion of each prompt."""
        return self._rollouts(policy, prompts, 1, do_sample=False)

    def _rollouts(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, **how: Any) -> Rollouts:
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        completions: list[Completion] = []
        for part in split(len(rows), self.batch_size or len(rows)):
            temperatures = [self.temperature] * len(rows[part])
            completions += generate(policy, rows[part], temperatures, self.max_completion_length, **how)
        return Rollouts(
            prompts=tuple(prompts),
            completions=tuple(tuple(completions[group]) for group in split(len(rows), group_size)),
            max_completion_length=self.max_completion_length,
        )

    def sync(self, policy: PolicyView) -> None:
        """Nothing to do: it samples from the policy's own weights."""


def generate(
    policy: PolicyView,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    max_completion_length: int,
    *,
    do_sample: bool,
    **cuts: Any,
) -> list[Completion]:
    """One completion per prompt, row ``i`` at ``temperatures[i]``, greedy unless ``do_sample``.

    The model's own generation settings (repetition penalty, top-k, ...) are left out: they would change what is drawn
    without changing the log-probs. Only its EOS tokens are kept.
    """
    eos = sorted(policy.eos_token_ids())
    recorder = _Recorder(torch.tensor(temperatures, dtype=torch.float64, device=policy.device))
    config = GenerationConfig(
        do_sample=do_sample,
        max_new_tokens=max_completion_length,
        eos_token_id=eos or None,
        pad_token_id=policy.tokenizer.pad_token_id,
        **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} | cuts if do_sample else {}),
    )
    ids, mask = _left_padded(prompts, policy.tokenizer.pad_token_id, policy.device)
    with inference_mode(policy.model), _own_generation_config(policy.model), policy.precision.context(policy.device):
        sequences = policy.model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([recorder])
        )
    tokens = sequences[:, ids.shape[1] :]
    logprobs = recorder.finish(tokens)
    rows = [row[: _length(row, eos)] for row in tokens.tolist()]
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [
        Completion(
            text=text,
            token_ids=tuple(row),
            logprobs=tuple(values[: len(row)]),
            temperature=temperature,
            finish_reason=_finish_reason(row, eos),
            policy_version=policy.version,
        )
        for text, row, values, temperature in zip(texts, rows, logprobs.tolist(), temperatures, strict=True)
    ]


class _Recorder(LogitsProcessor):  # type: ignore[misc]
    """Divides each row's logits by its temperature and keeps the log-prob of the token that was then drawn.

    Only the last step's log-softmax is held, so memory is ``B * V`` and not ``B * T * V``.
    """

    def __init__(self, temperatures: Tensor) -> None:
        self.temperatures = temperatures
        self.drawn: list[Tensor] = []
        self.pending: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1])
        wide = torch.promote_types(scores.dtype, torch.float32)
        scaled = scores.to(wide) / self.temperatures.to(wide)[:, None]
        self.pending = scaled.log_softmax(dim=1)
        return scaled

    def finish(self, tokens: Tensor) -> Tensor:
        """Log-prob of every generated token, ``[B, T]`` for ``tokens [B, T]``; meaningless after a row's EOS."""
        self._record(tokens[:, -1])
        return torch.stack(self.drawn, dim=1)

    def _record(self, last: Tensor) -> None:
        if self.pending is not None:
            self.drawn.append(self.pending.gather(1, last[:, None]).squeeze(1))


def _length(row: Sequence[int], eos: Sequence[int]) -> int:
    """Tokens up to and including the first EOS; all of them when there is none."""
    ends = [row.index(token) for token in eos if token in row]
    return min(ends) + 1 if ends else len(row)


def _finish_reason(row: Sequence[int], eos: Sequence[int]) -> FinishReason:
    return "stop" if row[-1] in eos else "length"


def _left_padded(prompts: Sequence[Prompt], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, width - len(prompt.token_ids) :] = 1
    return ids.to(device), mask.to(device)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global torch generators seeded inside, untouched outside: ``generate`` takes no generator of its own."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Hide the model's generation settings: ``generate`` fills every unset value of ours from them."""
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs
