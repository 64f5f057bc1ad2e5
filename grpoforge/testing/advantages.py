"""What an advantage promises: a number per completion, from scored rows only, whatever their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grpoforge.binding import ADVANTAGE_DATA, bind
from grpoforge.contracts import advantages_of
from grpoforge.testing.general import deterministic, leaves_data_alone, quick, same, state, travels
from grpoforge.testing.kit import Broken, NotApplicable, Refused, Rule, Subject, difference, expect_same, foreign, rule

Table = Mapping[str, Tensor]

INVARIANCES = ("shift", "scale", "group_sum")
"""What an advantage may declare in its attribute ``invariances``."""
TIGHT, NEAR, LOOSE = 1e-9, 1e-6, 2e-3
"""Tolerances: exact up to rounding; the same where float32 is not at stake; where an epsilon beside a std shows."""


@dataclass(frozen=True, kw_only=True)
class AdvantageSubject(Subject):
    """An advantage, asked about four groups of eight completions with two rewards."""

    wording: ClassVar[str] = "the table of rewards"

    @property
    def block(self) -> int:
        """Rows that it declares to belong together."""
        block: int = self.declared("block", 1)
        return block

    def whole(self, num_rows: int) -> int:
        """At least ``num_rows``, in whole blocks."""
        return -(-num_rows // self.block) * self.block

    def question(self) -> dict[str, Tensor]:
        return table(P=4, G=self.whole(8))

    def answer(self, built: Any, question: Table) -> Tensor:
        with foreign():
            return advantages_of(bind("advantage", built), question)[0]

    def of(self, question: Table) -> Tensor:
        """The advantages of a fresh instance, ``[P, G]``."""
        return self.answer(self.build(), question)


def table(*, P: int, G: int, seed: int = 0) -> dict[str, Tensor]:
    """Rewards of ``P`` groups of ``G``, one of 0 and 1 and one in between, and what else an advantage may ask for.

    With several groups a row of the second is not scored.
    """
    generator = torch.Generator().manual_seed(seed)
    correct = (torch.rand(P, G, generator=generator, dtype=torch.float64) < 0.5).double()
    style = torch.rand(P, G, generator=generator, dtype=torch.float64)
    rewards = torch.stack([correct, style], dim=2)
    rewards[1:2, 2:3] = torch.nan
    return {
        "rewards": rewards,
        "weights": torch.tensor([1.0, 0.3], dtype=torch.float64),
        "lengths": torch.randint(1, 40, (P, G), generator=generator).double(),
        "temperatures": 0.7 + 0.6 * torch.rand(P, G, generator=generator, dtype=torch.float64),
    }


def rows_of(question: Table, groups: Any, rows: Any) -> dict[str, Tensor]:
    """The table with its groups and the rows of each group chosen by index; weights stay."""
    return {name: value if name == "weights" else value[groups][:, rows] for name, value in question.items()}


def with_rewards(question: Table, rewards: Tensor) -> dict[str, Tensor]:
    """The table with other rewards."""
    return {**question, "rewards": rewards}


@rule(f"positional parameters are data, of: {', '.join(ADVANTAGE_DATA)}; all else is keyword-only", decisive=True)
def signature(subject: AdvantageSubject) -> str:
    """Its data are names that the engine knows, and `invariances`, if it declares any, are known too."""
    with foreign():
        bind("advantage", subject.build())
    unknown = [name for name in subject.declared("invariances", ()) if name not in INVARIANCES]
    if unknown:
        raise Broken(f"it declares the invariance `{unknown[0]}`; known: {', '.join(INVARIANCES)}")
    return f"reads {', '.join(one.name for one in subject.component.data)}"


@rule("return one finite number per completion, [P, G], without gradient; metrics are (sum, count)", decisive=True)
def returns(subject: AdvantageSubject) -> str:
    """It returns a finite number for each completion, `[P, G]`; metrics beside it are pairs of finite numbers."""
    found = subject.answer(subject.build(), subject.question())
    return f"{list(found.shape)}, from {float(found.min()):.3g} to {float(found.max()):.3g}"


@rule("compute in float64: rewards and weights are float64, so do not call `.float()`")
def float64(subject: AdvantageSubject) -> str:
    """Float64 in, float64 out."""
    found = subject.of(subject.question())
    if found.dtype != torch.float64:
        raise Broken(f"it returned {str(found.dtype).removeprefix('torch.')}")
    return "float64"


@rule("use statistics that know no order: means, medians, counts; never the first or the last row")
def row_order(subject: AdvantageSubject) -> str:
    """Reordering the completions of a group, or the blocks that it declares, reorders the advantages alone."""
    question = subject.question()
    count = subject.whole(8) // subject.block
    blocks = [one for one in (2, 6, 1, 0, 7, 5, 3, 4) if one < count] + [*range(8, count)]
    order = torch.tensor([one * subject.block + row for one in blocks for row in range(subject.block)])
    found, plain = subject.of(rows_of(question, slice(None), order)), subject.of(question)
    expect_same(found, plain[:, order], f"rows in the order {order.tolist()}", tolerance=TIGHT)
    return f"eight rows in another order{f', in blocks of {subject.block}' if subject.block > 1 else ''}"


@rule("treat every prompt alike, wherever it stands in the batch")
def group_order(subject: AdvantageSubject) -> str:
    """Reordering the prompts reorders the advantages, and nothing else."""
    question = subject.question()
    order = torch.tensor([2, 0, 3, 1])
    found, plain = subject.of(rows_of(question, order, slice(None))), subject.of(question)
    expect_same(found, plain[order], f"groups in the order {order.tolist()}", tolerance=TIGHT)
    return "four groups in another order"


@rule("set rows that no reward scored to 0 at the end: `torch.where(scored, advantages, 0)`")
def unscored_row_is_0(subject: AdvantageSubject) -> str:
    """A row that no reward scored (NaN in all of them) gets advantage 0."""
    question = subject.question()
    rewards = question["rewards"].clone()
    rewards[0, 2] = rewards[3, 7] = torch.nan
    for prompt in (None, 1):
        if prompt is not None:
            rewards[prompt] = torch.nan
        unscored = rewards.isnan().all(dim=2)
        found = subject.of(with_rewards(question, rewards))
        for place in (unscored & (found != 0)).nonzero().tolist():
            raise Broken(f"the unscored row {place} got {float(found[tuple(place)]):.6g}")
    return "three single rows and a whole group"


@rule("sum the rewards that are there: `grpoforge.types.weighted_total` does")
def partly_scored_row(subject: AdvantageSubject) -> str:
    """Rows that one reward scored and another did not get a finite advantage, and so does everybody else."""
    question = subject.question()
    rewards = question["rewards"].clone()
    rewards[0, 1, 0] = rewards[2, 4, 1] = torch.nan
    subject.of(with_rewards(question, rewards))
    return "two rows that lack one of two rewards"


@rule("leave NaN out of every count, sum and deviation: divide by the number of scored rows, not by G")
def unscored_rows_do_not_count(subject: AdvantageSubject) -> str:
    """Unscored rows and groups beside the scored ones change nothing for them."""
    question = subject.question()
    plain = subject.of(question)
    size = subject.whole(8)
    wide = rows_of(question, slice(None), torch.tensor([*range(size), *range(subject.whole(2))]))
    wide["rewards"] = wide["rewards"].clone()
    wide["rewards"][:, size:] = torch.nan
    expect_same(subject.of(wide)[:, :size], plain, "with two unscored rows in each group", tolerance=TIGHT)
    tall = rows_of(question, torch.tensor([0, 1, 2, 3, 0]), slice(None))
    tall["rewards"] = tall["rewards"].clone()
    tall["rewards"][4] = torch.nan
    expect_same(subject.of(tall)[:4], plain, "with an unscored group", tolerance=TIGHT)
    return "two unscored rows in each group, and an unscored group"


@rule("compare totals with `grpoforge.types.rounding` before dividing by a spread that is rounding alone")
def equal_totals_get_0(subject: AdvantageSubject) -> str:
    """When all totals of the batch are equal, every advantage is 0: rounding is not made a signal."""
    for num_rows, value in ((3, 0.1), (8, 1 / 3), (7, -7.3), (8, 0.0)):
        question = table(P=2, G=subject.whole(num_rows))
        question["rewards"] = torch.full_like(question["rewards"], value)
        _expect_0(subject.of(question), f"{num_rows} rows of {value:g}")
    rewards = torch.tensor([[[0.1, 0.2], [0.3, 0.0], [0.0, 0.3]]], dtype=torch.float64)
    rows = torch.arange(subject.whole(3))
    question = table(P=1, G=len(rows)) | {"rewards": rewards[:, rows % 3]}
    question |= {"weights": torch.ones(2, dtype=torch.float64)}
    if _sees_totals_only(subject):
        _expect_0(subject.of(question), "totals 0.1 + 0.2, 0.3 + 0 and 0 + 0.3")
    return f"groups of 3, 7 and 8 equal totals; {_one_agrees(subject)}"


def _one_agrees(subject: AdvantageSubject) -> str:
    """What a group that agrees gets among others that do not, and whether the others notice: observed only."""
    question = subject.question()
    rewards = question["rewards"].clone()
    rewards[1] = 0.5
    found = subject.of(with_rewards(question, rewards))
    own = "0" if not bool(found[1].any()) else f"{float(found[1, 0]):.3g}"
    first = subject.of(rows_of(with_rewards(question, rewards), slice(0, 1), slice(None)))
    apart = "do not see" if same(found[:1], first, TIGHT) else "see"
    return f"one such group among others gets {own}; groups {apart} each other"


def _sees_totals_only(subject: AdvantageSubject) -> bool:
    """Whether it does not matter how the rewards of a row add up to its total."""
    question = subject.question()
    rewards, weights = question["rewards"], question["weights"]
    total = (rewards * weights).sum(dim=2, keepdim=True) / weights[0]
    pooled = torch.cat([total, total * 0], dim=2)
    return same(subject.of(with_rewards(question, pooled)), subject.of(question), TIGHT)


def _expect_0(found: Tensor, what: str) -> None:
    if bool((found.abs() > TIGHT).any()):
        raise Broken(f"{what} got {[round(value, 6) for value in found[0].tolist()]}")


@rule("a single prompt or a single completion is a batch too; refuse what cannot work with a `GrpoforgeError`")
def batch_of_one(subject: AdvantageSubject) -> str:
    """One prompt, and one completion, give finite numbers, or a `GrpoforgeError` that says why not."""
    subject.of(table(P=1, G=subject.whole(8)))
    try:
        subject.of(table(P=1, G=1))
    except Refused as refusal:
        return f"one prompt works; one completion: {refusal}"
    return "one prompt, one completion"


@rule("add an epsilon where you divide, and scale before you square")
def extremes_are_finite(subject: AdvantageSubject) -> str:
    """Rewards of 1e-12 and of 1e12 give finite advantages."""
    question = subject.question()
    for size in (1e-12, 1e12):
        subject.of(with_rewards(question, question["rewards"] * size))
    return "rewards times 1e-12 and 1e12"


@rule("correct the function, or what its `invariances` attribute says")
def invariances(subject: AdvantageSubject) -> str:
    """What `invariances` declares holds: no change under a shift or a scale of all rewards, groups that sum to 0."""
    observed = _observe(subject)
    facts = ", ".join(f"{name} {'yes' if holds else 'no'}" for name, (holds, _) in observed.items())
    declared = subject.declared("invariances")
    if declared is None:
        raise NotApplicable(f"it declares none; observed: {facts}")
    for name in declared:
        holds, shown = observed[name]
        if not holds:
            raise Broken(f"it declares `{name}`, and {shown}")
    return f"declared: {', '.join(declared) or 'none'}; observed: {facts}"


def _observe(subject: AdvantageSubject) -> dict[str, tuple[bool, str]]:
    """For each invariance whether it holds, and what was seen."""
    question = subject.question()
    rewards, plain = question["rewards"], subject.of(question)
    shifted = difference(subject.of(with_rewards(question, rewards + 3.0)), plain, NEAR)
    scaled = difference(subject.of(with_rewards(question, rewards * 10.0)), plain, LOOSE)
    sums = plain.sum(dim=1)
    return {
        "shift": (not shifted, f"with 3 added to all rewards {shifted}"),
        "scale": (not scaled, f"with all rewards times 10 {scaled}"),
        "group_sum": (bool((sums.abs() < NEAR).all()), f"group sums are {[round(x, 6) for x in sums.tolist()]}"),
    }


RULES: tuple[Rule[AdvantageSubject], ...] = (
    signature,
    returns,
    float64,
    deterministic,
    leaves_data_alone,
    row_order,
    group_order,
    unscored_row_is_0,
    unscored_rows_do_not_count,
    partly_scored_row,
    equal_totals_get_0,
    batch_of_one,
    extremes_are_finite,
    invariances,
    state,
    travels,
    quick,
)
