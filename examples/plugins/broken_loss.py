"""A loss with every mistake that is easy to make. `grpoforge plugins check broken_loss.py` names them all:

- `deterministic`: it counts its calls and clips harder with each, and no `state_dict` says so.
- `leaves_data_alone`: it edits the log-probs of the sampler, which others read.
- `rows_alone`: it divides by the number of tokens of the micro-batch.
- `normalizes_nothing`: so the same rows given twice count half.
- `empty_row`: and a row without tokens changes what the others are divided by.
- `coupling`: it declares `token`, and adds the mean over the row.
- `masked_tokens`: it multiplies by the mask after the exp, and 0 times infinity is NaN.
- `gradient_is_the_slope`: its hand-written backward forgets a factor.
- `on_policy_gradient`: with all that the gradient at ratio 1 is not -A.
"""

from typing import Any, ClassVar

import torch

from grpoforge import hookimpl


class Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, difference: torch.Tensor) -> torch.Tensor:
        return difference.exp()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Eager:
    """The clipped surrogate, nearly."""

    coupling: ClassVar[str] = "token"

    def __init__(self, *, width: float = 0.5) -> None:
        self.width = width

    def __call__(self, inputs):
        self.width *= 0.9
        mask = inputs.completion_mask
        inputs.sampling_logprobs.mul_(mask)
        ratio = Ratio.apply(inputs.logprobs - inputs.old_logprobs) * mask
        mean = ratio.sum(dim=1, keepdim=True) / inputs.lengths
        kept = torch.minimum(ratio, ratio.clamp(max=1 + self.width)) + 0.1 * mean
        return -kept * inputs.advantages / mask.sum(), {}


@hookimpl
def register_losses(register):
    register("eager", Eager)
