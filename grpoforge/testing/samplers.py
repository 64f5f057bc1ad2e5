"""What a sampler promises: whole groups of completions, with log-probs that the policy agrees with."""

from __future__ import annotations

import contextlib
import functools
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from grpoforge.collate import collate
from grpoforge.config import ModelConfig
from grpoforge.policy import Policy
from grpoforge.testing.general import quick, travels
from grpoforge.testing.kit import Broken, Rule, Subject, expect_same, foreign, rule
from grpoforge.types import Completion, Prompt, Rollouts

QUESTIONS = (
    "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?",
    "How much is 2 + 2?",
    "Anna has 12 pens and gives 5 away. How many pens are left?",
)
GROUP_SIZE = 4
NUM_TOKENS = 12
"""Per completion at most, for samplers that have the option ``max_completion_length``."""
AGREEMENT = 1e-3
"""Between the log-probs that a sampler reports and the policy's own, in nats; both are float32."""


@dataclass(frozen=True, kw_only=True)
class SamplerSubject(Subject):
    """A sampler, asked for four completions for each of three prompts."""

    policy: Policy
    seconds: ClassVar[float] = 60.0

    def build(self) -> Any:
        known = {option.name for option in self.component.option_parameters}
        short = {"max_completion_length": NUM_TOKENS} if "max_completion_length" in known else {}
        with foreign():
            return self.component.build({**short, **self.options})

    @property
    def block(self) -> int:
        """Completions that it declares to draw together."""
        block: int = self.declared("block", 1)
        return block

    def question(self) -> tuple[Prompt, ...]:
        return tuple(_prompt(self.policy, index, text) for index, text in enumerate(QUESTIONS))

    def answer(self, built: Any, question: Sequence[Prompt]) -> list[list[Any]]:
        return _content(self.draw(built, question, seed=11))

    def draw(self, built: Any, prompts: Sequence[Prompt], *, seed: int, group_size: int = GROUP_SIZE) -> Rollouts:
        """Sampled rollouts, checked for their shape; ``group_size`` is rounded up to whole blocks."""
        size = -(-group_size // self.block) * self.block
        with foreign(), _quiet():
            rollouts = built.sample(self.policy, prompts, size, seed)
        return _checked(rollouts, prompts, size)

    def greedy(self, built: Any, prompts: Sequence[Prompt]) -> Rollouts:
        """Greedy rollouts, checked for their shape."""
        with foreign(), _quiet():
            rollouts = built.greedy(self.policy, prompts)
        return _checked(rollouts, prompts, 1)


@functools.cache
def tiny_policy() -> Policy:
    """The embedded ``tiny-math`` model."""
    from grpoforge.plugins import load_plugins

    policy: Policy = load_plugins().hook.load_policy(model=ModelConfig(name="tiny-math", precision="fp32"))
    return policy


def _prompt(policy: Policy, index: int, text: str) -> Prompt:
    ids = policy.tokenizer(text)["input_ids"]
    return Prompt(text=text, token_ids=tuple(ids), columns={"question": text}, index=index)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is data: what a sampler prints there is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _checked(rollouts: Any, prompts: Sequence[Prompt], group_size: int) -> Rollouts:
    if not isinstance(rollouts, Rollouts):
        raise Broken(f"it returned a {type(rollouts).__name__}, not Rollouts")
    if tuple(rollouts.prompts) != tuple(prompts):
        raise Broken("the prompts of the rollouts are not those that it was given, in that order")
    if rollouts.group_size != group_size:
        raise Broken(f"asked for {group_size} completions per prompt, it returned {rollouts.group_size}")
    return rollouts


def _content(rollouts: Rollouts) -> list[list[Any]]:
    return [[one.text, list(one.token_ids), list(one.logprobs), one.temperature] for one in rollouts.flat()]


@rule("return `Rollouts` with the given prompts, in their order, and `group_size` completions for each", decisive=True)
def returns(subject: SamplerSubject) -> str:
    """`sample` and `greedy` return whole groups for the prompts that they were given, in their order."""
    built, prompts = subject.build(), subject.question()
    rollouts = subject.draw(built, prompts, seed=11)
    subject.greedy(built, prompts)
    lengths = [len(one.token_ids) for one in rollouts.flat()]
    return f"{len(prompts)} groups of {rollouts.group_size}, {min(lengths)} to {max(lengths)} tokens"


@rule("count the final EOS as a token, never padding; `length` means that the limit was reached")
def completions(subject: SamplerSubject) -> str:
    """A completion has tokens of the vocabulary, within the limit, a fitting finish reason and the policy's version."""
    vocabulary = subject.policy.model.get_input_embeddings().weight.shape[0]
    rollouts = subject.draw(subject.build(), subject.question(), seed=11)
    for number, one in enumerate(rollouts.flat()):
        if fault := _fault(one, rollouts.max_completion_length, vocabulary, subject.policy):
            raise Broken(f"completion {number}: {fault}")
    reasons = [one.finish_reason for one in rollouts.flat()]
    return f"{reasons.count('stop')} ended, {reasons.count('length')} cut at {rollouts.max_completion_length} tokens"


def _fault(one: Completion, limit: int, vocabulary: int, policy: Policy) -> str:
    if not 1 <= len(one.token_ids) <= limit:
        return f"{len(one.token_ids)} tokens, and the limit is {limit}"
    if not all(0 <= token < vocabulary for token in one.token_ids):
        return f"a token outside the vocabulary of {vocabulary}"
    if one.finish_reason not in ("stop", "length"):
        return f"the finish reason {one.finish_reason!r}, not stop or length"
    if one.finish_reason == "length" and len(one.token_ids) < limit:
        return f"`length` after {len(one.token_ids)} of {limit} tokens"
    if one.policy_version != policy.version:
        return f"policy version {one.policy_version}, and the policy's is {policy.version}"
    return ""


@rule("report log-softmax of the logits over the row's temperature, at the token that was drawn")
def logprobs(subject: SamplerSubject) -> str:
    """The log-probs are finite, not above 0, and those that the policy itself gives at the row's temperature."""
    rollouts = subject.draw(subject.build(), subject.question(), seed=11)
    reported = [value for one in rollouts.flat() for value in one.logprobs]
    for value in reported:
        if not -1e9 < value <= 1e-6:
            raise Broken(f"a log-prob is {value}")
    shape = (rollouts.num_prompts, rollouts.group_size)
    batch = _batch(rollouts, shape, subject.policy)
    with torch.no_grad():
        own = subject.policy.logprobs(batch).logprobs[batch.completion_mask].tolist()
    gaps = [abs(one - other) for one, other in zip(reported, own, strict=True)]
    worst = gaps.index(max(gaps))
    if gaps[worst] > AGREEMENT:
        raise Broken(f"token {worst} of the batch has log-prob {reported[worst]:.5f}, of the policy {own[worst]:.5f}")
    return f"{len(gaps)} tokens, at most {gaps[worst]:.1e} from the policy's own"


def _batch(rollouts: Rollouts, shape: tuple[int, int], policy: Policy) -> Any:
    return collate(rollouts, pad_token_id=policy.tokenizer.pad_token_id).to(policy.device)


@rule("take all randomness from `seed`: fork the global generators or use a `torch.Generator` of your own")
def seeds(subject: SamplerSubject) -> str:
    """Equal seeds, equal rollouts, whatever the global generators say; another seed, other rollouts."""
    prompts, drawn = subject.question(), []
    for state, seed in ((1, 11), (2, 11), (3, 12)):
        torch.manual_seed(state)
        before = random.getstate()
        random.seed(state)
        drawn.append(_content(subject.draw(subject.build(), prompts, seed=seed)))
        random.setstate(before)
    expect_same(drawn[1], drawn[0], "two draws with seed 11")
    if drawn[2] == drawn[0]:
        raise Broken("seeds 11 and 12 gave the same rollouts")
    return "seed 11 twice, seed 12 once"


@rule("use a forked generator: other parts of the run draw from the global one, and a resumed run must draw the same")
def global_state(subject: SamplerSubject) -> str:
    """Sampling leaves torch's global random generator as it was."""
    before = torch.random.get_rng_state()
    subject.draw(subject.build(), subject.question(), seed=11)
    if not torch.equal(torch.random.get_rng_state(), before):
        raise Broken("the state of torch's global generator has changed")
    return "the global generator is as it was"


@rule("choose the token of the largest logit, without a draw")
def greedy(subject: SamplerSubject) -> str:
    """`greedy` gives one completion per prompt, the same every time, of the most probable tokens."""
    prompts, found = subject.question(), []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(subject.greedy(subject.build(), prompts))
    expect_same(_content(found[1]), _content(found[0]), "two greedy decodings")
    rollouts = found[0]
    for number, one in enumerate(rollouts.flat()):
        _expect_most_probable(subject.policy, rollouts.prompts[number], one, number)
    return f"{rollouts.num_prompts} completions, every token the most probable one"


@torch.no_grad()
def _expect_most_probable(policy: Policy, prompt: Prompt, one: Completion, number: int) -> None:
    ids = torch.tensor([[*prompt.token_ids, *one.token_ids]], device=policy.device)
    logits = policy.model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]
    behind = logits.max(dim=1).values - chosen
    if float(behind.max()) > AGREEMENT:
        place = int(behind.argmax())
        raise Broken(f"completion {number}: token {place} is {float(behind[place]):.3g} logits below the largest")


@rule("a single prompt with a single completion is a batch too")
def batch_of_one(subject: SamplerSubject) -> str:
    """One prompt with one completion, or as many as it declares as its `block`, works, after `sync` too."""
    built, prompts = subject.build(), subject.question()[:1]
    with foreign():
        built.sync(subject.policy)
    rollouts = subject.draw(built, prompts, seed=11, group_size=1)
    return f"{len(rollouts.flat()[0].token_ids)} tokens"


RULES: tuple[Rule[SamplerSubject], ...] = (
    returns,
    completions,
    logprobs,
    seeds,
    global_state,
    greedy,
    batch_of_one,
    travels,
    quick,
)
