"""The default sampler: decodes in this process, by C++ on a CPU where it can, else by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from grpoforge.collate import split
from grpoforge.errors import ConfigError, RunFailed
from grpoforge.types import Completion, PolicyView, Prompt, Rollouts
from grpoforge_plugins.samplers import decoders, options
from grpoforge_plugins.samplers.inverse_cdf import Cuts
from grpoforge_plugins.samplers.requests import Drawn, Requests, arrange
from grpoforge_plugins.samplers.stops import StopStrings
from grpoforge_plugins.samplers.streams import streams


class NativeSampler:
    """Draws every completion of a group at one temperature.

    A prompt goes through the model once for its whole group, completions leave the batch when they end, and a token's
    random number depends on the seed, its prompt, its completion and its place only: batch size, slots and threads
    change speed and memory, not what is drawn.

    The log-probs it reports are those of the whole distribution ``softmax(logits / temperature)``. ``top_k``, ``top_p``
    and ``min_p`` cut that distribution when a token is drawn but not in the log-prob, so that current, old and
    reference log-probs stay comparable; the draws are then off-policy by that much.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, "logits are divided by it before softmax"] = 1.0,
        max_completion_length: Annotated[int, "tokens per completion at most"] = 512,
        top_p: Annotated[float, "draw from the smallest set of tokens with this much probability"] = 1.0,
        top_k: Annotated[int, "draw from this many most probable tokens; 0 for all"] = 0,
        min_p: Annotated[float, "leave out tokens below this share of the top token's probability"] = 0.0,
        batch_size: Annotated[int, "completions decoded at a time; 0 for all at once"] = 0,
        stop: Annotated[tuple[str, ...], "a completion ends with the first of these in its text"] = (),
        decoder: Annotated[decoders.DecoderName, "`auto` is the fastest that can run the model"] = "auto",
    ) -> None:
        options.check(
            options.positive("temperature", temperature),
            options.at_least_one("max_completion_length", max_completion_length),
            *options.cuts(top_p, top_k, min_p),
            options.or_all("batch_size", batch_size),
        )
        if not all(stop):
            raise ConfigError(f"sampler option `stop` has an empty string: {list(stop)}", "every text contains it")
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.batch_size = batch_size
        self.cuts = Cuts(top_k=top_k, top_p=top_p, min_p=min_p)
        self.stop = stop
        self.decoder: decoders.DecoderName = decoder

    @property
    def rows_at_a_time(self) -> int | None:
        """Completions decoded at a time; None for all of a step."""
        return self.batch_size or None

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        """``group_size`` completions per prompt; all randomness comes from ``seed``."""
        return self._rollouts(policy, prompts, group_size, seed, do_sample=True)

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        """The most probable completion of each prompt."""
        return self._rollouts(policy, prompts, 1, 0, do_sample=False)

    def _rollouts(
        self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int, *, do_sample: bool
    ) -> Rollouts:
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        completions = decode(
            policy,
            rows,
            [self.temperature] * len(rows),
            streams(seed, [prompt.index for prompt in rows]),
            self.max_completion_length,
            do_sample=do_sample,
            cuts=self.cuts,
            slots=self.batch_size,
            stop=self.stop,
            decoder=self.decoder,
        )
        return Rollouts(
            prompts=tuple(prompts),
            completions=tuple(tuple(completions[group]) for group in split(len(rows), group_size)),
            max_completion_length=self.max_completion_length,
        )

    def sync(self, policy: PolicyView) -> None:
        """Nothing to do: weights that were packed for C++ are packed anew when they are used and have changed."""


def decode(
    policy: PolicyView,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    rows: Tensor,
    max_completion_length: int,
    *,
    do_sample: bool,
    cuts: Cuts | None = None,
    slots: int = 0,
    stop: Sequence[str] = (),
    decoder: decoders.DecoderName = "auto",
) -> list[Completion]:
    """One completion per row. Rows of equal prompts share its pass through the model, wherever they stand.

    Args:
        policy: the model and its tokenizer; only its EOS tokens are taken from its own generation settings.
        prompts: the prompt of each of the ``B`` rows.
        temperatures: of each row, positive; log-probs are reported at it, greedily drawn ones too.
        rows: ``[B]`` int64, the stream of random numbers of each row, made by `streams`.
        max_completion_length: tokens per completion at most.
        do_sample: False takes the most probable token.
        cuts: what is left out of the distribution before a token is drawn.
        slots: completions decoded at a time at most, which bounds memory; 0 for all.
        stop: strings that end a completion, which stay in its text and tokens.
        decoder: ``auto``, or the one that must be used.

    Raises:
        RunFailed: the model's logits are not numbers.
        ConfigError: ``decoder`` cannot run this model.
    """
    distinct, prompt_of, order = arrange(prompts)
    stops = StopStrings(policy.tokenizer, stop)
    requests = Requests(
        prompts=distinct,
        prompt_of=prompt_of,
        temperatures=torch.tensor(temperatures, dtype=torch.float64)[order],
        streams=rows[order],
        max_tokens=max_completion_length,
        do_sample=do_sample,
        cuts=cuts or Cuts(),
        eos=tuple(sorted(policy.eos_token_ids())),
        slots=slots or len(prompts),
        ended=stops.ended if stop else None,
    )
    drawn = decoders.choose(policy, decoder).decode(policy, requests).put_back(order)
    return _completions(policy, drawn, temperatures, stops, requests.eos)


def _completions(
    policy: PolicyView, drawn: Drawn, temperatures: Sequence[float], stops: StopStrings, eos: Sequence[int]
) -> list[Completion]:
    _check_finite(policy, drawn)
    lengths = drawn.lengths.tolist()
    rows = [row[:length] for row, length in zip(drawn.tokens.tolist(), lengths, strict=True)]
    stopped = [stops.length(row) for row in rows]
    rows = [row[:length] for row, length in zip(rows, stopped, strict=True)]
    if stops.strings:
        texts = [stops.text(row) for row in rows]
    else:
        # As tensors: of a list, transformers looks at every number.
        texts = policy.tokenizer.batch_decode([torch.tensor(row) for row in rows], skip_special_tokens=True)
    return [
        Completion(
            text=text,
            token_ids=tuple(row),
            logprobs=tuple(values[: len(row)]),
            temperature=temperature,
            finish_reason="stop" if length is not None or row[-1] in eos else "length",
            policy_version=policy.version,
        )
        for text, row, values, temperature, length in zip(
            texts, rows, drawn.logprobs.tolist(), temperatures, stopped, strict=True
        )
    ]


def _check_finite(policy: PolicyView, drawn: Drawn) -> None:
    places = torch.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    if not bool((drawn.logprobs.isfinite() | ~places).all()):
        raise RunFailed(
            f"the policy of version {policy.version} gives logits that are not numbers",
            "its weights have diverged: resume from a checkpoint with a lower `optim.learning_rate`",
        )
