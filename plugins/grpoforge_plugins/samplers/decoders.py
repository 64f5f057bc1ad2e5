"""Which decoder runs a model: asked of the decoders themselves, once for each model, and logged once.

A decoder is used for a model when the log-probs that it reports for a few tokens are those of the model's own forward
pass. So no list of architectures has to be kept, and a model that a decoder does not understand is never sampled
wrongly.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, Literal

import torch

from grpoforge.errors import ConfigError, first_line
from grpoforge.policy import inference_mode
from grpoforge.types import PolicyView
from grpoforge_plugins.samplers.cpp_decoder import CppDecoder
from grpoforge_plugins.samplers.generate_decoder import GenerateDecoder
from grpoforge_plugins.samplers.inverse_cdf import Cuts
from grpoforge_plugins.samplers.requests import Decoder, Drawn, Requests
from grpoforge_plugins.samplers.torch_decoder import TorchDecoder

DecoderName = Literal["auto", "cpp", "torch"]
DECODERS: dict[str, type[Decoder]] = {"cpp": CppDecoder, "torch": TorchDecoder}
"""By name, the fastest first. Where none works, transformers' `generate` does."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of a log-prob in nats; other dtypes have `COARSE`."""
COARSE = 0.25
LENGTH = 3
"""Tokens that a decoder is asked for."""

logger = logging.getLogger(__name__)
_chosen: weakref.WeakKeyDictionary[Any, dict[str, Decoder]] = weakref.WeakKeyDictionary()


def choose(policy: PolicyView, name: DecoderName) -> Decoder:
    """The decoder for this policy's model: the fastest that works, or the one that is named.

    Raises:
        ConfigError: the one that is named does not work.
    """
    known = _chosen.setdefault(policy.model, {})
    if name not in known:
        known[name] = _choose(policy, name)
    return known[name]


def _choose(policy: PolicyView, name: DecoderName) -> Decoder:
    reasons: list[str] = []
    for one in DECODERS if name == "auto" else (name,):
        decoder = DECODERS[one]()
        reason = obstacle(policy, decoder)
        if reason is None:
            if reasons:
                logger.info("completions are decoded by the %s decoder; not %s", one, "; not ".join(reasons))
            return decoder
        reasons.append(f"{one}: {reason}")
    if name != "auto":
        raise ConfigError(f"sampler option `decoder` is {name}: {reasons[0]}", "leave it out: the best is then chosen")
    logger.warning("completions are decoded by transformers' generate, which is slow; not %s", "; not ".join(reasons))
    return GenerateDecoder()


def obstacle(policy: PolicyView, decoder: Decoder) -> str | None:
    """Why ``decoder`` cannot decode with this policy; None when it can."""
    requests = _question(policy)
    try:
        drawn = decoder.decode(policy, requests)
        gap = _gap(policy, requests, drawn)
    except Exception as failure:  # the boundary: what a foreign model raises, nobody documents
        return f"{first_line(failure)}"
    if not gap <= TOLERANCE.get(policy.precision.computed, COARSE):
        return f"its log-probs are {gap:.2g} from the model's"
    return None


def _question(policy: PolicyView) -> Requests:
    """Two prompts of different lengths, decoded greedily without an end."""
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    first, second = tuple(range(min(5, vocabulary))), (vocabulary // 2,)
    return Requests(
        prompts=(first, second),
        prompt_of=torch.tensor([0, 1, 1]),
        temperatures=torch.ones(3, dtype=torch.float64),
        streams=torch.tensor([1, 2, 3]),
        max_tokens=LENGTH,
        do_sample=True,
        cuts=Cuts(),
        eos=(),
        slots=2,
    )


def _gap(policy: PolicyView, requests: Requests, drawn: Drawn) -> float:
    """The largest difference between log-probs that were reported and the model's own, in nats."""
    worst = 0.0
    with inference_mode(policy.model), policy.precision.context(policy.device):
        for row, prompt in enumerate(requests.prompt_of.tolist()):
            ids = [*requests.prompts[prompt], *drawn.tokens[row].tolist()]
            found = policy.model(input_ids=torch.tensor([ids], device=policy.device), use_cache=False)
            logits = found.logits[0, -LENGTH - 1 : -1].float().cpu()
            own = logits.log_softmax(dim=1).gather(1, drawn.tokens[row][:, None])[:, 0]
            worst = max(worst, float((own - drawn.logprobs[row]).abs().max()))
    return worst
