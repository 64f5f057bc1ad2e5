"""The decoder in PyTorch: any causal language model of transformers that has a key-value cache, on any device.

Each prompt goes through the model once and its keys and values are copied to the slots of its completions. A finished
completion's slot goes to the next one that waits; when none waits, the batch shrinks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grpoforge.policy import inference_mode
from grpoforge.types import PolicyView
from grpoforge_kernels import ops
from grpoforge_plugins.samplers.inverse_cdf import draw
from grpoforge_plugins.samplers.requests import PATIENCE, Decoder, Drawn, Requests
from grpoforge_plugins.samplers.slot_cache import Place, SlotCache
from grpoforge_plugins.samplers.streams import uniforms

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass, padding included, unless one prompt alone has more."""
SLACK = 64
"""Columns of the cache beyond the longest possible row: it is moved to the left once in so many steps."""


class TorchDecoder(Decoder):
    """Decodes with the model's own forward pass."""

    name = "torch"

    def decode(self, policy: PolicyView, requests: Requests) -> Drawn:
        """As `Decoder.decode`."""
        with inference_mode(policy.model), policy.precision.context(policy.device):
            return _Run(policy, requests).finish()


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """A prompt that went through the model: its layers' keys and values ``[heads, L, d]``, its last logits ``[V]``."""

    layers: list[tuple[Tensor, Tensor]]
    logits: Tensor
    length: int


class _Run:
    """One call of `decode`. Tensors over slots are on the model's device; what is drawn goes into ``[B, T]``."""

    def __init__(self, policy: PolicyView, requests: Requests) -> None:
        self.policy, self.requests = policy, requests
        self.device = policy.device
        self.call = _Call(policy.model)
        slots = min(requests.slots, requests.num_rows)
        self.longest = max(map(len, requests.prompts))
        self.place = Place(self.longest)
        self.cache: SlotCache | None = None
        self.slots = slots
        self.row = self._per_slot(slots, -1)
        self.start = self._per_slot(slots, 0)
        self.last = self._per_slot(slots, 0)
        self.live = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.mask = torch.zeros((slots, self.columns), dtype=torch.bool, device=self.device)
        shape = (requests.num_rows, requests.max_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.lengths = torch.zeros(requests.num_rows, dtype=torch.int64, device=self.device)
        self.temperatures = requests.temperatures.to(self.device)
        self.streams = requests.streams.to(self.device)
        self.eos = torch.tensor(requests.eos, dtype=torch.int64, device=self.device)
        self.waiting = self._prefill()
        self.num_waiting = requests.num_rows
        self.steps = 0

    @property
    def columns(self) -> int:
        return self.longest + self.requests.max_tokens + SLACK

    def _per_slot(self, slots: int, value: int) -> Tensor:
        return torch.full((slots,), value, dtype=torch.int64, device=self.device)

    def finish(self) -> Drawn:
        """Decode until nothing is left."""
        self._admit()
        while bool(self.live.any()):
            self._make_room()
            self._step()
            self._look_for_stops()
            self._admit()
            self._shrink()
        return Drawn(self.tokens.cpu(), self.logprobs.cpu(), self.lengths.cpu())

    def _prefill(self) -> Iterator[tuple[int, _Prefilled]]:
        """Every row with its prompt; a prompt goes through the model when its first row is asked for."""
        prompt_of = self.requests.prompt_of.tolist()
        row = 0
        for some in _parts(self.requests.prompts, min(self.slots, self.requests.num_rows)):
            for prompt, prefilled in zip(some, self._prefill_some(some), strict=True):
                while row < len(prompt_of) and prompt_of[row] == prompt:
                    yield row, prefilled
                    row += 1

    def _prefill_some(self, some: Sequence[int]) -> list[_Prefilled]:
        prompts = [self.requests.prompts[prompt] for prompt in some]
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        cache, mask = DynamicCache(), mask.to(self.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self.call(ids.to(self.device), mask, positions, cache)
        return [
            _Prefilled(
                [(one.keys[row, :, width - len(prompt) :], one.values[row, :, width - len(prompt) :])
                 for one in cache.layers],
                logits[row],
                len(prompt),
            )
            for row, prompt in enumerate(prompts)
        ]  # fmt: skip

    def _admit(self) -> None:
        """Give free slots to rows that wait; one that ends with its first token frees its slot again."""
        while self.num_waiting and not bool(self.live.all()):
            free = self.live.logical_not().nonzero()[:, 0].tolist()[: self.num_waiting]
            entering = [(slot, *next(self.waiting)) for slot in free]
            self.num_waiting -= len(free)
            for slot, row, prefilled in entering:
                self._enter(slot, row, prefilled)
            self.place.used = max(self.place.used, free[-1] + 1)
            logits = torch.stack([prefilled.logits for _, _, prefilled in entering])
            self._take(torch.tensor(free, device=self.device), logits)

    def _enter(self, slot: int, row: int, prefilled: _Prefilled) -> None:
        if self.cache is None:
            like = [(keys[None], values[None]) for keys, values in prefilled.layers]
            self.cache = SlotCache(self.place, like, self.slots, self.columns)
        for layer, (keys, values) in zip(self.cache.layers, prefilled.layers, strict=True):
            layer.enter(slot, keys, values)
        start = self.place.column - prefilled.length
        self.row[slot], self.start[slot] = row, start
        self.mask[slot] = torch.arange(self.columns, device=self.device) >= start

    def _step(self) -> None:
        """One token of every used slot."""
        used, column = self.place.used, self.place.column
        logits = self.call(
            self.last[:used, None], self.mask[:used, : column + 1], column - self.start[:used, None], self.cache
        )
        self.place.column += 1
        self.steps += 1
        live = self.live[:used].nonzero()[:, 0]
        self._take(live, logits[live])

    def _take(self, slots: Tensor, logits: Tensor) -> None:
        """Draw a token for each of ``slots [n]`` from ``logits [n, V]`` and note it."""
        rows = self.row[slots]
        token, temperatures = self.lengths[rows], self.temperatures[rows]
        if self.requests.do_sample:
            ids = draw(logits, temperatures, uniforms(self.streams[rows], token), self.requests.cuts)
        else:
            ids = logits.argmax(dim=1)
        self.tokens[rows, token] = ids
        self.logprobs[rows, token] = ops.selective_log_softmax(logits, ids, temperatures).logprobs.float()
        self.lengths[rows] = token + 1
        self.last[slots] = ids
        self.live[slots] = ~torch.isin(ids, self.eos) & (token + 1 < self.requests.max_tokens)

    def _look_for_stops(self) -> None:
        ended = self.requests.ended
        if ended is None or self.steps % PATIENCE:
            return
        for slot in self.live.nonzero()[:, 0].tolist():
            row = int(self.row[slot])
            self.live[slot] = not ended(self.tokens[row, : self.lengths[row]].tolist())

    def _make_room(self) -> None:
        """Move everything to the left when the columns are used up."""
        if self.cache is None or self.place.column < self.columns:
            return
        used = self.place.used
        by = int(self.start[:used][self.live[:used]].min())
        for layer in self.cache.layers:
            layer.shift(by)
        self.start -= by
        self.place.column -= by
        self.mask[:used] = torch.arange(self.columns, device=self.device) >= self.start[:used, None]

    def _shrink(self) -> None:
        """Move the live slots together when half of the batch has finished and nobody waits."""
        count = int(self.live.sum())
        if self.cache is None or self.num_waiting or 2 * count > self.place.used or count == 0:
            return
        slots = self.live.nonzero()[:, 0]
        for layer in self.cache.layers:
            layer.keep(slots)
        for values in (self.row, self.start, self.last, self.mask):
            values[:count] = values[slots]
        self.live[:] = torch.arange(self.slots, device=self.device) < count
        self.place.used = count


class _Call:
    """The model's forward pass, by the names that its version of transformers has for things."""

    def __init__(self, model: Any) -> None:
        self.model = model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        known = inspect.signature(causal.forward).parameters
        self.cache = "cache" if "cache" in known else "past_key_values"
        self.takes_positions = "position_ids" in known
        self.more = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits of the last column, ``[n, V]``, for ``ids [n, W]``."""
        more = {**self.more, **({"position_ids": positions} if self.takes_positions else {})}
        found = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **{self.cache: cache}, **more)
        logits: Tensor = found.logits[:, -1]
        return logits


def _parts(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Runs of prompts for one forward pass each, at most ``most`` of them."""
    part: list[int] = []
    for number in range(len(prompts)):
        width = max(len(prompts[one]) for one in (*part, number))
        if part and (len(part) == most or width * (len(part) + 1) > PREFILL_TOKENS):
            yield part
            part = []
        part.append(number)
    yield part
