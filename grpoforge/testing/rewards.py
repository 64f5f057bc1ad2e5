"""What a reward promises: a number or None per completion, whatever the text, whoever stands beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from grpoforge.errors import RewardError
from grpoforge.scoring import BUILTIN_DATA, BoundReward, score
from grpoforge.testing.general import deterministic, quick, state, travels
from grpoforge.testing.kit import Broken, NotApplicable, Rule, Subject, difference, expect_same, rule, show
from grpoforge.testing.rollouts import HOSTILE, UNREADABLE, Columns, make_rollouts, replies, reply, row_columns
from grpoforge.types import Rollouts

CHAT_DATA = ("completions", "prompts", "completion_ids")
"""What a TRL reward is always given."""


@dataclass(frozen=True, kw_only=True)
class RewardSubject(Subject):
    """A reward, asked about four completions for each of three prompts."""

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Dataset columns that it reads, three values each; others are made up."""

    seconds: ClassVar[float] = 10.0

    def question(self) -> Rollouts:
        return make_rollouts([replies(str(prompt)) for prompt in range(3)], self.rows())

    def rows(self) -> list[Columns]:
        """The dataset's row of each of the three prompts."""
        given = [{name: values[row] for name, values in self.columns.items()} for row in range(3)]
        return [row_columns(str(row), self.reads) | given[row] for row in range(3)]

    @property
    def reads(self) -> tuple[str, ...]:
        """The dataset columns that it asks for."""
        data = (one for one in self.component.data if one.required or one.name in self.columns)
        return tuple(one.name for one in data if one.name not in BUILTIN_DATA)

    def answer(self, built: Any, question: Rollouts) -> list[list[float]]:
        found: list[list[float]] = self.scores(built, question).tolist()
        return found

    def scores(self, built: Any, rollouts: Rollouts) -> Tensor:
        """The rewards, ``[P, G]``, NaN where not scored, asked for as a run asks."""
        columns = tuple(rollouts.prompts[0].columns)
        if self.component.accepts_any_data:
            named = [one.name for one in self.component.data if one.name in BUILTIN_DATA]
            data = tuple(dict.fromkeys([*CHAT_DATA, *named, *columns]))
        else:
            data = tuple(n.name for n in self.component.data if n.required or n.name in (*BUILTIN_DATA, *columns))
        bound = BoundReward(name=self.component.name, function=built, data=data, weight=1.0)
        try:
            return score(rollouts, [bound], time_limit=self.seconds).raw[:, :, 0]
        except RewardError as error:
            raise Broken(error.message) from error

    def of(self, rollouts: Rollouts) -> Tensor:
        """The rewards that a fresh instance gives, ``[P, G]``."""
        return self.scores(self.build(), rollouts)

    @property
    def compares(self) -> bool:
        """True when it asks for ``rollouts``, to compare a completion with its siblings."""
        return any(one.name == "rollouts" for one in self.component.data)


@rule("return one float, or None for 'not scored', per completion", decisive=True)
def returns(subject: RewardSubject) -> str:
    """It returns one finite number, or None, for each completion."""
    found = subject.of(subject.question())
    scored = found[~found.isnan()]
    reads = f"; reads the columns {', '.join(subject.reads)}" if subject.reads else ""
    if not len(scored):
        return f"None for all {found.numel()} completions{reads}"
    span = f"from {float(scored.min()):g} to {float(scored.max()):g}"
    return f"{len(scored)} of {found.numel()} scored, {span}{reads}"


@rule("look at each completion for itself; for a comparison of siblings take `rollouts`")
def order(subject: RewardSubject) -> str:
    """Reordering completions and prompts reorders the rewards, and nothing else."""
    rollouts = subject.question()
    plain = subject.of(rollouts)
    rows, groups = [2, 0, 3, 1], [1, 2, 0]
    moved = dataclasses.replace(
        rollouts,
        prompts=tuple(rollouts.prompts[group] for group in groups),
        completions=tuple(tuple(rollouts.completions[group][row] for row in rows) for group in groups),
    )
    expect_same(subject.of(moved), plain[groups][:, rows], f"prompts in the order {groups}, completions {rows}")
    return "three prompts and four completions in another order"


@rule("do not compare with other rows: how many there are depends on the batch and on the number of processes")
def alone(subject: RewardSubject) -> str:
    """A completion alone in its batch gets the reward that it gets among others, unless the reward reads `rollouts`."""
    rollouts = subject.question()
    plain = subject.of(rollouts)
    for prompt in range(rollouts.num_prompts):
        for row in range(rollouts.group_size):
            found = subject.of(_only(rollouts, prompt, row))
            if not subject.compares:
                text = show(rollouts.completions[prompt][row].text)
                expect_same(found, plain[prompt, row].reshape(1, 1), f"{text} alone")
    return "it reads `rollouts`; a batch of one works" if subject.compares else "twelve batches of one"


def _only(rollouts: Rollouts, prompt: int, row: int) -> Rollouts:
    completion = rollouts.completions[prompt][row]
    return dataclasses.replace(rollouts, prompts=(rollouts.prompts[prompt],), completions=((completion,),))


@rule("an empty completion is an ordinary wrong answer: guard `text.split()[-1]`, `max(...)` and divisions by a length")
def empty_completion(subject: RewardSubject) -> str:
    """A completion without text, and one without a single token, is scored or abstained from, and nothing is raised."""
    completions = [[reply(""), reply("", num_tokens=0), reply(" \n\t"), reply("42")]] * 3
    found = subject.of(make_rollouts(completions, subject.rows()))
    return "no text: " + ", ".join(map(_shown, found[0, :2].tolist()))


@rule("treat the text as data: no eval, no regular expression that backtracks, no recursion by its nesting")
def hostile_text(subject: RewardSubject) -> str:
    """Unicode, control characters, deep nesting, huge numbers and long text are scored in time; nothing is raised."""
    for name, text in HOSTILE.items():
        try:
            subject.of(make_rollouts([[reply(text)]], subject.rows()[:1]))
        except Broken as fault:
            raise Broken(f"{name} ({show(text[:40])}): {fault}") from fault
    return f"{len(HOSTILE)} texts"


@rule("return None, not 0, where the dataset's row cannot be read: 0 says that the completion is wrong")
def abstains(subject: RewardSubject) -> str:
    """A row whose reference nothing can satisfy, not even a completion that repeats it, is not scored."""
    texts = [name for name in subject.reads if all(isinstance(row[name], str) for row in subject.rows())]
    if not texts:
        raise NotApplicable("it reads no text column of the dataset")
    readable = subject.of(subject.question())
    if len(set(readable.nan_to_num(nan=-1.0).flatten().tolist())) < 2:
        raise NotApplicable("it gives every completion of the kit the same reward")
    for text in UNREADABLE:
        rows = [row | dict.fromkeys(texts, text) for row in subject.rows()]
        found = subject.of(make_rollouts([[reply(text), *replies(str(row))] for row in range(3)], rows))
        if bool((found == 0).all()):
            shown = ", ".join(f"`{name}`" for name in texts)
            raise Broken(f"with {shown} = {text!r} every completion got 0, {text!r} itself too")
    return f"{len(UNREADABLE)} unreadable references"


def _shown(value: float) -> str:
    return "None" if not difference(value, float("nan")) else f"{value:g}"


RULES: tuple[Rule[RewardSubject], ...] = (
    returns,
    deterministic,
    order,
    alone,
    empty_completion,
    hostile_text,
    abstains,
    state,
    travels,
    quick,
)
