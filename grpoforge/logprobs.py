"""From a batch to the log-probs of its completion tokens: the model's trunk, then its head at those tokens only.

The head is by far the widest layer (``V`` columns). It is applied to the ``N`` real completion tokens and to nothing
else, and never to more of them at a time than `LOGITS_BYTES` of logits:

- without gradient (old and reference log-probs): in runs of tokens;
- with gradient, head trained: in runs of whole rows, whose part of the objective is taken and driven back into the
  hidden states before the next run;
- with gradient, head frozen (LoRA): over slices of the vocabulary, which keeps no logits at all.

The trunk sees no padding, and what rows share once, where it can be run so (`grpoforge.shared_prefix`). The head then
answers once for all tokens that are one: predicted at one place, the same, at one temperature.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge.collate import split
from grpoforge.head import Head, find_head
from grpoforge.precision import Precision
from grpoforge.shared_prefix import SharedPrefix, SharedPrefixMode
from grpoforge.types import Batch, TokenLogprobs
from grpoforge_kernels import ops

LOGITS_BYTES = 2**28
"""Most logits held at a time, unless one row alone has more: 256 MiB."""

OnRows = Callable[[slice, TokenLogprobs], Tensor]
"""The objective of some rows of a batch, given what the policy says of them: a scalar with gradient."""

OnDistributions = Callable[[TokenLogprobs, Tensor], Tensor]
"""The objective of a batch, given its log-probs and those of all the vocabulary, ``[N, V]``: a scalar with gradient."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the ``N`` real completion tokens of a batch stand, row-major, and ``M`` answers of the head for them."""

    rows: Tensor
    """``[N]``"""
    tokens: Tensor
    """``[N]``: columns of the completion."""
    ids: Tensor
    """``[M]``: the token that each answer is about."""
    temperatures: Tensor
    """``[M]``: of its row."""
    shape: tuple[int, int]
    """``[b, T]``"""
    answers: Tensor | None = None
    """``[N]``: which answer is each token's; None where each has its own, ``M = N``."""

    @classmethod
    def of(cls, batch: Batch) -> Places:
        """All real completion tokens of ``batch``."""
        rows, tokens = batch.completion_mask.nonzero(as_tuple=True)
        num_rows, width = batch.completion_mask.shape
        return cls(rows, tokens, batch.completion_ids[rows, tokens], batch.temperatures[rows], (num_rows, width))

    def merged(self, predicted_at: Tensor) -> tuple[Places, Tensor]:
        """One answer for all tokens that are equal and predicted at one place, at one temperature.

        Args:
            predicted_at: ``[N]``: the place of what predicts each token.

        Returns:
            The same tokens with ``M`` answers, and the places that give them, ``[M]``.
        """
        heats, heat = torch.unique(self.temperatures, return_inverse=True)
        which = (predicted_at * len(heats) + heat) * 2**32 + self.ids
        distinct, answers = torch.unique(which, return_inverse=True)
        if len(distinct) == len(which):
            return self, predicted_at
        # Any of the tokens of an answer stands for it.
        one = torch.empty_like(distinct).scatter_(0, answers, torch.arange(len(which), device=which.device))
        merged = Places(self.rows, self.tokens, self.ids[one], self.temperatures[one], self.shape, answers)
        return merged, predicted_at[one]

    def each(self, values: Tensor) -> Tensor:
        """``values [M, ...]`` of the answers for each token, ``[N, ...]``."""
        return values if self.answers is None else values.index_select(0, self.answers)

    def scatter(self, values: Tensor) -> Tensor:
        """``values [M]`` at their places in ``[b, T]``, 0 elsewhere."""
        empty = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        return empty.index_put((self.rows, self.tokens), self.each(values))

    def rectangles(self, stats: ops.TokenStats) -> TokenLogprobs:
        """What the kernels say of the tokens, in the shape of the batch."""
        return TokenLogprobs(logprobs=self.scatter(stats.logprobs), entropy=self.scatter(stats.entropy))

    def runs(self, most: int) -> list[tuple[slice, slice]]:
        """Consecutive runs of whole rows with at most ``most`` tokens (or one row): their rows, and their tokens."""
        lengths = torch.bincount(self.rows, minlength=self.shape[0]).tolist()
        runs: list[tuple[slice, slice]] = []
        row = start = 0
        while row < len(lengths):
            first, count = row, 0
            while row < len(lengths) and (row == first or count + lengths[row] <= most):
                count += lengths[row]
                row += 1
            runs.append((slice(first, row), slice(start, start + count)))
            start += count
        return runs

    def of_run(self, rows: slice, tokens: slice) -> tuple[Places, Tensor]:
        """The tokens of one run, counted from its first row, and which of the answers they need."""
        shape = (rows.stop - rows.start, self.shape[1])
        every = torch.arange(len(self.rows), device=self.rows.device) if self.answers is None else self.answers
        used, answers = torch.unique(every[tokens], return_inverse=True)
        places = (self.rows[tokens] - rows.start, self.tokens[tokens], self.ids[used], self.temperatures[used])
        return Places(*places, shape, answers), used


class CausalForward:
    """How a model answers for the completion tokens of a batch, at the temperature of each row.

    Where its head cannot be told from its trunk (`grpoforge.head`), all logits are made and the needed ones gathered.
    """

    def __init__(self, model: Any, precision: Precision, shared_prefix: SharedPrefixMode = "auto") -> None:
        self.model = model
        self.precision = precision
        self.head = find_head(model, precision)
        self.prefix = SharedPrefix(self.head.trunk if self.head else None, precision, shared_prefix)

    def logprobs(self, batch: Batch) -> TokenLogprobs:
        """Log-prob and entropy of each completion token, ``[b, T]``, 0 where masked."""
        outputs, places = self._outputs_to_keep(batch)
        if outputs.requires_grad or self.head is None:
            return places.rectangles(self.stats(outputs, places.ids, places.temperatures))
        runs = split(len(outputs), self.tokens_at_a_time(self.head)) or [slice(0, 0)]
        parts = [self.stats(outputs[run], places.ids[run], places.temperatures[run]) for run in runs]
        return places.rectangles(ops.TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True))))

    def distributions(self, batch: Batch) -> tuple[TokenLogprobs, Tensor]:
        """`logprobs`, and the log-probs of the whole vocabulary at the ``N`` real tokens, ``[N, V]``, row-major."""
        return self._tables(*self._outputs_to_keep(batch))

    def _tables(self, outputs: Tensor, places: Places) -> tuple[TokenLogprobs, Tensor]:
        logits = self.logits(outputs)
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / places.temperatures[:, None].to(logits)
        stats = ops.selective_log_softmax(scaled, places.ids, 1.0)
        return places.rectangles(stats), places.each(scaled.log_softmax(dim=1))

    def backward_distributions(self, batch: Batch, on_distributions: OnDistributions) -> float:
        """As `backward`, for an objective that reads the whole vocabulary at every token."""
        with self._forwarded(batch) as (outputs, places):
            loss = on_distributions(*self._tables(outputs, places))
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def backward(self, batch: Batch, on_rows: OnRows) -> float:
        """Add the gradient of ``on_rows`` over all rows of ``batch`` to the parameters; returns its value."""
        with self._forwarded(batch) as (outputs, places):
            loss = self._objective(batch, outputs, places, on_rows)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _objective(self, batch: Batch, outputs: Tensor, places: Places, on_rows: OnRows) -> Tensor:
        head, everything = self.head, slice(0, batch.num_rows)
        if head is None or len(outputs) <= self.tokens_at_a_time(head):
            return on_rows(everything, places.rectangles(self.stats(outputs, places.ids, places.temperatures)))
        if head.is_trained:
            return self._in_runs(head, outputs, places, on_rows)
        asked = (outputs, head.weight_like(outputs), places.ids, places.temperatures)
        return on_rows(everything, places.rectangles(ops.linear_logprobs(*asked, **head.options(outputs))))

    @contextlib.contextmanager
    def _forwarded(self, batch: Batch) -> Iterator[tuple[Tensor, Places]]:
        """`outputs`, or the same from packed rows, and what they answer; the backward pass belongs inside."""
        places = Places.of(batch)
        with contextlib.ExitStack() as held:
            with self.precision.context(batch.completion_ids.device):
                packed = self.prefix.hidden(batch, held)
            if packed is None:
                yield self.outputs(batch, places), places
            else:
                hidden, predicted_at = packed
                places, answered_at = places.merged(predicted_at)
                yield hidden.index_select(0, answered_at).to(self.precision.computed), places

    def _outputs_to_keep(self, batch: Batch) -> tuple[Tensor, Places]:
        """As `_forwarded`, to outlive it: packed only without gradient, whose backward pass would come too late."""
        if torch.is_grad_enabled():
            places = Places.of(batch)
            return self.outputs(batch, places), places
        with self._forwarded(batch) as found:
            return found

    def _in_runs(self, head: Head, hidden: Tensor, places: Places, on_rows: OnRows) -> Tensor:
        most = self.tokens_at_a_time(head)
        runs = [
            (rows, *places.of_run(rows, tokens)) for rows, tokens in places.runs(most) if tokens.start < tokens.stop
        ]
        ends = list(itertools.accumulate(len(needed) for *_, needed in runs))
        chunks = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        run_at = {chunk.start: run for chunk, run in zip(chunks, runs, strict=True)}

        def on_answers(chunk: slice, stats: ops.TokenStats) -> Tensor:
            rows, part, _ = run_at[chunk.start]
            return on_rows(rows, part.rectangles(stats))

        needed = torch.cat([needed for *_, needed in runs])
        if places.answers is not None:
            hidden = hidden.index_select(0, needed)
        asked = (hidden, head.weight_like(hidden), places.ids[needed], places.temperatures[needed], on_answers)
        return ops.linear_loss(*asked, chunks=chunks, **head.options(hidden))

    def outputs(self, batch: Batch, places: Places) -> Tensor:
        """What predicts each real completion token: hidden states ``[N, H]``, or logits ``[N, V]`` without a head.

        Positions count real tokens only, so the side and the amount of padding change nothing; columns that no row
        uses are not computed.
        """
        prompt_ids, prompt_mask = _used(batch.prompt_ids, batch.prompt_mask)
        completion_ids, completion_mask = _used(batch.completion_ids, batch.completion_mask)
        mask = torch.cat([prompt_mask, completion_mask], dim=1)
        # The first completion token is predicted at the prompt's last real token, every other at its left neighbor.
        num_prompt = prompt_ids.shape[1]
        last_prompt = num_prompt - 1 - prompt_mask.flip(1).long().argmax(dim=1)
        predicted_at = torch.where(places.tokens == 0, last_prompt[places.rows], num_prompt + places.tokens - 1)
        inputs = {
            "input_ids": torch.cat([prompt_ids, completion_ids], dim=1),
            "attention_mask": mask.long(),
            "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0),
            "use_cache": False,
        }
        with self.precision.context(prompt_ids.device):
            if self.head is not None:
                hidden: Tensor = self.head.trunk(**inputs).last_hidden_state
                # Norms and residuals stay wider than what autocast computes in; the whole model's head does not.
                return hidden[places.rows, predicted_at].to(self.precision.computed)
            first = int(last_prompt.min())
            output = self.model(**inputs, logits_to_keep=mask.shape[1] - first)
            logits: Tensor = output.logits[places.rows, predicted_at - first]
        return logits

    def logits(self, outputs: Tensor) -> Tensor:
        """``outputs`` as logits ``[N, V]``, as the model itself gives them."""
        return outputs if self.head is None else self.head.logits(outputs)

    def stats(self, outputs: Tensor, ids: Tensor, temperatures: Tensor) -> ops.TokenStats:
        """Log-prob, entropy and logsumexp of some tokens."""
        if self.head is None:
            return ops.selective_log_softmax(outputs, ids, temperatures, overwrite_logits=True)
        raw = self.head.raw_logits(outputs)
        return ops.selective_log_softmax(
            raw, ids, temperatures, softcap=self.head.softcap, scale=self.head.scale, overwrite_logits=True
        )

    def tokens_at_a_time(self, head: Head) -> int:
        """Tokens whose logits fit `LOGITS_BYTES`."""
        vocabulary = head.weight.shape[0]
        return max(1, LOGITS_BYTES // (vocabulary * self.precision.computed.itemsize))


def _used(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``ids`` and ``mask [b, W]`` from the first to the last column that a row uses (at least one column).

    Completions begin in the first column, so their token numbers stay what they were.
    """
    columns = mask.any(dim=0).nonzero().squeeze(1)
    if not len(columns):
        return ids[:, :1], mask[:, :1]
    used = slice(int(columns[0]), int(columns[-1]) + 1)
    return ids[:, used], mask[:, used]
