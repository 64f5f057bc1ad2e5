"""The decoder of last resort: transformers' ``generate``, for models without a key-value cache that can be shared."""

from __future__ import annotations

import torch

from grpoforge.collate import split
from grpoforge.types import PolicyView, Prompt
from grpoforge_plugins.samplers.hf import generate, seeded
from grpoforge_plugins.samplers.requests import Decoder, Drawn, Requests


class GenerateDecoder(Decoder):
    """Rows are drawn in parts of ``slots``, each from a generator seeded by its rows' streams.

    What is drawn therefore depends on the slots, unlike that of other decoders.
    """

    name = "generate"

    def decode(self, policy: PolicyView, requests: Requests) -> Drawn:
        """As `Decoder.decode`."""
        rows = [
            Prompt(text="", token_ids=requests.prompts[prompt], columns={}, index=prompt)
            for prompt in requests.prompt_of.tolist()
        ]
        cuts = {"top_k": requests.cuts.top_k, "top_p": requests.cuts.top_p, "min_p": requests.cuts.min_p or None}
        drawn = Drawn(
            torch.zeros((len(rows), requests.max_tokens), dtype=torch.int64),
            torch.zeros((len(rows), requests.max_tokens)),
            torch.zeros(len(rows), dtype=torch.int64),
        )
        for part in split(len(rows), requests.slots):
            seed = int(requests.streams[part].sum()) & (2**63 - 1)
            with seeded(seed, policy.device):
                completions = generate(
                    policy, rows[part], requests.temperatures[part].tolist(), requests.max_tokens,
                    do_sample=requests.do_sample, **cuts,
                )  # fmt: skip
            for row, one in enumerate(completions, start=part.start):
                drawn.lengths[row] = len(one.token_ids)
                drawn.tokens[row, : len(one.token_ids)] = torch.tensor(one.token_ids)
                drawn.logprobs[row, : len(one.token_ids)] = torch.tensor(one.logprobs)
        return drawn
