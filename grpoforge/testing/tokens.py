"""What everything per token promises (losses, KL estimators, corrections): rows are independent, padding is nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grpoforge.testing.kit import Broken, NotApplicable, Subject, expect_same, rule
from grpoforge.types import Coupling

Tokens = Mapping[str, Tensor]
"""Data by name; the first axis is rows, ``[b, T]``, or tokens, ``[n, V]``."""

LENGTHS = (6, 4, 1, 3)
ADVANTAGES = (1.3, -0.7, 0.4, -1.6)
ORDER = (2, 0, 3, 1)
FAR = 1e4
"""A difference of log-probs whose exp overflows."""
TIGHT = 1e-9


@dataclass(frozen=True, kw_only=True)
class TokenSubject(Subject):
    """A component that answers per token, asked about four rows of one to six tokens."""

    wording: ClassVar[str] = "every tensor it was given"

    def question(self) -> Tokens:
        return token_table()

    @abstractmethod
    def values(self, question: Tokens) -> dict[str, Tensor]:
        """What a fresh instance returns, by name, each with the rows of the question; 0 where masked."""

    @property
    def coupling(self) -> Coupling:
        """What a token's value may depend on besides itself."""
        return "sequence"


def token_table(seed: int = 0, *, on_policy: bool = False) -> dict[str, Tensor]:
    """Log-probs of a policy and of its older selves at four rows of completion tokens, and their advantages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))

    def noise(size: float) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 0.1
    old = logprobs if on_policy else logprobs + noise(0.25)
    mask = torch.arange(shape[1])[None, :] < torch.tensor(LENGTHS)[:, None]
    return {
        "logprobs": logprobs,
        "old_logprobs": old.clone(),
        "sampling_logprobs": old.clone() if on_policy else old + noise(0.1),
        "ref_logprobs": logprobs + noise(0.4),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None].expand(shape).clone(),
        "entropy": torch.rand(shape, generator=generator, dtype=torch.float64) * 2,
        "completion_mask": mask,
        "target_logprobs": old.clone() if on_policy else old + noise(0.15),
    }


def masked_as_engine(question: Tokens) -> dict[str, Tensor]:
    """The question as the engine hands it to KL estimators and corrections: log-probs are 0 where masked."""
    mask = question.get("completion_mask")
    if mask is None:
        return dict(question)
    zero = torch.zeros((), dtype=torch.float64)
    return {
        name: torch.where(mask, one, zero.to(one)) if name.endswith("logprobs") else one
        for name, one in question.items()
    }


def pick(question: Tokens, index: Any) -> dict[str, Tensor]:
    """The rows at ``index``."""
    return {name: values[index] for name, values in question.items()}


def far_where_masked(question: Tokens) -> dict[str, Tensor]:
    """The question with log-probs that differ by 1e4, either way, where masked."""
    mask = question["completion_mask"]
    sign = torch.where(torch.arange(mask.shape[1]) % 2 == 0, FAR, -FAR)
    changed = dict(question)
    for number, name in enumerate(("logprobs", "old_logprobs", "sampling_logprobs", "ref_logprobs", "target_logprobs")):
        changed[name] = torch.where(mask, question[name], sign * (number % 2) - FAR)
    return changed


def padded(question: Tokens, columns: int) -> dict[str, Tensor]:
    """The question with masked columns added on the right."""
    return {name: torch.nn.functional.pad(values, (0, columns), value=0) for name, values in question.items()}


@rule("treat every row alike, wherever it stands in the micro-batch")
def row_order(subject: TokenSubject) -> str:
    """Reordering the rows reorders the values, and nothing else."""
    _needs_rows(subject)
    question = subject.question()
    index = torch.tensor(ORDER)
    found = subject.values(pick(question, index))
    expect_same(found, pick(subject.values(question), index), f"rows in the order {list(ORDER)}", tolerance=TIGHT)
    return f"{len(ORDER)} rows in another order"


@rule("take no mean or count over rows: how rows are split into micro-batches must not matter")
def rows_alone(subject: TokenSubject) -> str:
    """A row by itself (a micro-batch of one) has the values that it has among others."""
    _needs_rows(subject)
    question = subject.question()
    whole = subject.values(question)
    for row in range(len(LENGTHS)):
        index = slice(row, row + 1)
        found = subject.values(pick(question, index))
        expect_same(found, pick(whole, index), f"row {row} alone", tolerance=TIGHT)
    return f"{len(LENGTHS)} rows one at a time"


@rule("look at `completion_mask` in every sum and count over a row; lengths are `completion_mask.sum(dim=1)`, not T")
def padding(subject: TokenSubject) -> str:
    """More padding on the right changes nothing at real tokens."""
    question = subject.question()
    if "completion_mask" not in question:
        raise NotApplicable("it is given real tokens only")
    width = question["completion_mask"].shape[1]
    found = subject.values(padded(question, 3))
    cut = {name: values[:, :width] for name, values in found.items()}
    expect_same(cut, subject.values(question), "with three more columns", tolerance=TIGHT)
    return "three masked columns more"


@rule("divide by `completion_mask.sum(dim=1).clamp(min=1)`, so that a row without tokens is not 0 / 0")
def empty_row(subject: TokenSubject) -> str:
    """A row without a single token leaves its neighbors as they are."""
    question = dict(subject.question())
    if "completion_mask" not in question:
        raise NotApplicable("it is given real tokens only")
    _needs_rows(subject)
    plain = subject.values(question)
    question["completion_mask"] = question["completion_mask"].clone()
    question["completion_mask"][2] = False
    found, others = subject.values(question), [0, 1, 3]
    expect_same(pick(found, others), pick(plain, others), "with row 2 empty", tolerance=TIGHT)
    return "an empty row beside three others"


@rule('declare what it looks at: `coupling: ClassVar[Coupling] = "sequence"` (or "batch") on the class')
def coupling(subject: TokenSubject) -> str:
    """The value of a token depends on what `coupling` says (`token`, `sequence`; undeclared means `sequence`) only."""
    if subject.coupling not in ("token", "sequence", "batch"):
        raise Broken(f"`coupling` is {subject.coupling!r}, not token, sequence or batch")
    if subject.coupling == "batch":
        return "batch: it may look at every row"
    question = dict(subject.question())
    plain = subject.values(question)
    name = "logprobs" if "logprobs" in question else "distribution"
    question[name] = question[name].clone()
    question[name][0, 1] -= 0.2
    reached = {
        (int(row), int(token))
        for one, other in zip(subject.values(question).values(), plain.values(), strict=True)
        for row, token in _two_axes((one - other).abs() > TIGHT).nonzero().tolist()
    }
    return _reach(subject, reached)


def _reach(subject: TokenSubject, reached: set[tuple[int, int]]) -> str:
    rows, tokens = {row for row, _ in reached}, {token for _, token in reached}
    if rows - {0}:
        raise Broken(f"it is `{subject.coupling}`, and a token of row 0 changes row {max(rows)}")
    if subject.coupling == "token" and tokens - {1}:
        raise Broken(f"it is `token`, and token 1 changes token {max(tokens - {1})} of its row")
    return f"{subject.coupling}: a changed token reached {len(reached)} values"


def _two_axes(values: Tensor) -> Tensor:
    return values if values.ndim == 2 else values[:, None]


def _needs_rows(subject: TokenSubject) -> None:
    if subject.coupling == "batch":
        raise NotApplicable("it looks at the whole minibatch (`coupling` is `batch`)")
