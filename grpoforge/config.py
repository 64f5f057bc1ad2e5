"""Every key of a run: strict, complete and frozen.

How the values come together (recipe, file, ``--set``, flags) stands in `grpoforge.layers`. This module imports no
torch, so that a mistake in a file is answered at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from grpoforge.errors import ConfigError

LARGEST = 2**63 - 1
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=1_000_000)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class Origins:
    """Which layer each key's value came from; plays no part in whether two configurations are equal."""

    by_key: Mapping[tuple[str, ...], str] = field(default_factory=dict, compare=False)

    def of(self, *path: str) -> str:
        """`` (from my.yaml)`` for the key ``path`` or the nearest above it; empty when it is a default."""
        for length in range(len(path), 0, -1):
            if origin := self.by_key.get(path[:length]):
                return f" (from {origin})"
        return ""


class Section(BaseModel):
    """A group of keys: unknown ones are errors, nothing is converted, values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Part(BaseModel):
    """A component by name; every other key is one of its options, checked against its signature."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    name: Annotated[str, Field(min_length=1)]
    """``name``, or ``plugin:name`` where two plugins share a name."""

    @property
    def options(self) -> dict[str, Any]:
        """The component's options as given."""
        return dict(self.model_extra or {})


class RewardPart(Part):
    """A reward, its weight and its gate."""

    weight: float | None = None
    """Weight in the sum; the reward's registered weight when not given."""
    gate: str | None = "default"
    """Name of the reward that must reach 1 before this one pays; null for none; ``default``: as registered."""


class KLPart(Part):
    """The KL estimator, how much of it, and where it goes."""

    beta: Annotated[float, Field(ge=0)] = 0.04
    """Coefficient of the KL; 0 loads no reference."""
    placement: Literal["loss", "reward"] = "loss"
    """``loss``: a term per token. ``reward``: its sum over a completion is subtracted from the completion's reward."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Mean KL per token that an adaptive ``beta`` is steered to; null keeps ``beta`` constant."""
    horizon: Positive = 10_000
    """Completions over which an adaptive ``beta`` changes."""


class EntropyConfig(Section):
    """Entropy bonus: keeps the policy from becoming sure of itself too early."""

    coef: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the policy's entropy in the loss; where it starts when ``target`` is set."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Nats per token: the bonus acts only while the entropy is at or below this; null keeps ``coef`` constant."""
    delta: Annotated[float, Field(ge=0)] = 0.005
    """How much an adaptive coefficient changes per step."""
    max_coef: Annotated[float, Field(ge=0)] = 1.0
    """Largest adaptive coefficient."""


class LoRAConfig(Section):
    """Low-rank adapters through peft."""

    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """Scale: updates are multiplied by ``alpha / r``."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter."""


class ModelConfig(Section):
    """Which model, and how its numbers are held."""

    name: str = "tiny-math"
    """A local folder, a hub id, or the name of an embedded model."""
    revision: str | None = None
    """Commit of the hub repository."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 on GPUs that have it, fp32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    lora: LoRAConfig | None = None
    """Train adapters instead of all weights; the reference is the model without them."""


class DataConfig(Section):
    """Which problems, and how they become prompts."""

    dataset: str = "tiny-math"
    """A registered dataset, a ``.jsonl``/``.parquet`` file, a folder saved by ``datasets``, or a hub id."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of a registered dataset."""
    eval_dataset: str | None = None
    """File, folder or hub id of the evaluation problems; by default a split of the dataset's own, or rows held out."""
    num_eval: Positive = 512
    """Problems to evaluate on."""
    prompt: str = "question"
    """Column that holds the prompt's text."""
    answer: str | None = None
    """Column that rewards read as ``answer``; by default the one of that name, if there is one."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Columns to rename: old name to new name."""
    system_prompt: str | None = None
    """Text of the system message."""
    instruction: str | None = None
    """Text under every question, or around it where ``{prompt}`` stands in it."""
    few_shot: Annotated[int, Field(ge=0, le=1000)] = 0
    """Worked examples before every question, drawn by seed from the training rows; never the question itself."""
    solution: str | None = None
    """Column with the worked solutions that examples show; by default ``solution``, or else ``answer``."""
    template: str = "Question: {prompt}\nAnswer:"
    """Plain template for models without a chat template."""
    max_prompt_length: Positive | None = None
    """Longest prompt in tokens; by default what the model's context leaves beside one completion."""
    long_prompts: Literal["drop", "stop"] = "drop"
    """Leave out prompts over the limit with a warning, or stop at the first."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used instead of stopping at the first."""
    streaming: bool = False
    """Read the training rows as they are needed instead of all at once; needs ``max_steps``."""
    shuffle_buffer: Size = 10_000
    """Rows of a stream that are held in memory and drawn from at random."""

    @field_validator("template")
    @classmethod
    def _shows_the_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("`{prompt}` is not in it, so every problem would look the same")
        return template


class BatchConfig(Section):
    """The arithmetic of a step, over all ranks."""

    prompts_per_step: Size = 16
    """Prompts, ``P``."""
    completions_per_prompt: Size = 8
    """Completions of each prompt, ``G``."""
    minibatch_size: Positive | None = None
    """Completions per optimizer step; all of the batch by default."""
    micro_batch_size: Positive | None = None
    """Completions per forward pass; the minibatch by default."""
    epochs: Positive = 1
    """Passes over each batch."""
    dynamic_sampling: NonNegative = 0
    """Extra draws per step that may replace prompts whose completions all scored alike; 0: keep them."""
    mask_truncated_completions: bool = False
    """Leave completions that were cut at the length limit out of the loss."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens, those of highest entropy, that the policy loss is taken on."""
    shared_prefix: Literal["auto", "on", "off"] = "auto"
    """Compute what rows share once, and no padding. ``auto``: where the model allows it and it saves work;
    ``on``: always, or fail; ``off``: never. Changes speed, memory and rounding."""
    old_logprobs: Literal["auto", "recompute", "sampler"] = "auto"
    """Where old log-probs come from. ``recompute``: a pass over the batch; ``sampler``: what the sampler reported,
    where that is the policy's; ``auto``: the update itself where it is one optimizer step, else the sampler in fp32."""
    sampler_tolerance: Annotated[float, Field(ge=0)] = 1e-4
    """Largest gap between the sampler's log-prob of a token and the policy's at which the sampler's are taken; checked
    on some rows of each step."""

    @field_validator("shared_prefix", mode="before")
    @classmethod
    def _yaml_reads_on_and_off(cls, value: Any) -> Any:
        """``on`` and ``off`` are true and false in YAML."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and second moment."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""


class EvalConfig(Section):
    """Measuring on problems that are never trained on."""

    every: NonNegative = 0
    """Steps between evaluations; 0: only before and after."""
    reward: str | None = None
    """The reward that says whether a completion is right (1.0 is right); by default the run's first reward."""
    samples: NonNegative = 0
    """Completions per problem drawn as in training, beside the greedy one; 0 for none."""
    k: list[Positive] | None = None
    """Of pass@k and maj@k; by default 1, 2, 4, ... and ``samples``."""
    batch_size: Positive = 256
    """Completions decoded at a time."""
    metric: str = "eval_pass@1"
    """Metric that names the best checkpoint."""
    direction: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Positive = 2
    """Checkpoints kept, besides the best."""


class ScoringConfig(Section):
    """What happens when a reward misbehaves."""

    on_error: Literal["stop", "skip"] = "stop"
    """``stop`` the run, or ``skip``: leave the rows unscored and warn."""
    time_limit: Annotated[float, Field(gt=0)] = 60.0
    """Seconds a reward may take for one batch."""


class Config(Section):
    """A complete run."""

    recipe: str = "tiny-math"
    """Where the values started from."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rewards: list[RewardPart] = Field(default_factory=lambda: [RewardPart(name="math")])
    sampler: Part = Part(name="native")
    advantage: Part = Part(name="group")
    loss: Part = Part(name="clip")
    kl: KLPart = KLPart(name="k3")
    corrections: list[Part] = Field(default_factory=list)
    """Off-policy corrections: their weights multiply the policy loss of each token."""
    entropy: EntropyConfig = EntropyConfig()
    reduction: Literal["sequence", "token", "constant", "sequence_sum"] = "token"
    """How per-token losses become one number."""
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    max_steps: Positive | None = None
    """Steps to take at most; by default those of ``epochs``."""
    epochs: Positive | None = None
    """Passes over the training problems at most; one when ``max_steps`` is not given either."""
    seed: NonNegative = 0
    """Fixes the order of the data and every sample."""
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scoring: ScoringConfig = ScoringConfig()
    trackers: list[Part] = Field(
        default_factory=lambda: [Part(name=n) for n in ("console", "jsonl", "tensorboard", "rollouts")]
    )
    plugins: list[str] = Field(default_factory=list)
    """Local plugin files."""

    _origins: Origins = PrivateAttr(default_factory=Origins)

    @field_validator("corrections", mode="before")
    @classmethod
    def _named_corrections(cls, value: Any) -> Any:
        """``{tis: {cap: 2}}``, which is what ``--set corrections.tis.cap=2`` makes, as a list of parts."""
        if not isinstance(value, Mapping):
            return value
        for name, options in value.items():
            if not isinstance(options, Mapping | None):
                raise ValueError(f"`{name}` holds options, such as `corrections.{name}.OPTION=VALUE`")
        return [{"name": name, **(options or {})} for name, options in value.items()]

    @model_validator(mode="after")
    def _rewards_are_there(self) -> Config:
        if not self.rewards:
            raise ValueError("a run needs at least one reward")
        return self

    @property
    def origins(self) -> Origins:
        """Where the values came from, for messages."""
        return self._origins

    def with_origins(self, origins: Origins) -> Config:
        """The same configuration that knows where its values came from."""
        copy = self.model_copy()
        copy._origins = origins
        return copy

    @property
    def minibatch_size(self) -> int:
        """Completions per optimizer step."""
        return self.batch.minibatch_size or self.batch.prompts_per_step * self.batch.completions_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per step."""
        rows = self.batch.prompts_per_step * self.batch.completions_per_prompt
        return self.batch.epochs * (rows // self.minibatch_size)


def check_batch(config: Config) -> None:
    """Refuse batch sizes that cannot be divided as asked, naming the nearest that can.

    Raises:
        ConfigError: a minibatch that does not divide the batch, or a micro-batch larger than it.
    """
    batch, origins = config.batch, config.origins
    group, rows = batch.completions_per_prompt, batch.prompts_per_step * batch.completions_per_prompt
    if rows % config.minibatch_size:
        raise ConfigError(
            f"`batch.minibatch_size` is {config.minibatch_size}{origins.of('batch', 'minibatch_size')}, which does not "
            f"divide {batch.prompts_per_step} prompts x {group} completions = {rows}",
            "use "
            + " or ".join(f"`--set batch.minibatch_size={n}`" for n in _nearest_divisors(config.minibatch_size, rows)),
        )
    micro = batch.micro_batch_size
    if micro is not None and micro > config.minibatch_size:
        raise ConfigError(
            f"`batch.micro_batch_size` is {micro}{origins.of('batch', 'micro_batch_size')}, more than the "
            f"{config.minibatch_size} completions of a minibatch",
            f"use at most {config.minibatch_size}",
        )


def check_samples(config: Config) -> None:
    """Refuse a ``k`` of pass@k that is more than the completions there are of a problem.

    Raises:
        ConfigError: ``eval.k`` goes beyond ``eval.samples``.
    """
    largest, samples = max(config.eval.k or [0]), config.eval.samples
    if largest > samples:
        raise ConfigError(
            f"`eval.k` has {largest}{config.origins.of('eval', 'k')}, and there are {samples} samples of each problem"
            f"{config.origins.of('eval', 'samples')}",
            f"draw at least {largest} (`--set eval.samples={largest}`), or leave {largest} out",
        )


def _nearest_divisors(size: int, whole: int) -> list[int]:
    """The divisors of ``whole`` on both sides of ``size``."""
    small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
    divisors = {*small, *(whole // n for n in small)}
    below = max(n for n in divisors if n < size)
    above = min((n for n in divisors if n > size), default=None)
    return [below] if above is None else [below, above]
