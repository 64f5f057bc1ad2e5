"""Two processes with half the prompts each take the step of one process with all of them.

This file is also the program that the two processes run.
"""

from __future__ import annotations

import copy
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from grpoforge.assembly import check_coupling
from grpoforge.coefficients import AdaptiveEntropy, AdaptiveKL
from grpoforge.collate import collate
from grpoforge.distributed import Workers, start_workers, stop_workers
from grpoforge.errors import ConfigError
from grpoforge.metrics import Meter, averages
from grpoforge.reduction import REDUCTIONS, Counts
from grpoforge.scoring import BoundReward
from grpoforge_plugins.advantages.batch import batch_std, gdpo, reinforce_pp, reinforce_pp_baseline
from grpoforge_plugins.advantages.group import gpg
from grpoforge_plugins.advantages.paired import Paired
from grpoforge_plugins.corrections.mask import opsm
from grpoforge_plugins.corrections.target import TargetTIS
from grpoforge_plugins.corrections.truncate import tis
from grpoforge_plugins.kl.full import full
from grpoforge_plugins.kl.schulman import k1
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.losses.covariance import KLCov
from grpoforge_plugins.preference.reward import Preference

PROMPTS = [[5, 9, 3, 12], [7], [4, 4, 21], [6, 2]]
COMPLETIONS: list[list[list[int]]] = [
    [[3, 8, 1], [14, 6, 20, 9, 2, 7]],
    [[22], [5, 1]],
    [[9, 13, 4, 4], [17, 2, 8, 19, 1]],
    [[4, 5], [6, 1]],
]
# The second process has no token at all: its rows are masked, and it must still take part in every sum.
NOTHING_LATE: list[list[list[int]]] = [*COMPLETIONS[:2], [[], []], [[], []]]
ADVANTAGES = [[0.7, -0.7], [0.2, -0.2], [-1.1, 1.1], [0.4, -0.4]]
CASES = {"whole": COMPLETIONS, "nothing-late": NOTHING_LATE}
STEPS: dict[str, dict[str, Any]] = {
    "batch_std": {"advantage": batch_std},
    "gdpo": {"advantage": gdpo},
    "reinforce_pp": {"advantage": reinforce_pp},
    "reinforce_pp_baseline": {"advantage": reinforce_pp_baseline},
    "gpg": {"advantage": gpg},
    "KL in the reward, steered": {
        "advantage": batch_std,
        "kl": k1,
        "kl_in_reward": True,
        "beta": AdaptiveKL(0.4, target=0.01, horizon=40),
    },
    "KL of the whole vocabulary": {"kl": full, "beta": 0.2},
    "tokens of high entropy": {"top_entropy_quantile": 0.44},
    "corrections, truncated rows masked": {"corrections": (tis, opsm), "mask_truncated": True, "beta": 0.1},
    "entropy bonus, several minibatches": {
        "entropy": AdaptiveEntropy(0.02, target=9.0, delta=0.005, maximum=1.0),
        "epochs": 2,
    },
    "pairs, baselines by temperature, a common target": {
        "advantage": Paired(preference_threshold=0.05, baseline_decay=0.9),
        "corrections": (TargetTIS(),),
        # No process has rows at all three temperatures.
        "temperatures": [[0.7, 1.3], [0.7, 1.3], [0.7, 1.1], [0.7, 1.1]],
    },
}
"""Whole steps, each with something that is computed over the rows of all processes."""


def num_tokens(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def share_of_large(completion_ids: list[list[int]]) -> list[float | None]:
    """Abstains where there is no token."""
    return [sum(i > 8 for i in ids) / len(ids) if ids else None for ids in completion_ids]


REWARDS = [
    BoundReward(name="tokens", function=num_tokens, data=("completion_ids",), weight=0.3),
    BoundReward(name="large", function=share_of_large, data=("completion_ids",), weight=1.0),
]


def take_steps(build: dict[str, Any], workers: Workers) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights after each of `STEPS`, advantages and rewards of all processes, and metrics."""
    tensors: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {}
    share = workers.share(len(PROMPTS))
    start = torch.cat([parameter.detach().flatten() for parameter in build["tiny_model"](0).parameters()])
    for case, completions in CASES.items():
        for step, given in STEPS.items():
            policy, name = build["tiny_policy"](0), f"{case}/{step}"
            choices = copy.deepcopy(given)
            heat = choices.pop("temperatures", [[1.0, 1.0]] * len(PROMPTS))
            rollouts = build["make_rollouts"](PROMPTS[share], completions[share], heat[share])
            engine = build["make_engine"](
                policy,
                reference=build["tiny_policy"](2),
                workers=workers,
                sampler=build["GivenRollouts"](rollouts),
                rewards=REWARDS,
                micro_batch_size=3,
                **choices,
            )
            report = engine.step(rollouts.prompts, step=1, seed=7)
            tensors[name] = torch.cat([parameter.detach().flatten() for parameter in policy.trainable()])
            tensors[f"{name}/moved"] = tensors[name] - start
            tensors[f"{name}/advantages"] = workers.gather(report.advantages)
            tensors[f"{name}/rewards"] = workers.gather(report.scores.rewards).nan_to_num(nan=-99.0)
            metrics[name] = {
                **report.metrics,
                "beta": engine.algorithm.beta.value,
                "bonus": engine.algorithm.entropy.value,
                "state": getattr(engine.algorithm.advantage.function, "baselines", {}),
            }
    return tensors, metrics


def as_bytes(values: list[Any]) -> torch.Tensor:
    """``values`` as JSON in a tensor, which is what processes hand to the test."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def gather_ragged(build: dict[str, Any], workers: Workers) -> dict[str, torch.Tensor]:
    """Rows of every process, of which there are not equally many; and the tokens of highest entropy."""
    num_rows = 4 - 3 * workers.rank
    rows = torch.arange(2 * num_rows, dtype=torch.float64).reshape(num_rows, 2) + 100 * workers.rank
    share = workers.share(len(PROMPTS))
    batch = collate(build["make_rollouts"](PROMPTS[share], COMPLETIONS[share]), pad_token_id=0)
    mask = batch.completion_mask
    engine = build["make_engine"](build["tiny_policy"](0), workers=workers, top_entropy_quantile=0.3)
    entropy = engine.policy.frozen_logprobs(batch, 3).entropy
    return {
        "rows": workers.gather(rows),
        "whole numbers": workers.gather(torch.arange(3 * workers.rank)),
        "values": as_bytes(workers.gather_values([] if workers.rank == 0 else ["é \u2028\n", "", {"z": [1.5]}])),
        "more values": as_bytes(workers.gather_values([f"rank {workers.rank}"])),
        "entropy": workers.gather(entropy[mask]),
        "high": workers.gather(engine.high_entropy(entropy, mask)[mask]),
    }


WORDS = ["one", "two", "three", "four", "five", "six"]


def learn_preferences(workers: Workers) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights of a preference model that is taught pairs of every process, and the pairs of its last step."""
    reward = Preference(hidden_size=32, num_layers=1, batch_size=4, updates=2, learning_rate=1e-2)
    everyone: list[Any] = []
    for step in range(3):
        lessons = [[f"step {step}", f"{word} good", f"{word} bad", 1.0] for word in WORDS]
        # The last step has pairs in one process only.
        mine = lessons[:1] * (workers.rank == 0) if step == 2 else lessons[workers.share(len(lessons))]
        everyone = workers.gather_values(mine)
        reward.learn(everyone)
    return {f"learned/{name}": value for name, value in reward.state_dict()["weights"].items()}, everyone


def take_part(workers: Workers) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients, metrics and updated weights of this process's share of every case."""
    build = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
    tensors, metrics = take_updates(build, workers)
    steps, reports = take_steps(build, workers)
    gathered = gather_ragged(build, workers)
    learned, metrics["lessons"] = learn_preferences(workers)
    gathered |= learned
    tensors |= {f"step/{name}": tensor for name, tensor in steps.items()}
    tensors |= {f"gathered/{name}": tensor for name, tensor in gathered.items()}
    metrics |= {f"step/{name}": report for name, report in reports.items()}
    return tensors, metrics


def take_updates(build: dict[str, Any], workers: Workers) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients, metrics and updated weights of one optimizer step for every case and reduction."""
    tensors: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {}
    share = workers.share(len(PROMPTS))
    for case, completions in CASES.items():
        rollouts = build["make_rollouts"](PROMPTS[share], completions[share])
        batch = collate(rollouts, pad_token_id=0)
        for reduction in sorted(REDUCTIONS):
            policy, reference = build["tiny_policy"](0), build["tiny_policy"](2)
            engine = build["make_engine"](
                policy, reference=reference, beta=0.1, reduction=reduction, micro_batch_size=3, workers=workers
            )
            with torch.no_grad():
                old = build["tiny_policy"](1).logprobs(batch).logprobs
            advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)[share]
            frozen = build["make_frozen"](old, engine.freeze(batch, Meter())[1], advantages)
            meter = Meter()
            engine.update(batch, frozen, rollouts.max_completion_length, meter)
            name = f"{case}/{reduction}"
            tensors[name] = torch.cat([parameter.detach().flatten() for parameter in policy.trainable()])
            metrics[name] = averages(workers.sum_totals(meter.totals))
            # `update` has spent the gradient: take it again, without the step.
            engine.accumulate(batch, frozen, rollouts.max_completion_length, Meter())
            workers.sum_gradients(policy.trainable())
            tensors[f"{name}/gradient"] = build["flat_gradient"](policy)
    metrics["any"] = [workers.any(workers.rank == 1), workers.any(False)]
    return tensors, metrics


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen([sys.executable, __file__, str(folder)], env=common | {"RANK": str(rank)}) for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")))
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def one() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return take_part(Workers())


def test_gradients_and_weights_are_those_of_one_process(one: Any, two: Any) -> None:
    updates = {name: tensor for name, tensor in one[0].items() if not name.startswith(("step/", "gathered/"))}
    assert len(updates) == 16
    for name, expected in updates.items():
        assert float(expected.norm()) > 0.1
        for tensors, _ in two:
            assert float((tensors[name] - expected).norm() / expected.norm()) <= 1e-12, name


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_a_whole_step_is_that_of_one_process(case: str, step: str, one: Any, two: Any) -> None:
    name = f"step/{case}/{step}"
    assert float(one[0][f"{name}/moved"].norm()) > 1e-6, "a step that does not move would prove nothing"
    for tensors, metrics in two:
        for part in ("", "/advantages", "/rewards"):
            torch.testing.assert_close(tensors[name + part], one[0][name + part], rtol=0, atol=1e-12)
        alone, reported = one[1][name], metrics[name]
        compared = {
            "loss",
            "entropy",
            "grad_norm",
            "reward",
            "beta",
            "bonus",
            "rewards/large/mean",
            "kl",
            "sampling/ess",
        }
        compared |= {"reward_T/0.7/mean", "reward_T/1.1/mean", "reward_T/1.3/mean"}
        compared |= {"paired/gap_mean", "paired/tie_ratio", "paired/win_rate_cold"}
        compared |= {"coefficient/beta", "coefficient/entropy_coef", "correction/mean", "frac_reward_zero_std"}
        shared = compared & set(alone)
        assert set(reported) == set(alone) and len(shared) >= 7
        assert {key: reported[key] for key in shared} == pytest.approx(
            {key: alone[key] for key in shared}, rel=1e-11, abs=1e-14, nan_ok=True
        )


def test_baselines_by_temperature_are_those_of_all_rows_bit_for_bit(one: Any, two: Any) -> None:
    name = "step/whole/pairs, baselines by temperature, a common target"
    assert sorted(one[1][name]["state"].values()) != [0.0] * 3 and len(one[1][name]["state"]) == 3
    for _, metrics in two:
        # JSON has strings for keys, and floats to the last bit.
        assert metrics[name]["state"] == {str(key): value for key, value in one[1][name]["state"].items()}


def test_rows_of_all_processes_are_gathered_in_order(one: Any, two: Any) -> None:
    for tensors, _ in two:
        assert tensors["gathered/rows"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [100, 101]]
        assert tensors["gathered/whole numbers"].tolist() == [0, 1, 2], "one process had none"
        assert json.loads(bytes(tensors["gathered/values"].tolist())) == ["é \u2028\n", "", {"z": [1.5]}], (
            "one process had none"
        )
        assert json.loads(bytes(tensors["gathered/more values"].tolist())) == ["rank 0", "rank 1"]
        torch.testing.assert_close(tensors["gathered/entropy"], one[0]["gathered/entropy"], rtol=0, atol=1e-12)


def test_what_learns_from_steps_is_the_same_model_in_every_process(one: Any, two: Any) -> None:
    names = [name for name in one[0] if name.startswith("gathered/learned/")]
    assert len(names) > 20
    for tensors, metrics in two:
        assert metrics["lessons"] == one[1]["lessons"] == [["step 2", "one good", "one bad", 1.0]]
        assert all(tensors[name].equal(one[0][name]) for name in names)


def test_values_are_gathered_as_json_has_them() -> None:
    values = [["é\n\u2028", 1.5, None], {"a": (1, 2)}, "\ud800"]
    assert Workers().gather_values(values) == [["é\n\u2028", 1.5, None], {"a": [1, 2]}, "\ud800"]
    assert Workers().gather_values([]) == []
    with pytest.raises(ValueError):
        Workers().gather_values([float("nan")])


def test_the_tokens_of_highest_entropy_are_those_of_all_processes(one: Any, two: Any) -> None:
    alone = one[0]["gathered/high"]
    assert len(alone) == 25 and float(alone.sum()) == 8, "3 of 10, rounded up"
    for tensors, _ in two:
        assert tensors["gathered/high"].equal(alone)


def test_all_processes_hold_the_same_weights_bit_for_bit(two: Any) -> None:
    for name, tensor in two[0][0].items():
        assert tensor.equal(two[1][0][name]), name


def test_metrics_are_those_of_one_process(one: Any, two: Any) -> None:
    alone = one[1]
    for case in (f"{case}/{reduction}" for case in CASES for reduction in REDUCTIONS):
        assert {"loss", "kl", "entropy", "grad_norm", "learning_rate", "clip_ratio/region_mean"} <= set(alone[case])
        for _, metrics in two:
            assert set(metrics[case]) == set(alone[case])
            averaged = {name: value for name, value in alone[case].items() if not name.startswith("invariant/")}
            assert {name: metrics[case][name] for name in averaged} == pytest.approx(averaged, rel=1e-11)


def test_a_flag_of_one_process_is_seen_by_all(two: Any) -> None:
    assert [metrics["any"] for _, metrics in two] == [[True, False]] * 2


def test_one_process_needs_no_peers() -> None:
    workers = Workers()
    counts = Counts(rows=2, tokens=5, max_completion_length=8)
    parameter = torch.nn.Parameter(torch.zeros(2))
    workers.sum_gradients([parameter])
    assert workers.is_main and workers.share(6) == slice(0, 6)
    assert workers.sum_counts(counts) is counts and parameter.grad is None
    assert workers.any(True) and not workers.any(False)


def test_prompts_are_shared_without_overlap() -> None:
    assert [Workers(rank, 3).share(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [Workers(rank, 3).is_main for rank in range(3)] == [True, False, False]


def test_a_loss_that_looks_at_every_row_needs_one_process() -> None:
    with pytest.raises(ConfigError) as refused:
        check_coupling(KLCov(), "kl_cov", Workers(rank=1, size=2))
    assert refused.value.message == (
        "loss `kl_cov` looks at every completion of an optimizer step, and each of 2 processes holds a part"
    )
    assert refused.value.hint == "use one process, or another loss"
    check_coupling(KLCov(), "kl_cov", Workers())
    check_coupling(Clip(), "clip", Workers(rank=1, size=2))


@pytest.mark.parametrize(("cuda", "calls"), [(True, ["device 1", "nccl"]), (False, ["gloo"])])
def test_each_rank_takes_its_device_before_it_meets_the_others(
    cuda: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: made.append(f"device {index}"))
    monkeypatch.setattr("torch.distributed.init_process_group", made.append)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert start_workers() == Workers(rank=1, size=2)
    assert made == calls


def test_a_group_of_one_process_is_left_to_who_made_it(tmp_path: Path) -> None:
    """An engine inside the process, such as vLLM's, makes one for itself and takes it down itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        stop_workers()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    workers = start_workers()
    tensors, metrics = take_part(workers)
    save_file(tensors, folder / f"{workers.rank}.safetensors")
    (folder / f"{workers.rank}.json").write_text(json.dumps(metrics), encoding="utf-8")
    stop_workers()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
