"""Is our loss TRL's? The same rollouts, rewards and log-probs into both; advantages, loss and gradient compared.

    PYTHON=$(benchmarks/parity/install.sh)
    python benchmarks/parity/trl_parity.py --trl-python $PYTHON [--json FILE]

TRL runs in its own environment (`trl_half.py`), with its own advantages, importance weights and denominators. Our half
is the engine with the parts that the configuration names, options set by `--dialect trl`. Everything is float64; TRL
keeps rewards in float32, which is why the limit is 1e-6. Where the two differ by design, the case says why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpoforge.algorithm import make_algorithm
from grpoforge.cli.settings import base_layers, flag_layers, user_layers
from grpoforge.collate import collate
from grpoforge.config import Config
from grpoforge.distributed import Workers
from grpoforge.engine import Engine
from grpoforge.launch import load_host
from grpoforge.layers import build
from grpoforge.metrics import Meter
from grpoforge.objective import Frozen, Update
from grpoforge.parts import resolve
from grpoforge.reduction import count, token_weights
from grpoforge.types import Completion, Prompt, Rollouts, Scores, TokenLogprobs
from grpoforge_plugins.tiny_math import MODEL_DIR

HERE = Path(__file__).parent
TODAY = datetime.date.today().isoformat()
RESULTS = HERE.parent / "results" / f"parity-trl-{TODAY}.json"
LIMIT = 1e-6
NUM_PROMPTS, GROUP_SIZE, MAX_LENGTH = 6, 4, 12
PREPARED = {"data.options": "{num_train: 32, num_test: 4}", "data.num_eval": "4", "sampler.max_completion_length": "12"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting, in TRL's words and in ours."""

    trl: Mapping[str, Any]
    ours: Mapping[str, str] = field(default_factory=dict)
    """``--set`` by key; ``loss``, ``advantage`` and ``kl`` are the flags of that name."""
    padding: float = 0.0
    """What stands for the current log-probs where there is no token."""
    abstaining: bool = False
    """A row without the first reward, and one without any."""
    differs: bool = False
    """By design: then they must."""
    note: str = ""


CLIP = {"loss": "clip", "advantage": "group", "kl.beta": "0.0"}
GRPO = CLIP | {"reduction": "sequence"}
DAPO = CLIP | {"reduction": "token"}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.1}
GSPO = {"loss": "gspo", "advantage": "group", "kl.beta": "0.0", "loss.epsilon_low": "0.1", "loss.epsilon_high": "0.1"}
K3 = {"beta": 0.04, "use_bias_correction_kl": False}
IS = {"loss_type": "dapo", "corrects_sampling": True}

CASES: dict[str, Case] = {
    "grpo": Case(trl={"loss_type": "grpo"}, ours=GRPO),
    "grpo, beta 0.04": Case(
        trl={"loss_type": "grpo", "beta": 0.04}, ours=GRPO | {"kl": "k3_corrected", "kl.beta": "0.04"}
    ),
    "grpo, beta 0.04 (k3)": Case(trl={"loss_type": "grpo", **K3}, ours=GRPO | {"kl.beta": "0.04"}),
    "grpo, delta 1.5": Case(trl={"loss_type": "grpo", "delta": 1.5}, ours=GRPO | {"loss.delta": "1.5"}),
    "grpo, scale_rewards none": Case(
        trl={"loss_type": "grpo", "scale_rewards": "none"}, ours=GRPO | {"advantage": "group_mean"}
    ),
    "grpo, scale_rewards batch": Case(
        trl={"loss_type": "grpo", "scale_rewards": "batch"}, ours=GRPO | {"advantage": "batch_std"}
    ),
    "grpo, normalize_then_sum": Case(
        trl={"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
        ours=GRPO | {"advantage": "gdpo"},
    ),
    "grpo, rewards that abstain": Case(trl={"loss_type": "grpo"}, ours=GRPO, abstaining=True),
    "grpo, scale_rewards batch, rewards that abstain": Case(
        trl={"loss_type": "grpo", "scale_rewards": "batch"}, ours=GRPO | {"advantage": "batch_std"}, abstaining=True
    ),
    "grpo, normalize_then_sum, rewards that abstain": Case(
        trl={"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
        ours=GRPO | {"advantage": "gdpo"},
        abstaining=True,
    ),
    "dapo, epsilon_high 0.28": Case(
        trl={"loss_type": "dapo", "epsilon_high": 0.28}, ours=DAPO | {"loss.epsilon_high": "0.28"}
    ),
    "dapo, beta 0.04 (k3)": Case(trl={"loss_type": "dapo", **K3}, ours=DAPO | {"kl.beta": "0.04"}),
    "dapo, mask_truncated_completions": Case(
        trl={"loss_type": "dapo", "mask_truncated_completions": True},
        ours=DAPO | {"batch.mask_truncated_completions": "true"},
    ),
    "dapo, top_entropy_quantile 0.3": Case(
        trl={"loss_type": "dapo", "top_entropy_quantile": 0.3}, ours=DAPO | {"batch.top_entropy_quantile": "0.3"}
    ),
    "dapo, entropy_coef 0.01": Case(
        trl={"loss_type": "dapo", "entropy_coef": 0.01}, ours=DAPO | {"entropy.coef": "0.01"}
    ),
    "dr_grpo": Case(
        trl={"loss_type": "dr_grpo", "scale_rewards": "none"},
        ours=CLIP | {"advantage": "group_mean", "reduction": "constant"},
    ),
    "dr_grpo, beta 0.04 (k3)": Case(
        trl={"loss_type": "dr_grpo", **K3}, ours=CLIP | {"reduction": "constant", "kl.beta": "0.04"}
    ),
    "gspo (sequence level, grpo)": Case(trl={"loss_type": "grpo", **SEQUENCE}, ours=GSPO | {"reduction": "sequence"}),
    "gspo, paper's epsilons": Case(
        trl={"loss_type": "grpo", **SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4},
        ours=GSPO | {"reduction": "sequence", "loss.epsilon_low": "3e-4", "loss.epsilon_high": "4e-4"},
    ),
    "gspo with dapo's mean": Case(trl={"loss_type": "dapo", **SEQUENCE}, ours=GSPO | {"reduction": "token"}),
    "gspo with dr_grpo's mean, beta 0.04 (k3)": Case(
        trl={"loss_type": "dr_grpo", **SEQUENCE, **K3},
        ours=GSPO | {"reduction": "constant", "kl.beta": "0.04"},
    ),
    "cispo, epsilon_high 1.5": Case(
        trl={"loss_type": "cispo", "epsilon_high": 1.5},
        ours={"loss": "cispo", "advantage": "group", "kl.beta": "0.0", "loss.max_ratio": "1.5"},
    ),
    "sapo": Case(trl={"loss_type": "sapo"}, ours={"loss": "sapo", "advantage": "group", "kl.beta": "0.0"}),
    "vespo": Case(trl={"loss_type": "vespo"}, ours={"loss": "vespo", "advantage": "group", "kl.beta": "0.0"}),
    "luspo (sequence level)": Case(
        trl={"loss_type": "luspo", **SEQUENCE},
        ours=GSPO | {"loss": "luspo"},
    ),
    "luspo (token level)": Case(trl={"loss_type": "luspo"}, ours=CLIP | {"reduction": "sequence_sum"}),
    "luspo (sequence level), beta 0.04 (k3)": Case(
        trl={"loss_type": "luspo", **SEQUENCE, **K3},
        ours=GSPO | {"reduction": "sequence_sum", "kl.beta": "0.04"},
    ),
    "gmpo (experimental)": Case(trl={"trainer": "gmpo"}, ours={"loss": "gmpo", "advantage": "group", "kl.beta": "0.0"}),
    "token_truncate": Case(
        trl=IS | {"vllm_importance_sampling_mode": "token_truncate"}, ours=DAPO | {"corrections": "[{name: tis}]"}
    ),
    "token_mask": Case(
        trl=IS | {"vllm_importance_sampling_mode": "token_mask"}, ours=DAPO | {"corrections": "[{name: icepop}]"}
    ),
    "sequence_truncate": Case(
        trl=IS | {"vllm_importance_sampling_mode": "sequence_truncate"},
        ours=DAPO | {"corrections": "[{name: tis_sequence}]"},
    ),
    "sequence_mask, beta 0.04": Case(
        trl=IS | {"vllm_importance_sampling_mode": "sequence_mask", "beta": 0.04},
        ours=DAPO | {"corrections": "[{name: sequence_mask}]", "kl": "k3_corrected", "kl.beta": "0.04"},
    ),
    "off_policy_mask_threshold 0.1": Case(
        trl=IS | {"vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.1},
        ours=DAPO | {"corrections": "[{name: opsm, delta: 0.1}]"},
    ),
    "bnpo": Case(
        trl={"loss_type": "bnpo"},
        ours=DAPO,
        note="with a single micro-batch; a mean over the tokens of a micro-batch is not offered",
    ),
    "grpo, mask_truncated_completions": Case(
        trl={"loss_type": "grpo", "mask_truncated_completions": True},
        ours=GRPO | {"batch.mask_truncated_completions": "true"},
        differs=True,
        note="TRL divides by all rows, the masked ones included; here they leave the denominator too",
    ),
    "grpo, entropy_coef 0.01": Case(
        trl={"loss_type": "grpo", "entropy_coef": 0.01},
        ours=GRPO | {"entropy.coef": "0.01"},
        differs=True,
        note="TRL's bonus is a mean over tokens for every loss; here the reduction weighs it as it does the loss",
    ),
    "gspo, beta 0.04": Case(
        trl={"loss_type": "grpo", **SEQUENCE, "beta": 0.04},
        ours=GSPO | {"reduction": "sequence", "kl": "k3_corrected", "kl.beta": "0.04"},
        differs=True,
        note="TRL weighs a token's KL by the ratio of the completion; `k3_corrected` by its own, which is unbiased",
    ),
    "vespo, token_truncate": Case(
        trl={"loss_type": "vespo", "corrects_sampling": True, "vllm_importance_sampling_mode": "token_truncate"},
        ours={"loss": "vespo", "advantage": "group", "kl.beta": "0.0", "loss.behavior": "sampling"},
        differs=True,
        note="TRL multiplies capped token ratios to the sampler; here the ratio to the sampler is exact",
    ),
    "grpo, log-ratio 1e4 in the padding": Case(
        trl={"loss_type": "grpo"},
        ours=GRPO,
        padding=1e4,
        differs=True,
        note="TRL multiplies by the mask, and 0 * inf is NaN; here masked positions are replaced before any exp",
    ),
}


def make_inputs() -> dict[str, Any]:
    """Rollouts, rewards and log-probs; numbers that float32 holds exactly, so that no side rounds them."""
    draw = torch.Generator().manual_seed(0)
    rows = NUM_PROMPTS * GROUP_SIZE
    lengths = torch.randint(1, MAX_LENGTH + 1, (rows,), generator=draw).tolist()
    lengths[:3] = [1, MAX_LENGTH, MAX_LENGTH]

    def normal(scale: float) -> list[list[float]]:
        return [(scale * torch.randn(n, generator=draw)).tolist() for n in lengths]

    def plus(first: list[list[float]], second: list[list[float]]) -> list[list[float]]:
        return [
            torch.tensor([a + b for a, b in zip(*both, strict=True)]).tolist()
            for both in zip(first, second, strict=True)
        ]

    old = [[-abs(value) - 0.5 for value in row] for row in normal(1.5)]
    rewards = torch.randint(0, 9, (rows, 2), generator=draw) / 8
    rewards[-GROUP_SIZE:] = 1.0  # a group that says nothing
    return {
        "model": str(MODEL_DIR),
        "group_size": GROUP_SIZE,
        "max_completion_length": MAX_LENGTH,
        # A completion at the limit does not end with EOS: it was cut.
        "completion_ids": [[7] * (n - 1) + [7 if n == MAX_LENGTH else eos_token_id()] for n in lengths],
        "rewards": rewards.tolist(),
        "weights": [1.0, 0.5],
        "logprobs": plus(old, normal(0.4)),
        "old_logprobs": plus(old, normal(0.0)),
        "ref_logprobs": plus(old, normal(0.6)),
        "sampling_logprobs": plus(old, normal(0.5)),
        "entropy": [[abs(value) for value in row] for row in normal(1.0)],
    }


def inputs_of(case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``case`` changes in the ``inputs``."""
    rewards = [list(row) for row in inputs["rewards"]]
    if case.abstaining:
        rewards[1][0] = None
        rewards[6] = [None, None]
    return {"padding": case.padding, "rewards": rewards}


def eos_token_id() -> int:
    """The token that ends a completion of the embedded model."""
    config = json.loads((MODEL_DIR / "config.json").read_text())
    return int(config["eos_token_id"])


def configure(case: Case) -> Config:
    """Our configuration of a case: tiny-math, the parts by flags, options by ``--dialect trl`` and ``--set``."""
    flags = {
        f"--{kind}": (f"{kind}.name", case.ours[kind]) for kind in ("loss", "advantage", "kl") if kind in case.ours
    }
    given = PREPARED | {key: value for key, value in case.ours.items() if f"--{key}" not in flags}
    overrides = [f"{key}={value}" for key, value in given.items()]
    return build(user_layers(base_layers(None), overrides, flag_layers(flags), None, dialect="trl"))


def rollouts_of(inputs: Mapping[str, Any]) -> Rollouts:
    """The given completions as rollouts."""
    prompt = Prompt(text="x", token_ids=(5, 6), columns={}, index=0)
    completions = [
        Completion(
            text="text",
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            temperature=1.0,
            finish_reason="length" if len(ids) == MAX_LENGTH else "stop",
            policy_version=0,
        )
        for ids, logprobs in zip(inputs["completion_ids"], inputs["sampling_logprobs"], strict=True)
    ]
    groups = [tuple(completions[first : first + GROUP_SIZE]) for first in range(0, len(completions), GROUP_SIZE)]
    return Rollouts(prompts=(prompt,) * len(groups), completions=tuple(groups), max_completion_length=MAX_LENGTH)


def padded(rows: list[list[float]], padding: float = 0.0) -> Tensor:
    """Rows of unequal length as ``[B, T]`` float64."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows], dtype=torch.float64)


def run(case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Advantages, loss and gradient of one case, by the engine's own methods."""
    given = {**inputs, **inputs_of(case, inputs)}
    config = configure(case)
    parts = resolve(config, load_host(config))
    algorithm = make_algorithm(config, parts, parts.sampler.build(), list(parts.train_rows[0].columns))
    unused: Any = dict.fromkeys(("policy", "reference", "optimizer", "schedule"))
    engine = Engine(algorithm=algorithm, workers=Workers(), **unused)
    rollouts = rollouts_of(given)
    numbers = [[math.nan if reward is None else reward for reward in row] for row in given["rewards"]]
    rewards = torch.tensor(numbers, dtype=torch.float64).reshape(NUM_PROMPTS, GROUP_SIZE, -1)
    weights = torch.tensor(given["weights"], dtype=torch.float64)
    scores = Scores(names=("a", "b"), rewards=rewards, raw=rewards, weights=weights, seconds=(0.0, 0.0))
    advantages = engine.advantages(rollouts, scores)
    batch = collate(rollouts, pad_token_id=0, mask_truncated=algorithm.mask_truncated)
    mask = batch.completion_mask
    current = TokenLogprobs(
        logprobs=padded(given["logprobs"], given["padding"]).requires_grad_(),
        entropy=padded(given["entropy"]).requires_grad_(),
    )
    frozen = Frozen(
        old=padded(given["old_logprobs"]),
        reference=padded(given["ref_logprobs"]),
        advantages=advantages.reshape(-1),
        weights=engine.high_entropy(current.entropy.detach(), mask),
    )
    update = Update(
        beta=algorithm.beta.value, entropy_coefficient=algorithm.entropy.value, seed=0, is_unmoved=False, meter=Meter()
    )
    per_token = token_weights(algorithm.reduction, mask, count(mask, rollouts.max_completion_length))
    loss = algorithm.objective(batch, frozen, per_token, current, update)
    gradients = torch.autograd.grad(
        loss, [current.logprobs, current.entropy], allow_unused=True, materialize_grads=True
    )
    return {
        "loss": float(loss.detach()),
        "gradient": gradients[0].tolist(),
        "entropy_gradient": gradients[1].tolist(),
        "advantages": advantages.reshape(-1).tolist(),
    }


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference of loss, gradients and advantages; relative to the largest value where that is above 1."""
    found: dict[str, float] = {}
    for name in ("loss", "gradient", "entropy_gradient", "advantages"):
        mine, other = torch.tensor(ours[name], dtype=torch.float64), torch.tensor(theirs[name], dtype=torch.float64)
        scale = float(mine.abs().max()) if name.endswith("gradient") else max(1.0, float(mine.abs().max()))
        found[name] = float((mine - other).abs().max()) / (scale or 1.0)
    gradient, entropy = found["gradient"], found.pop("entropy_gradient")
    found["gradient"] = max(gradient, entropy) if not math.isnan(gradient) else gradient
    return found


def run_trl(python: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL says to the same cases."""
    cases = {name: {"trl": case.trl, "inputs": inputs_of(case, inputs)} for name, case in CASES.items()}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "inputs.json", Path(folder) / "outputs.json"
        given.write_text(json.dumps({"inputs": inputs, "cases": cases}))
        subprocess.run([python, str(HERE / "trl_half.py"), str(given), str(found)], check=True)
        results: dict[str, Any] = json.loads(found.read_text())
    return results


def verdict(case: Case, found: Mapping[str, float]) -> str:
    """``equal`` or ``differs`` where that is expected, else ``UNEXPECTED``."""
    equal = all(value <= LIMIT for value in found.values())
    if equal == case.differs:
        return f"UNEXPECTED: {'equal' if equal else 'differs'}"
    return ": ".join(filter(None, ("equal" if equal else "differs", case.note)))


def table(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = ["| TRL | loss | difference | of the gradient | |", "| --- | ---: | ---: | ---: | --- |"]
    for name, row in compared.items():
        lines.append(
            f"| {name} | {row['loss']:.6f} | {row['d_loss']:.0e} | {row['d_gradient']:.0e} | {row['verdict']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--trl-python", required=True, help="python of the environment that install.sh made")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    inputs = make_inputs()
    theirs = run_trl(arguments.trl_python, inputs)
    compared: dict[str, Any] = {}
    for name, case in CASES.items():
        ours = run(case, inputs)
        found = difference(ours, theirs["results"][name])
        compared[name] = {
            "loss": ours["loss"],
            "trl_loss": theirs["results"][name]["loss"],
            **{f"d_{what}": value for what, value in found.items()},
            "settings": {"trl": dict(case.trl), "grpoforge": dict(case.ours)},
            "verdict": verdict(case, found),
        }
    print(table(compared))
    record = {"date": TODAY, "limit": LIMIT, "versions": theirs["versions"], "cases": compared}
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")  # a NaN stays NaN: it is a finding
    wrong = [name for name, row in compared.items() if row["verdict"].startswith("UNEXPECTED")]
    if wrong:
        sys.exit(f"unexpected: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
