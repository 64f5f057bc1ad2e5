"""Whole runs against servers: through the command line, and when a server dies under them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.cli.main import main

SMALL = (
    *("--max-steps", "3"),
    *("--set", "data.num_eval=2"),
    *("--set", "batch={prompts_per_step: 2, completions_per_prompt: 2, minibatch_size: 4, micro_batch_size: 4}"),
    *("--set", "sampler.max_completion_length=4"),
    *("--set", "sampler.retries=1"),
    *("--set", "trackers=[{name: jsonl}]"),
    *("--set", "optim.learning_rate=0.01"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``run(ARGUMENTS)``: exit code and what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return ended.value.code, capsys.readouterr().err

    return command


def train(url: str, *more: str) -> tuple[str, ...]:
    return ("train", "--sampler", "vllm", "--set", f"sampler.base_urls=[{url}]", *SMALL, "--output", "run", *more)


def steps() -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step_time" in line]


@pytest.mark.slow
def test_the_weights_are_synced_once_per_step(run: Callable[..., Any], tiny_math_servers: Any) -> None:
    fake = tiny_math_servers()
    code, said = run(*train(fake.url))
    assert code in (0, None), said
    assert fake.paths().count("/collective_rpc") == 1 + 3, "before the first draw, and after each step"
    assert fake.weight_version.endswith("-4-3"), "4 loads, 3 optimizer steps"
    assert [step["step"] for step in steps()] == [1, 2, 3]
    assert max(step["sampling/sampling_logp_difference/max"] for step in steps()) < 1e-4


@pytest.mark.slow
def test_a_run_whose_server_dies_is_saved_and_goes_on(run: Callable[..., Any], tiny_math_servers: Any) -> None:
    fake = tiny_math_servers()

    def die(answer: Any) -> Any:
        fake.close()
        raise ConnectionResetError

    answered = [lambda answer: answer] * (2 + 2 + 2 + 2)  # the vocabulary, evaluation, two steps of two prompts
    fake.faults["/v1/completions"] = [*answered, die]
    code, said = run(*train(fake.url))
    assert code == 1
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: the vLLM server {fake.url} failed: ") and "Connection refused" in error
    assert "hint: start it again (docs/guides/vllm.md), then continue with `grpoforge train --resume`" in said
    assert [step["step"] for step in steps()] == [1, 2]

    back = tiny_math_servers(port=fake.port)
    code, said = run("train", "--resume", "run")
    assert code in (0, None), said
    assert [step["step"] for step in steps()] == [1, 2, 3]
    assert steps()[-1]["sampling/sampling_logp_difference/max"] < 1e-4, "the server that came back got the weights"
    assert back.paths().count("/collective_rpc") == 2, "of the checkpoint, and after the last step"


def test_a_server_that_is_not_there_is_refused_before_a_step(run: Callable[..., Any], free_port: int) -> None:
    code, said = run(*train(f"http://127.0.0.1:{free_port}"))
    assert code == 2
    assert f"error: the vLLM server http://127.0.0.1:{free_port} failed: Connection refused" in said
    assert "hint: start it with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`" in said


def test_what_is_no_address_is_refused_without_a_run(run: Callable[..., Any]) -> None:
    code, said = run(*train("localhost"))
    assert code == 2
    assert "error: sampler option `base_urls` has `localhost`, which is no address of a server" in said
    assert "hint: write for instance http://127.0.0.1:8000" in said


def test_the_colocated_sampler_asks_for_vllm(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, said = run("train", "--sampler", "vllm_colocate", "--set", "sampler.max_completion_length=4", "--dry-run")
    assert code == 2
    assert "error: the sampler `vllm_colocate` needs vLLM, which is not installed here" in said
    assert "hint: `pip install 'grpoforge[vllm]'`, or use a server: `--sampler vllm`" in said
