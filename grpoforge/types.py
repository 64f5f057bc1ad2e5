"""What flows through a training step, and what a component must look like.

Legend of sizes, used in every shape below and in every docstring of the project:

    ``P`` prompts      ``G`` completions per prompt (a *group*)      ``B = P * G`` rows, prompt-major
    ``K`` rewards      ``L`` prompt tokens      ``T`` completion tokens      ``b`` rows of a micro-batch
    ``V`` vocabulary   ``H`` hidden size

Every type is frozen and complete when it is built; shapes are checked at construction (sizes only, never values, so
no device is ever synchronised). Times: *sampling* log-probs are what the sampler reported, *old* log-probs belong to
the policy at the start of the step, *reference* log-probs to the frozen reference policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
"""``stop``: the completion ended by itself (EOS or a stop string). ``length``: it was cut at the token limit."""

Coupling = Literal["token", "sequence", "batch"]
"""What a token's loss may depend on besides itself: nothing, its own row, or every row of the optimizer step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as the model sees it, and the dataset row it came from."""

    text: str
    """The rendered prompt (chat template or plain template applied)."""
    token_ids: tuple[int, ...]
    """The prompt's tokens, ``L`` of them, without padding."""
    columns: Mapping[str, Any]
    """Every column of the dataset row, by name: what rewards may ask for."""
    index: int
    """Number among the usable rows of its split, counted from 0."""
    origin: str = ""
    """Where the row stands in its dataset: ``train.jsonl:17``."""

    def __post_init__(self) -> None:
        assert self.token_ids, "a prompt has at least one token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion."""

    text: str
    """Decoded text without special tokens. Hostile data: never evaluate it, never render it as markup."""
    token_ids: tuple[int, ...]
    """Sampled tokens including the final EOS if there is one; never padding."""
    logprobs: tuple[float, ...]
    """Log-probability of each token under the policy that sampled it, logits divided by ``temperature``."""
    temperature: float
    """Sampling temperature of this row; current, old and reference log-probs divide by it too."""
    finish_reason: FinishReason
    policy_version: int
    """Number of optimizer steps the sampling policy had taken."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs), "one log-prob per token"
        assert self.temperature > 0, "temperatures are positive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """``G`` completions for each of ``P`` prompts, prompt-major.

    Example: two prompts, ``G = 2``: ``completions == ((a0, a1), (b0, b1))`` and ``flat() == [a0, a1, b0, b1]``.
    """

    prompts: tuple[Prompt, ...]
    completions: tuple[tuple[Completion, ...], ...]
    max_completion_length: int
    """The sampler's token limit: the longest completion it may return."""

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.completions) > 0, "one group per prompt"
        sizes = {len(group) for group in self.completions}
        assert len(sizes) == 1, f"groups differ in size: {sorted(sizes)}"

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        return len(self.completions[0])

    def flat(self) -> list[Completion]:
        """All completions as ``B`` rows, prompt-major."""
        return [completion for group in self.completions for completion in group]

    def flat_prompts(self) -> list[Prompt]:
        """The prompt of each of the ``B`` rows."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def column(self, name: str) -> list[Any]:
        """Dataset column ``name`` for each of the ``B`` rows. Raises KeyError when the dataset lacks it."""
        return [prompt.columns[name] for prompt in self.flat_prompts()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the rewards said about the rollouts."""

    names: tuple[str, ...]
    """The rewards' names, ``K`` of them, as they appear in metrics."""
    rewards: Tensor
    """``[P, G, K]`` float64 on the CPU, gates applied; NaN where a reward abstained."""
    raw: Tensor
    """``[P, G, K]`` float64: what each reward returned, before gates."""
    weights: Tensor
    """``[K]`` float64."""
    seconds: tuple[float, ...]
    """Wall time of each reward, ``K`` of them."""

    def __post_init__(self) -> None:
        num_rewards = len(self.names)
        assert self.rewards.ndim == 3 and self.rewards.shape[2] == num_rewards, "rewards are [P, G, K]"
        assert self.raw.shape == self.rewards.shape and self.weights.shape == (num_rewards,)
        assert len(self.seconds) == num_rewards

    def total(self) -> Tensor:
        """Weighted sum over the scored rewards, ``[P, G]`` float64; NaN where no reward scored the row.

        ``R_i = sum_k w_k R_ik`` over scored ``k``: a missing component counts as 0, as in TRL's ``nansum``.
        """
        return weighted_total(self.rewards, self.weights)


def weighted_total(rewards: Tensor, weights: Tensor) -> Tensor:
    """``[P, G, K]`` rewards and ``[K]`` weights to ``[P, G]`` totals; NaN where every reward abstained.

    A reward of weight 0 is measured and counts for nothing: a row that only it scored is not scored.
    """
    scored = ~rewards.isnan() & (weights != 0)
    total = (rewards.nan_to_num(nan=0.0) * weights).sum(dim=2)
    return torch.where(scored.any(dim=2), total, torch.full_like(total, float("nan")))


def rounding(rewards: Tensor, weights: Tensor) -> Tensor:
    """How far from their mean totals of a group may lie by rounding alone, ``[P, 1]``.

    1e-12 of the group's largest ``sum_k |w_k R_k|``, not of its largest total: what cancels has rounded before.
    """
    size = weighted_total(rewards.abs(), weights.abs()).nan_to_num(nan=0.0)
    return 1e-12 * size.amax(dim=1, keepdim=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rollouts as rectangles. Prompts are padded on the left or right, completions always on the right.

    Masks come from lengths, never from token ids, so a pad token equal to EOS is harmless.
    """

    prompt_ids: Tensor
    """``[B, L]`` int64."""
    prompt_mask: Tensor
    """``[B, L]`` bool, True on real tokens."""
    completion_ids: Tensor
    """``[B, T]`` int64."""
    completion_mask: Tensor
    """``[B, T]`` bool, True on tokens that were sampled (the final EOS included)."""
    sampling_logprobs: Tensor
    """``[B, T]`` float32, 0 where masked."""
    temperatures: Tensor
    """``[B]`` float64, positive."""

    def __post_init__(self) -> None:
        rows, tokens = self.completion_ids.shape
        assert self.prompt_ids.shape == self.prompt_mask.shape and self.prompt_ids.shape[0] == rows
        assert self.completion_mask.shape == (rows, tokens) == self.sampling_logprobs.shape
        assert self.temperatures.shape == (rows,)
        assert self.prompt_mask.dtype == self.completion_mask.dtype == torch.bool

    @property
    def num_rows(self) -> int:
        return self.completion_ids.shape[0]

    def rows(self, index: Tensor | slice) -> Batch:
        """The rows at ``index``, in that order."""
        return Batch(
            prompt_ids=self.prompt_ids[index],
            prompt_mask=self.prompt_mask[index],
            completion_ids=self.completion_ids[index],
            completion_mask=self.completion_mask[index],
            sampling_logprobs=self.sampling_logprobs[index],
            temperatures=self.temperatures[index],
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            prompt_ids=self.prompt_ids.to(device),
            prompt_mask=self.prompt_mask.to(device),
            completion_ids=self.completion_ids.to(device),
            completion_mask=self.completion_mask.to(device),
            sampling_logprobs=self.sampling_logprobs.to(device),
            temperatures=self.temperatures.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What a policy says about the completion tokens of a batch."""

    logprobs: Tensor
    """``[b, T]`` float32: log-prob of each completion token at its row's temperature; 0 where masked."""
    entropy: Tensor
    """``[b, T]`` float32: entropy in nats of the distribution each token came from; 0 where masked."""

    def __post_init__(self) -> None:
        assert self.logprobs.shape == self.entropy.shape and self.logprobs.ndim == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss may look at: one micro-batch of ``b`` rows."""

    logprobs: Tensor
    """``[b, T]``, with gradient."""
    old_logprobs: Tensor
    """``[b, T]``, no gradient."""
    sampling_logprobs: Tensor
    """``[b, T]``, no gradient."""
    advantages: Tensor
    """``[b, T]``: the row's advantage on every token."""
    completion_mask: Tensor
    """``[b, T]`` bool."""
    entropy: Tensor
    """``[b, T]``, no gradient: entropy in nats of the current policy at each token."""
    seed: int = 0
    """Fixes whatever is random in a loss; another number at every optimizer step."""

    def __post_init__(self) -> None:
        shape = self.logprobs.shape
        assert len(shape) == 2, "log-probs are [b, T]"
        assert self.old_logprobs.shape == self.sampling_logprobs.shape == self.entropy.shape == shape
        assert self.advantages.shape == self.completion_mask.shape == shape

    @property
    def log_ratio(self) -> Tensor:
        """``log pi(token) - log pi_old(token)``, ``[b, T]``; masked positions are replaced by 0 *before* any exp.

        Multiplying by the mask afterwards would leave ``0 * inf = NaN`` in the backward pass.
        """
        difference = self.logprobs - self.old_logprobs
        return torch.where(self.completion_mask, difference, torch.zeros_like(difference))

    @property
    def ratio(self) -> Tensor:
        """Importance ratio ``pi / pi_old`` per token, ``[b, T]``; 1 where masked."""
        return self.log_ratio.exp()

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of each row, ``[b, 1]`` in the dtype of ``logprobs``; 1 for a row without any."""
        return self.completion_mask.sum(dim=1, keepdim=True).clamp(min=1).to(self.logprobs.dtype)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sum of ``values [b, T]`` over each row's completion tokens, ``[b, 1]``."""
        return torch.where(self.completion_mask, values, torch.zeros_like(values)).sum(dim=1, keepdim=True)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean of ``values [b, T]`` over each row's completion tokens, ``[b, 1]``; 0 for a row without any."""
        return self.sequence_sum(values) / self.lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did: for trackers, the rollouts file and the screen."""

    step: int
    """Steps finished, counted from 1."""
    metrics: Mapping[str, float]
    """By metric name (TRL's where TRL has one)."""
    rollouts: Rollouts
    scores: Scores
    advantages: Tensor
    """``[P, G]`` float64, as applied."""
    shares: Tensor
    """``[P, G, K]`` float64: each reward's part of the advantage (the ledger)."""

    def __post_init__(self) -> None:
        assert self.advantages.shape == self.scores.rewards.shape[:2]
        assert self.shares.shape == self.scores.rewards.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a finished run did: for ``run_finished``."""

    run_dir: str
    step: int
    metrics_before: Mapping[str, float]
    metrics_after: Mapping[str, float]
    seconds: float


class Reward(Protocol):
    """``(completions, <data by name>, *, <options>) -> list[float | None]``, length ``B``; None abstains."""

    def __call__(self, *data: Any, **options: Any) -> Sequence[float | None]: ...


class Advantage(Protocol):
    """``(<data by name>, *, <options>) -> advantages [P, G]``; float64 in and out, unscored rows 0.

    Data: ``rewards [P, G, K]`` and ``weights [K]``, ``lengths [P, G]`` in tokens, ``temperatures [P, G]``. Or returned
    with metrics, ``(advantages, {name: (sum, count)})``: what is reported is the sum over the count, of all rows.
    """

    def __call__(self, *data: Tensor, **options: Any) -> Tensor | tuple[Tensor, Mapping[str, tuple[float, float]]]: ...


class KLEstimator(Protocol):
    """``(<data by name>, *, <options>) -> [b, T]``, an estimate of KL(policy || reference) at each token.

    Data, ``[b, T]`` each: ``logprobs``, ``ref_logprobs``, ``old_logprobs``, ``sampling_logprobs``,
    ``completion_mask``. Or ``distribution [n, V]`` and ``ref_distribution [n, V]``, the log-probs of every token of
    the vocabulary at the ``n`` real tokens; the estimate is then ``[n]``.
    """

    def __call__(self, *data: Tensor, **options: Any) -> Tensor: ...


class Correction(Protocol):
    """``(<data by name>, *, <options>) -> weights [b, T]`` that multiply the policy loss of each token.

    Data, ``[b, T]`` each and without gradient: ``logprobs``, ``old_logprobs``, ``sampling_logprobs``, ``advantages``,
    ``completion_mask``; and ``target_logprobs``, ``old_logprobs`` with every row at its own ``target_temperature``.
    """

    def __call__(self, *data: Tensor, **options: Any) -> Tensor: ...


class Loss(Protocol):
    """``(inputs, *, <options>) -> (per_token_loss [b, T], metrics of [b, T])``; normalizes nothing."""

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]: ...


class PolicyView(Protocol):
    """What a sampler may use of the policy."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def version(self) -> int: ...
    @property
    def precision(self) -> Any: ...
    def eos_token_ids(self) -> frozenset[int]: ...


@runtime_checkable
class Sampler(Protocol):
    """Draws completions. A sampler must take all randomness from ``seed``: equal arguments, equal rollouts."""

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts: ...

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        """One completion per prompt, always the most probable token: what evaluation measures."""
        ...

    def sync(self, policy: PolicyView) -> None:
        """Called after each step: bring the sampler's weights up to the policy's."""


@runtime_checkable
class Tracker(Protocol):
    """Receives every report. ``close`` is called once, also after a failure."""

    def step_finished(self, report: StepReport) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """A component with state: the state is stored in checkpoints. JSON values and tensors only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
