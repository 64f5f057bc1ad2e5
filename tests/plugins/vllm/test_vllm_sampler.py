"""Rollouts from servers: whose weights, which tokens, which log-probs, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpoforge.collate import collate
from grpoforge.errors import ConfigError, PluginError, RunFailed
from grpoforge.plugins import load_plugins
from grpoforge.policy import Policy
from grpoforge.precision import Precision
from grpoforge.testing import check_component
from grpoforge.types import Prompt, Rollouts
from grpoforge_plugins.samplers.vllm import VLLMColocateSampler, VLLMSampler

Prompts = tuple[Prompt, ...]


def sampler(*fakes: Any, **options: Any) -> VLLMSampler:
    settings = {"max_completion_length": 9, "timeout": 20.0, "retries": 1} | options
    return VLLMSampler(base_urls=tuple(fake.url for fake in fakes), **settings)


def moved(policy: Policy) -> Policy:
    """The policy after an optimizer step."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.version += 1
    return policy


def gap(policy: Policy, rollouts: Rollouts) -> float:
    """Largest difference between reported log-probs and the policy's own."""
    batch = collate(rollouts, pad_token_id=0)
    own = policy.frozen_logprobs(batch, 64).logprobs
    return float((own - batch.sampling_logprobs)[batch.completion_mask].abs().max())


def content(rollouts: Rollouts) -> list[Any]:
    return [(one.token_ids, one.finish_reason, one.text) for one in rollouts.flat()]


@pytest.mark.slow
def test_keeps_the_contract_of_samplers(tiny_math_servers: Any) -> None:
    component = load_plugins().registry.get("sampler", "vllm")
    report = check_component(component, {"base_urls": [tiny_math_servers().url, tiny_math_servers().url]})
    assert report.kept, report
    assert sum(one.status == "passed" for one in report.findings) >= 8, report


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_are_the_policys_at_the_temperature(
    temperature: float, servers: Any, policy: Policy, prompts: Prompts
) -> None:
    rollouts = sampler(servers(), temperature=temperature).sample(policy, prompts, 4, seed=1)
    assert rollouts.prompts == prompts and rollouts.group_size == 4
    assert gap(policy, rollouts) < 1e-5
    assert {one.temperature for one in rollouts.flat()} == {temperature}


def test_ends_belong_to_the_tokens_and_are_the_policys_own(servers: Any, policy: Policy, prompts: Prompts) -> None:
    policy.model.generation_config.eos_token_id = [6, 11]
    rollouts = sampler(servers(), max_completion_length=12).sample(policy, prompts, 16, seed=2)
    assert {one.token_ids[-1] for one in rollouts.flat() if one.finish_reason == "stop"} == {1, 6, 11}
    for one in rollouts.flat():
        assert not {1, 6, 11} & set(one.token_ids[:-1])
        assert one.finish_reason == ("stop" if one.token_ids[-1] in (1, 6, 11) else "length")
        assert one.text == policy.tokenizer.batch_decode([one.token_ids])[0]


def test_the_rollouts_depend_on_the_seed_and_not_on_the_number_of_servers(
    servers: Any, policy: Policy, prompts: Prompts
) -> None:
    one = sampler(servers()).sample(policy, prompts, 3, seed=4)
    several = sampler(servers(), servers(), servers()).sample(policy, prompts, 3, seed=4)
    assert content(one) == content(several)
    assert content(one) != content(sampler(servers()).sample(policy, prompts, 3, seed=5))
    first, second = [sampler(servers()).sample(policy, prompts[:1] * 2, 3, 4).completions[group] for group in (0, 1)]
    assert first != second, "the same prompt twice is drawn twice"


def test_greedy_takes_the_most_probable_token(servers: Any, policy: Policy, prompts: Prompts) -> None:
    rollouts = sampler(servers(), temperature=1.7, top_k=2).greedy(policy, prompts)
    assert gap(policy, rollouts) < 1e-5, "log-probs and the temperature they are told to have belong together"
    for prompt, (one,) in zip(prompts, rollouts.completions):
        ids = torch.tensor([[*prompt.token_ids, *one.token_ids]])
        best = policy.model(ids).logits[0, len(prompt.token_ids) - 1 : -1].argmax(dim=1)
        assert best.tolist() == list(one.token_ids)


def test_requests_go_to_the_server_with_the_fewest_under_way(servers: Any, policy: Policy, prompts: Prompts) -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(answer: Any) -> Any:
        both.wait()
        return answer

    fakes = [servers(), servers()]
    drawer = sampler(*fakes)
    drawer.sync(policy)
    for fake in fakes:
        fake.seen.clear()
        fake.faults["/v1/completions"] = [meet]  # neither answers before the other has been asked
    drawer.sample(policy, prompts[:2], 1, seed=0)
    assert [fake.paths().count("/v1/completions") for fake in fakes] == [1, 1]


def test_no_more_prompts_are_under_way_than_allowed(servers: Any, policy: Policy, prompts: Prompts) -> None:
    under_way, most = [0], [0]
    lock = threading.Lock()

    def count(answer: Any) -> Any:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        with lock:
            under_way[0] -= 1
        return answer

    fake = servers()
    drawer = sampler(fake, concurrency=2)
    drawer.sync(policy)
    fake.faults["/v1/completions"] = [count] * 6
    drawer.sample(policy, prompts * 2, 1, seed=0)
    assert most == [2]


def test_weights_are_loaded_before_the_first_draw_and_once_per_sync(
    servers: Any, policy: Policy, prompts: Prompts
) -> None:
    fakes = [servers(), servers()]
    drawer = sampler(*fakes)
    drawer.greedy(policy, prompts)
    drawer.sample(policy, prompts, 2, seed=0)
    for fake in fakes:
        assert fake.paths().count("/collective_rpc") == 1
        asked = fake.paths()
        order = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
        start = asked.index("/pause")
        assert asked[start : start + 5] == order
        assert not fake.is_paused
    assert gap(policy, drawer.sample(moved(policy), prompts, 4, seed=1)) > 1e-2, "not synced: the old weights"
    assert drawer.sample(policy, prompts, 1, seed=1).flat()[0].policy_version == 0
    drawer.sync(policy)
    rollouts = drawer.sample(policy, prompts, 4, seed=1)
    assert gap(policy, rollouts) < 1e-5
    assert {one.policy_version for one in rollouts.flat()} == {1}
    assert [fake.paths().count("/collective_rpc") for fake in fakes] == [2, 2]
    assert fakes[0].weight_version == fakes[1].weight_version
    assert fakes[0].weight_version.endswith("-2-1")


def test_another_policy_gets_its_own_weights(
    servers: Any, policy: Policy, prompts: Prompts, tiny_policy: Callable[..., Policy]
) -> None:
    drawer = sampler(servers())
    drawer.sample(policy, prompts, 1, seed=0)
    other = tiny_policy(seed=8, dtype=torch.float32)
    assert gap(other, drawer.sample(other, prompts, 4, seed=0)) < 1e-5


def test_an_adapter_is_added_to_the_weights_and_the_policy_stays_as_it_is(
    servers: Any, policy: Policy, prompts: Prompts
) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = Policy(get_peft_model(policy.model, lora), policy.tokenizer, Precision(torch.float32))
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    rollouts = sampler(servers()).sample(adapted, prompts, 4, seed=0)
    assert gap(adapted, rollouts) < 1e-5
    with adapted.model.disable_adapter():
        assert gap(adapted, rollouts) > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.state_dict().items())


def test_the_folder_with_the_weights_is_where_it_was_asked_for_and_goes_away(
    servers: Any, policy: Policy, prompts: Prompts, tmp_path: Path
) -> None:
    fake = servers()
    sampler(fake, sync_folder=str(tmp_path)).greedy(policy, prompts)
    (body,) = [body for path, body in fake.seen if path == "/collective_rpc"]
    folder = Path(body["kwargs"]["weights_path"])
    assert folder.parent == tmp_path
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_named(
    servers: Any, policy: Policy, prompts: Prompts, tmp_path: Path
) -> None:
    with pytest.raises(RunFailed, match=f"cannot be written to {tmp_path}/no: No such file") as refused:
        sampler(servers(), sync_folder=f"{tmp_path}/no").greedy(policy, prompts)
    assert "`sampler.sync_folder`" in refused.value.hint


def test_a_server_that_cannot_read_the_folder_says_so(servers: Any, policy: Policy, prompts: Prompts) -> None:
    refusal = (500, {"error": {"message": "Call to collective_rpc method failed: no such folder"}})
    fake = servers(faults={"/collective_rpc": [refusal, refusal]})
    with pytest.raises(RunFailed, match=f"{fake.url} failed: status 500, `Call to collective_rpc.*no such") as refused:
        sampler(fake).greedy(policy, prompts)
    assert "can the server read" in refused.value.hint and "`sampler.sync_folder`" in refused.value.hint


def test_a_server_that_was_left_paused_draws_again(servers: Any, policy: Policy, prompts: Prompts) -> None:
    start = time.monotonic()
    sampler(servers(is_paused=True)).greedy(policy, prompts)
    assert time.monotonic() - start < 15


REFUSED = [
    ({"version": "0.31.4"}, r"{url} is version 0.31.4; this sampler needs 0.32 or newer", "pip install 'vllm>=0.32'"),
    ({"logprobs_mode": "raw_logprobs"}, r"{url} reports `raw_logprobs`", "--logprobs-mode processed_logprobs"),
    ({"is_development": False}, r"{url} refused /server_info: status 404.*not in dev", "VLLM_SERVER_DEV_MODE=1"),
    ({"max_model_len": 12}, r"may take 13 tokens, and the vLLM server {url} takes 12", "--max-model-len"),
    ({"faults": {"/version": [(200, [])]}}, r"{url} answered /version without `version`", "`sampler.base_urls`"),
]


@pytest.mark.parametrize(("changes", "told", "hint"), REFUSED, ids=lambda one: str(one)[:30])
def test_a_server_that_does_not_fit_is_refused_before_anything_is_drawn(
    changes: dict[str, Any], told: str, hint: str, servers: Any, policy: Policy, prompts: Prompts
) -> None:
    fake = servers(**changes)
    with pytest.raises(ConfigError, match=told.format(url=fake.url)) as refused:
        sampler(servers(), fake).sample(policy, prompts, 2, seed=0)
    assert hint in refused.value.hint
    drawn = [body for path, body in fake.seen if path == "/v1/completions" and body["max_tokens"] > 1]
    assert drawn == []


def test_a_server_that_is_not_there_is_a_mistake_of_the_configuration(
    free_port: int, policy: Policy, prompts: Prompts
) -> None:
    drawer = VLLMSampler(base_urls=(f"http://127.0.0.1:{free_port}",), retries=1)
    with pytest.raises(ConfigError, match=f"http://127.0.0.1:{free_port} failed: Connection refused") as refused:
        drawer.greedy(policy, prompts)
    assert "`VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`" in refused.value.hint


def test_servers_of_several_versions_are_refused(servers: Any, policy: Policy, prompts: Prompts) -> None:
    old, new = servers(), servers(version="0.33.1")
    with pytest.raises(ConfigError, match=f"{old.url} is 0.32.0, {new.url} is 0.33.1"):
        sampler(old, new).greedy(policy, prompts)


@pytest.mark.parametrize(("size", "told"), [(23, "does not know token 23"), (25, "knows token 24")])
def test_another_vocabulary_is_refused(size: int, told: str, servers: Any, policy: Policy, prompts: Prompts) -> None:
    fake = servers()
    fake.policy.model.resize_token_embeddings(size, mean_resizing=False)
    with pytest.raises(ConfigError, match=f"{fake.url} {told}, and the policy's vocabulary has 24") as refused:
        sampler(fake).greedy(policy, prompts)
    assert "`model.name`" in refused.value.hint


def test_weights_that_somebody_else_loaded_are_noticed(servers: Any, policy: Policy, prompts: Prompts) -> None:
    fake = servers()
    drawer = sampler(fake)
    drawer.greedy(policy, prompts)
    fake.weight_version = "default"
    with pytest.raises(RunFailed, match=f"{fake.url} holds the weights `default`, not `grpoforge-.*-1-0`") as refused:
        drawer.sample(policy, prompts, 2, seed=0)
    assert "it was started anew, or another run uses it" in refused.value.hint


def test_two_runs_never_use_one_version(servers: Any, policy: Policy, prompts: Prompts) -> None:
    fake = servers()
    first, second = sampler(fake), sampler(fake)
    first.greedy(policy, prompts)
    second.greedy(policy, prompts)
    with pytest.raises(RunFailed, match="holds the weights"):
        first.greedy(policy, prompts)


def test_a_server_that_dies_ends_the_other_requests_at_once(servers: Any, policy: Policy, prompts: Prompts) -> None:
    alive, dying = servers(), servers()
    drawer = sampler(alive, dying)
    drawer.sync(policy)

    def slow(answer: Any) -> Any:
        time.sleep(15)
        return answer

    def die(answer: Any) -> Any:
        dying.close()
        raise ConnectionResetError

    alive.faults["/v1/completions"] = [slow] * 3
    dying.faults["/v1/completions"] = [die]
    start = time.monotonic()
    with pytest.raises(RunFailed, match=f"the vLLM server {dying.url} failed: .*, then Connection refused"):
        drawer.sample(policy, prompts, 2, seed=0)
    assert time.monotonic() - start < 8


def test_an_answer_that_cannot_be_names_the_server(servers: Any, policy: Policy, prompts: Prompts) -> None:
    fake = servers()
    drawer = sampler(fake)
    drawer.sync(policy)

    def without(answer: Any) -> Any:
        answer[1]["choices"][0]["logprobs"] = None
        return answer

    fake.faults["/v1/completions"] = [without]
    with pytest.raises(RunFailed, match=f"the vLLM server {fake.url} answered without `logprobs`") as refused:
        drawer.sample(policy, prompts, 2, seed=0)
    assert "is it vLLM 0.32 or newer?" in refused.value.hint


@pytest.mark.parametrize("transfer", [None, {"backend": "nccl"}])
def test_transfer_is_refused_without_gpus(transfer: Any, servers: Any, policy: Policy, prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="`sync` is `transfer`, and NCCL weight transfer cannot be used") as refused:
        sampler(servers(transfer=transfer), sync="transfer").greedy(policy, prompts)
    assert "--weight-transfer-config" in refused.value.hint and "sync: reload" in refused.value.hint


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 0.0}, "`temperature` is 0"),
        ({"max_completion_length": 0}, "`max_completion_length` is 0"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"min_p": 2.0}, "`min_p` is 2"),
        ({"base_urls": ()}, "`base_urls` is 0"),
        ({"timeout": 0.0}, "`timeout` is 0"),
        ({"retries": -1}, "`retries` is -1"),
        ({"concurrency": 0}, "`concurrency` is 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        VLLMSampler(**options)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gpu_memory_utilization": 1.2}, "`gpu_memory_utilization` is 1.2"),
        ({"tensor_parallel_size": 0}, "`tensor_parallel_size` is 0"),
        ({"max_model_len": -1}, "`max_model_len` is -1"),
    ],
)
def test_options_of_the_colocated_engine_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        VLLMColocateSampler(**options)
    assert refused.value.hint


def test_the_colocated_engine_says_when_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PluginError, match="`vllm_colocate` needs vLLM, which is not installed here") as refused:
        VLLMColocateSampler()
    assert refused.value.hint.startswith("`pip install 'grpoforge[vllm]'`")
