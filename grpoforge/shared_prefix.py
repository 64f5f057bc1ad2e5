"""The trunk of a model on packed rows, through transformers' attention interface.

Recognized by asking, not by name: two groups go through the trunk padded and packed, and only a model that gives the
same hidden states both ways is packed; as a trie where a kernel attends over one, else with each prompt once. A decoder
of Llama's kind goes through the kernels layer by layer where they are faster (`grpoforge.fused_trunk`). How far a layer
of another model sees is asked in every forward pass: the model describes the mask that it wants, and one that hides
anything from a plain causal view of the longest row (a sliding window, chunks) is refused there and then.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from grpoforge import fused_trunk
from grpoforge.errors import ModelError
from grpoforge.packing import CannotShare, Packed, PromptsOnce, first_rows, num_plain_tokens
from grpoforge.precision import Precision
from grpoforge.trie import Trie
from grpoforge.types import Batch
from grpoforge_kernels.dispatch import backend_name
from grpoforge_kernels.errors import KernelError

logger = logging.getLogger(__name__)

NAME = "grpoforge_shared_prefix"
WORTH = 0.9
"""Packed where that leaves at most this share of the tokens: gathering rows inside attention costs a little too."""

SCORES_BYTES = 2**28
"""Scores of attention that packed rows may hold at a time off the CPU, where no kernel for them has been measured."""

PASSED_BY = frozenset({"dropout", "scaling", "sliding_window", "position_ids", "is_causal", "use_cache", "softcap"})
"""What a layer may hand to attention without changing what packed attention computes, or what it is told by."""


SharedPrefixMode = Literal["auto", "on", "off"]
"""``auto``: pack where the model can be packed and it saves work. ``on``: pack, or fail. ``off``: never."""


class _Asked:
    """The mask that a model asks for, in place of the mask."""

    def __init__(self, sees: Callable[..., Any]) -> None:
        self.sees = sees
        self.widest = 0

    def check(self, width: int, device: torch.device) -> None:
        """Refuse a mask that is not plainly causal for rows of ``width`` tokens: looked at along its border.

        Raises:
            CannotShare: it hides a token of the past, or shows one of the future.
        """
        if width <= self.widest:
            return
        places = torch.arange(width, device=device)
        first, last = torch.zeros_like(places), torch.full_like(places, width - 1)
        past = torch.stack([self._at(places, first), self._at(last, places), self._at(places, places)])
        future = self._at(places[:-1], places[1:])
        if not bool(past.all()):
            raise CannotShare(f"a layer does not see all of a row of {width} tokens (a sliding window, or chunks)")
        if bool(future.any()):
            raise CannotShare("a layer sees tokens that come later")
        self.widest = width

    def _at(self, query: Tensor, key: Tensor) -> Tensor:
        batch = head = torch.zeros_like(query)
        return torch.as_tensor(self.sees(batch, head, query, key), device=query.device).expand(query.shape)


def _mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> _Asked:
    """In the place of a mask: the description of one, which `_attention` looks at."""
    return _Asked(mask_function)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Asked | None,
    *,
    shared_prefix: Packed | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``query [1, h, N, d]``, keys and values ``[1, k, N, d]`` to ``[1, N, h, d]``, as transformers' layers call it."""
    if shared_prefix is None or not isinstance(attention_mask, _Asked):
        raise CannotShare("its layers do not pass on how rows are packed, or which mask they need")
    unknown = [
        name for name, given in others.items() if name not in PASSED_BY and given is not None and given is not False
    ]
    if unknown or not getattr(module, "is_causal", True):
        raise CannotShare(f"its attention is not plain: {', '.join(unknown) or 'not causal'}")
    attention_mask.check(shared_prefix.longest, query.device)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))
    return shared_prefix.attend(query, key, value, scale=scale, softcap=softcap)[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class SharedPrefix:
    """A trunk on packed rows, where it can be run on them and that saves work.

    Args:
        trunk: the model under its head; gives ``last_hidden_state``. None where the head cannot be told from it.
        precision: of its forward pass.
        mode: see `SharedPrefixMode`.
    """

    def __init__(self, trunk: Any | None, precision: Precision, mode: SharedPrefixMode) -> None:
        self.trunk = trunk
        self.precision = precision
        self.mode = mode
        self.way: Way | None = None
        """How rows are packed; None until the model has been asked, and where it cannot be packed."""
        self._obstacle: str | None = None
        self._narrowest_refused: int | None = None

    def obstacle(self) -> str:
        """Why the model takes the plain way; empty when it can be packed.

        Asks the model once, and anew where somebody has put hooks or adapters on layers that went through kernels.
        """
        is_over = self.way is not None and self.way.obstacle(self.trunk, self.precision)
        if self._obstacle is None or is_over:
            try:
                self.way = _choose(self.trunk, self.precision)
                self._obstacle = ""
            except CannotShare as reason:
                self._obstacle = str(reason)
        return self._obstacle

    def hidden(self, batch: Batch, held: contextlib.ExitStack) -> tuple[Tensor, Tensor] | None:
        """What the trunk says of packed ``batch``; None where the plain way is to be taken.

        Args:
            held: keeps the model's layers on packed rows until it is closed. Close it when the backward pass is over,
                because layers may be run again in it (gradient checkpointing).

        Returns:
            Hidden states ``[N, H]``, and for each real completion token the place among them that predicts it, ``[n]``.

        Raises:
            ModelError: mode ``on``, and the model cannot be packed.
        """
        if not self._is_possible(batch):
            return None
        assert self.way is not None
        packed = self.way.packing.of(batch)
        if not self._is_wanted(packed, batch):
            return None
        try:
            held.enter_context(_switched(self.trunk))
            return self.way.run(self.trunk, packed), packed.predicted_at
        except CannotShare as reason:
            held.close()
            self._refuse(packed.longest, str(reason))
            return None

    def _is_possible(self, batch: Batch) -> bool:
        if self.mode == "off" or (self.mode == "auto" and not self._fits(batch)):
            return False
        if not self.obstacle():
            return True
        if self.mode == "on":
            raise refused(self.obstacle())
        return False

    def _is_wanted(self, packed: Packed, batch: Batch) -> bool:
        if self._narrowest_refused is not None and packed.longest >= self._narrowest_refused:
            return False
        return self.mode == "on" or packed.num_tokens <= WORTH * num_plain_tokens(batch)

    def _fits(self, batch: Batch) -> bool:
        """Off the CPU the formulas of attention hold its scores: not where they are many."""
        if batch.prompt_ids.device.type == "cpu" or self.trunk is None:
            return True
        return scores_bytes(batch, self.trunk.config.get_text_config().num_attention_heads) <= SCORES_BYTES

    def _refuse(self, width: int, reason: str) -> None:
        if self.mode == "on":
            raise refused(reason)
        if self._narrowest_refused is None:
            logger.info("rows of %d tokens and more are not packed: %s", width, reason)
        self._narrowest_refused = width


def scores_bytes(batch: Batch, num_heads: int) -> int:
    """Bytes of the largest scores ``[b, h, t, s]`` in float32 that `prefix_attention.Written` holds for ``batch``."""
    num_rows, num_prompts = batch.num_rows, int(first_rows(batch).sum())
    prompt, completion = (int(mask.sum(dim=1).max()) for mask in (batch.prompt_mask, batch.completion_mask))
    own, asked, shared = num_rows * completion**2, num_rows * completion * prompt, num_prompts * prompt**2
    return 4 * num_heads * max(own, asked, shared)


def refused(reason: str) -> ModelError:
    """What ``shared_prefix: on`` ends with where the model cannot be packed."""
    return ModelError(
        f"`batch.shared_prefix` is `on`, and this model cannot be run on packed rows: {reason}",
        "use `--set batch.shared_prefix=auto`: it computes the same, with every prompt once per completion",
    )


@contextlib.contextmanager
def _switched(trunk: Any) -> Iterator[None]:
    """The layers of ``trunk`` attend over packed rows inside."""
    usual = trunk.config._attn_implementation
    trunk.config._attn_implementation = NAME
    try:
        yield
    finally:
        trunk.config._attn_implementation = usual


def _run(trunk: Any, packed: Packed) -> Tensor:
    """The hidden states ``[N, H]`` of packed rows; inside `_switched`.

    Raises:
        CannotShare: a layer does not see all of the longest row, or attends in a way that the packing has not.
    """
    outputs = trunk(
        input_ids=packed.input_ids,
        attention_mask=torch.ones_like(packed.input_ids),
        position_ids=packed.position_ids,
        use_cache=False,
        shared_prefix=packed,
    )
    hidden: Tensor = outputs.last_hidden_state[0]
    return hidden


def packings(device: torch.device, dtype: torch.dtype) -> tuple[type[Packed], ...]:
    """How rows may be packed there, the best first: as a trie only where a kernel attends over one."""
    try:
        has_kernel = device.type == "cpu" and backend_name("tree_attention", device, dtype) == "cpp"
    except KernelError:  # A backend is forced that has other operations, but not this one.
        has_kernel = False
    return (Trie, PromptsOnce) if has_kernel else (PromptsOnce,)


@dataclass(frozen=True, slots=True)
class Way:
    """How rows are packed, and what gives the hidden states ``[N, H]`` of packed rows."""

    packing: type[Packed]
    run: Callable[[Any, Any], Tensor] = _run
    obstacle: Callable[[Any, Precision], str | None] = lambda trunk, precision: None
    """Why a model can no longer be run so; None where it can."""


def ways(trunk: Any, precision: Precision) -> list[Way]:
    """How the rows of a model may be run, the best first."""
    found = [Way(packing) for packing in packings(trunk.get_input_embeddings().weight.device, precision.computed)]
    if found[0].packing is not Trie:
        return found
    reason = fused_trunk.obstacle(trunk, precision)
    if reason is None:
        return [Way(Trie, fused_trunk.hidden_states, fused_trunk.obstacle), *found]
    logger.info("the update goes through the model's own layers: %s", reason)
    return found


def _choose(trunk: Any | None, precision: Precision) -> Way:
    """The first way that gives the hidden states of padded rows.

    Raises:
        CannotShare: none does; says why of the last, which asks the least of the model.
    """
    if trunk is None:
        raise CannotShare("its head cannot be told from its trunk")
    *better, last = ways(trunk, precision)
    for way in better:
        try:
            _probe(trunk, precision, way)
            return way
        except CannotShare as reason:
            logger.info("rows are not packed as %s: %s", way.packing.__name__, reason)
    _probe(trunk, precision, last)
    return last


@torch.no_grad()
def _probe(trunk: Any, precision: Precision, way: Way) -> None:
    """Two groups, ragged, both ways.

    Raises:
        CannotShare: the two ways differ, or the packed one fails; says why.
    """
    batch = _probe_batch(trunk)
    packed = way.packing.of(batch)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
    with precision.context(mask.device):
        plain = trunk(
            input_ids=torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        try:
            with _switched(trunk):
                found = way.run(trunk, packed)[packed.predicted_at].float()
        except CannotShare:
            raise
        except Exception as error:  # the boundary: any model may come, and each may fail in its own way
            raise CannotShare(f"its layers fail on packed rows ({type(error).__name__})") from error
    row, token = batch.completion_mask.nonzero(as_tuple=True)
    expected = plain[row, batch.prompt_ids.shape[1] + token - 1].float()
    gap = float((found - expected).abs().max() / expected.abs().max())
    rounding = max(torch.finfo(dtype).eps for dtype in (precision.computed, torch.float32))
    if not gap <= 0.6 * rounding**0.5:
        raise CannotShare(f"packed rows give other hidden states, by {gap:.1e} of the largest")


def _probe_batch(trunk: Any) -> Batch:
    """Prompts of 5 and 3 tokens, three completions each of up to 4, of which two begin alike."""
    vocabulary = min(trunk.get_input_embeddings().weight.shape[0], 64)
    device = trunk.get_input_embeddings().weight.device
    cells = torch.arange(6 * 9, device=device).square().add(1).remainder(vocabulary).view(6, 9)
    prompt_ids, completion_ids = cells[:, :5].clone(), cells[:, 5:].clone()
    prompt_ids[:3], prompt_ids[3:] = prompt_ids[0].clone(), prompt_ids[3].clone()
    completion_ids[2, :2] = completion_ids[0, :2]
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    prompt_mask[3:, :2] = False
    lengths = torch.tensor([4, 2, 3, 1, 4, 3], device=device)
    completion_mask = torch.arange(4, device=device) < lengths[:, None]
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=torch.zeros(6, 4, device=device),
        temperatures=torch.ones(6, dtype=torch.float64, device=device),
    )
