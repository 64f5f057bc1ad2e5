"""The hooks a plugin may implement. This module is the plugin document: what is called, when, and with what.

A plugin is a module (or an object) with functions marked ``@grpoforge.hookimpl``, found in one of two ways:

- installed: a distribution with an entry point in the group ``grpoforge``, after which it is named;
- local: ``--plugin my_reward.py``; the plugin is named after the file, ``my_reward``.

One rule holds for every component: **positional parameters are data, keyword-only parameters are options.**
Data is what the program hands over; options are what the user writes in YAML or with ``--set``. Options
become a strict model from the signature: the annotation is the type, the default is the default,
``Annotated[int, "help"]`` adds the help. A component is a function, or a class whose ``__init__`` takes the
options as keyword-only parameters (for rules between options: raise ``GrpoforgeError`` there). Registered
components are shown by ``grpoforge plugins``.

Hooks are called before the first step (``register_*``, ``load_policy``, ``load_reader``, ``policy_size``) or between
steps (``*_finished``); nothing in the arithmetic of a step goes through a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from grpoforge.config import ModelConfig
    from grpoforge.policy import Policy, PolicySize, Reader
    from grpoforge.types import RunSummary, StepReport

hookspec = pluggy.HookspecMarker("grpoforge")


class Register(Protocol):
    """What every ``register_*`` hook receives; it already knows which plugin is registering."""

    def __call__(
        self,
        name: str,
        component: Callable[..., Any],
        *,
        weight: float | None = None,
        gate: str | None = None,
    ) -> None:
        """Add ``component`` under ``name``; its id is ``plugin:name``, and the bare name works while unique.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``, a letter or ``_`` first.
            component: a function, or a class.
            weight: rewards only: the weight a run uses when it names none; 1.0 when left out.
            gate: rewards only: the name of another reward; this one pays only where that one reached 1.

        Raises:
            PluginError: the name, the component or its signature cannot be used.
        """


@hookspec
def register_rewards(register: Register) -> None:
    """Add rewards: ``(completions, <other data>, *, <options>) -> list[float | None]``, one per completion.

    Data is bound by name: ``completions``, ``prompts``, ``completion_ids``, ``finish_reasons``,
    ``temperatures``, ``max_completion_length``, ``rollouts`` (when a score compares siblings), or any column
    of the dataset. A data parameter with a default is optional. ``None`` means *not scored*, which is not 0.
    ``async def`` is fine. A class is called like the function: data on ``__call__``, options on ``__init__``.
    A function with ``**kwargs`` that takes ``completions`` is a TRL reward and works as it is; all its
    parameters are data and it has no options.
    """


@hookspec
def register_samplers(register: Register) -> None:
    """Add samplers: classes with ``sample``, ``greedy`` and ``sync``.

    ``sample(policy, prompts, group_size, seed)`` and ``greedy(policy, prompts)`` return ``Rollouts``;
    ``sync(policy)`` follows each step.
    All randomness comes from ``seed``: equal arguments, equal rollouts. See ``grpoforge.types.Sampler``.
    A sampler that draws completions in blocks, as pairs, states the attribute ``block``; a sampler or an
    advantage that cannot work with every batch has ``check_batch(num_prompts, group_size)``, which raises
    ``ConfigError``. The option ``max_completion_length``, if there is one, keeps its value when another sampler
    takes the place of this one.
    """


@hookspec
def register_advantages(register: Register) -> None:
    """Add advantages: ``(<data>, *, <options>) -> advantages [P, G]``.

    Data is bound by name: ``rewards [P, G, K]``, ``weights [K]``, ``lengths [P, G]`` (completion tokens),
    ``temperatures [P, G]``, float64 each, of every process's rows. NaN in ``rewards`` means *not scored*; a
    row that no reward scored gets advantage 0. Float64 out. May return ``(advantages, metrics)``, metrics a dict
    of ``(sum, count)`` over the same rows, reported as sum over count. An advantage that compares rows of a group
    in blocks, as the two of a pair, states the attribute ``block`` (see ``grpoforge.declarations``).
    """


@hookspec
def register_kl_estimators(register: Register) -> None:
    """Add KL estimators: ``(<data>, *, <options>) -> estimates [b, T]``.

    Data is bound by name: ``logprobs``, ``ref_logprobs``, ``old_logprobs``, ``sampling_logprobs``,
    ``completion_mask``, ``[b, T]`` each; or ``distribution`` and ``ref_distribution``, ``[n, V]`` log-probs of
    the whole vocabulary at the ``n`` real tokens, for estimates ``[n]``.
    """


@hookspec
def register_losses(register: Register) -> None:
    """Add losses: ``(inputs, *, <options>) -> (per_token_loss [b, T], metrics of [b, T])``.

    ``inputs`` is a ``grpoforge.types.LossInputs``. A loss normalizes nothing: the engine divides by a
    denominator counted once per optimizer step over all ranks. A loss that looks beyond a token's own row
    declares it by an attribute ``coupling = "batch"`` (see ``grpoforge.types.Coupling``).
    """


@hookspec
def register_corrections(register: Register) -> None:
    """Add off-policy corrections: ``(<data>, *, <options>) -> weights [b, T]`` without gradient.

    The weights multiply the policy loss of each token; denominators stay. Data is bound by name: ``logprobs``,
    ``old_logprobs``, ``sampling_logprobs``, ``advantages``, ``completion_mask``, ``[b, T]`` each; and
    ``target_logprobs``, the old policy's with every row at the correction's attribute ``target_temperature`` (1.0
    when it has none), for which the engine takes one more pass without gradient.
    """


@hookspec
def register_trackers(register: Register) -> None:
    """Add trackers: classes built as ``Tracker(run, *, <options>)``.

    They have ``step_finished(report)``, ``evaluated(step, metrics)`` and ``close()``. See
    ``grpoforge.types.Tracker``.
    """


@hookspec
def register_datasets(register: Register) -> None:
    """Add datasets: ``(split, *, <options>) -> rows``; a row is a dict of data for rewards.

    ``split`` is ``train`` or ``test``; also ``validation`` where the dataset declares it (`grpoforge.declarations`).
    A generator is read row by row with ``data.streaming``. A row may be a `grpoforge.sources.Row`, which knows where
    it stands, or a ``BadRow``, which says why it cannot be used. An option called ``path`` is a file or a folder.
    """


@hookspec(firstresult=True)
def load_policy(model: ModelConfig) -> Policy | None:
    """The policy for ``model``, or None for "not mine". Called once; the first plugin that answers decides.

    The built-in loader is ``trylast``, so a plugin that recognizes its own models comes before it.
    """


@hookspec(firstresult=True)
def load_reader(model: ModelConfig) -> Reader | None:
    """The tokenizer and context length of ``model`` without its weights, or None for "not mine".

    Called by ``grpoforge data show``. A plugin that implements ``load_policy`` for models of its own implements this
    too, or its prompts cannot be shown.
    """


@hookspec(firstresult=True)
def policy_size(model: ModelConfig) -> PolicySize | None:
    """How large the policy for ``model`` will be, without loading a weight; None for "not mine" or unknown."""


@hookspec
def step_finished(report: StepReport) -> None:
    """Called on rank 0 after each optimizer step. An exception stops the run and names the plugin."""


@hookspec
def run_finished(summary: RunSummary) -> None:
    """Called on rank 0 once, when the run has finished and everything is saved."""
