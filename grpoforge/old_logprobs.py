"""Where the log-probs of the policy at the start of a step come from, when a pass over the batch can be saved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpoforge.metrics import sampling_difference
from grpoforge.policy import Policy
from grpoforge.types import Batch, Rollouts

logger = logging.getLogger(__name__)

OldLogprobsMode = Literal["auto", "recompute", "sampler"]
"""``recompute``: by a pass of the policy. ``sampler``: the sampler's, where they hold. ``auto``: no pass where the
update's own forward pass says the same; else the sampler's where rounding is fine enough; else a pass."""

CHECKED = 16
"""One row in this many is computed anew to check what the sampler reported."""


@dataclass(slots=True)
class OldLogprobs:
    """Chooses, step by step. Depends on nothing but the step, so that a resumed run chooses alike."""

    mode: OldLogprobsMode = "auto"
    tolerance: float = 1e-4
    """Largest ``|policy - sampler|`` log-prob of a checked token at which the sampler's are taken."""
    has_warned: bool = False

    def may_come_from_update(self, *, num_updates: int, is_read_before: bool) -> bool:
        """True where the policy is its own old policy: one optimizer step, and nothing reads them before it."""
        return self.mode == "auto" and num_updates == 1 and not is_read_before

    @torch.no_grad()
    def from_sampler(
        self, policy: Policy, batch: Batch, rollouts: Rollouts, micro_batch_size: int
    ) -> tuple[float, float, float] | None:
        """How far the sampler is from the policy on some rows, see `sampling_difference`, where it may be trusted.

        None where the policy has to be asked for all rows: another version of it drew them, numbers are too coarse
        (``auto`` with bf16), a checked token differs by more than `tolerance`, or all rows to check are masked.
        """
        versions = {completion.policy_version for completion in rollouts.flat()}
        is_fine = torch.finfo(policy.precision.computed).eps <= torch.finfo(torch.float32).eps
        if self.mode == "recompute" or versions != {policy.version} or (self.mode == "auto" and not is_fine):
            return None
        rows = checked_rows(batch.num_rows, policy.version)
        part = batch.rows(rows)
        found = sampling_difference(part, policy.frozen_logprobs(part, micro_batch_size).logprobs)
        num_checked = found[1]
        if num_checked and found[2] <= self.tolerance:
            return found
        if num_checked and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "the sampler's log-probs differ from the policy's by up to %.2g, more than `batch.sampler_tolerance` "
                "(%g): old log-probs are computed by the policy",
                found[2],
                self.tolerance,
            )
        return None


def checked_rows(num_rows: int, version: int) -> Tensor:
    """A run of neighboring rows, one in `CHECKED`, others at every version of the policy."""
    size = max(1, num_rows // CHECKED)
    return (torch.arange(size) + version * size).remainder(num_rows).sort().values
