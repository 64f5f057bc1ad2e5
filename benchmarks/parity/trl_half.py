"""The TRL half of `trl_parity.py`: runs in TRL's own environment and knows nothing of grpoforge.

    python trl_half.py INPUTS.json OUTPUTS.json

Each case is a real GRPOTrainer. Only three things are put in TRL's way: what `_generate` returns, what the reward
functions return, and what `_get_per_token_logps_and_entropies` returns (old and reference log-probs while scoring, the
current ones, with gradient, in the loss). Advantages, importance weights, masks, denominators, loss and gradient are
TRL's own code, in float64 but for the rewards, which TRL keeps in float32.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer


def padded(rows: list[list[float]], inputs: dict[str, Any]) -> torch.Tensor:
    """Rows of unequal length as ``[B, T]``; what stands in the padding comes from ``inputs``."""
    width = max(len(row) for row in rows)
    fill = inputs["padding"]
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


def stubbed(base: type) -> type:
    """``base`` with rollouts and log-probs taken from ``self.given``."""

    class Stubbed(base):  # type: ignore[misc]
        given: dict[str, Any]
        leaves: tuple[torch.Tensor, torch.Tensor]

        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            ids = self.given["completion_ids"]
            texts = ["text"] * len(ids)
            return [[5, 6]] * len(ids), ids, None, texts, self.given["sampling_logprobs"], {}, None, None

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            if torch.is_grad_enabled():
                return *self.leaves, None
            name = "ref_logprobs" if model is self.ref_model else "old_logprobs"
            return padded(self.given[name], {"padding": 0.0}), None, None

    return Stubbed


def rewards_of(inputs: dict[str, Any]) -> list[Any]:
    """One reward function for each column of the given rewards."""

    def function(column: int) -> Any:
        def given(completions: list[Any], **kwargs: Any) -> list[float | None]:
            return [row[column] for row in inputs["rewards"]]

        given.__name__ = f"reward_{column}"
        return given

    return [function(column) for column in range(len(inputs["weights"]))]


def trainer_of(case: dict[str, Any], inputs: dict[str, Any], folder: str) -> Any:
    """TRL's trainer, configured as the case says."""
    options = dict(case["trl"])
    correction = options.pop("corrects_sampling", False)
    is_gmpo = options.pop("trainer", "grpo") == "gmpo"
    config = (GMPOConfig if is_gmpo else GRPOConfig)(
        output_dir=folder,
        per_device_train_batch_size=len(inputs["rewards"]),
        gradient_accumulation_steps=1,
        num_generations=inputs["group_size"],
        num_iterations=2,  # otherwise TRL takes the current policy as the old one
        max_completion_length=inputs["max_completion_length"],
        reward_weights=inputs["weights"],
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        **options,
    )
    trainer = stubbed(GMPOTrainer if is_gmpo else GRPOTrainer)(
        model=inputs["model"],
        reward_funcs=rewards_of(inputs),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
    )
    trainer.given = inputs
    trainer.use_vllm = correction  # the flag alone: sampling log-probs are given, there is no vLLM
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def run(case: dict[str, Any], inputs: dict[str, Any], folder: str) -> dict[str, Any]:
    """Loss, gradient with respect to log-probs and entropies, and advantages of one case."""
    given = inputs | case["inputs"]
    trainer = trainer_of(case, given, folder)
    logprobs = padded(given["logprobs"], given).requires_grad_()
    entropy = padded(given["entropy"], {"padding": 0.0}).requires_grad_()
    trainer.leaves = (logprobs, entropy)
    batch = trainer._generate_and_score_completions([{"prompt": "x"}] * len(given["rewards"]))
    loss = trainer.compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    return {
        "loss": float(loss.detach()),
        "gradient": [] if gradients[0] is None else gradients[0].tolist(),
        "entropy_gradient": torch.zeros_like(entropy).tolist() if gradients[1] is None else gradients[1].tolist(),
        "advantages": batch["advantages"].tolist(),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_default_dtype(torch.float64)
    with open(sys.argv[1], encoding="utf-8") as file:
        given = json.load(file)
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(case, given["inputs"], folder) for name, case in given["cases"].items()}
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"versions": versions, "results": results}, file)


if __name__ == "__main__":
    main()
