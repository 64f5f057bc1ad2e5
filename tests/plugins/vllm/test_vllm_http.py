"""Answers that come late, broken, or not at all."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from grpoforge.errors import ConfigError, RunFailed
from grpoforge_plugins.samplers import vllm_http
from grpoforge_plugins.samplers.vllm_http import Refused, Server

PATH = "/v1/models"


def hang_up(answer: Any) -> Any:
    raise ConnectionResetError


def half(answer: tuple[int, Any]) -> tuple[int, Any]:
    """An answer that was cut."""
    return answer[0], json.dumps(answer[1]).encode()[:10]


def late(seconds: float) -> Callable[[Any], Any]:
    def wait(answer: Any) -> Any:
        time.sleep(seconds)
        return answer

    return wait


@pytest.mark.parametrize(
    "fault", [(500, {}), (503, b"busy"), (429, {}), hang_up, half, (200, b"<html>")], ids=lambda one: str(one)[:20]
)
def test_what_may_pass_is_tried_again(fault: Any, servers: Any) -> None:
    fake = servers(faults={PATH: [fault, fault]})
    assert Server(fake.url, timeout=10, retries=2).get(PATH)["data"][0]["id"] == "the-model"
    assert fake.paths() == [PATH] * 3


def test_each_wait_is_twice_the_last(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_http, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(vllm_http, "LONGEST_WAIT", 0.15)
    times: list[float] = []

    def busy(answer: Any) -> Any:
        times.append(time.monotonic())
        return 503, {}

    fake = servers(faults={PATH: [busy] * 4})
    Server(fake.url, timeout=10, retries=4).get(PATH)
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert [wait > expected for wait, expected in zip(waits, (0.05, 0.1, 0.15))] == [True] * 3


def test_a_server_that_is_not_there_is_named(free_port: int) -> None:
    with pytest.raises(RunFailed) as refused:
        Server(f"http://127.0.0.1:{free_port}", timeout=5, retries=2).post("/v1/completions", {})
    assert refused.value.message == (
        f"the vLLM server http://127.0.0.1:{free_port} failed: Connection refused "
        "(POST /v1/completions, attempts: 3, 0 s)"
    )
    assert refused.value.hint == ("start it again (docs/guides/vllm.md), then continue with `grpoforge train --resume`")


def test_a_server_that_died_of_a_request_tells_what_of(servers: Any) -> None:
    fake = servers()
    error = {"error": {"message": "EngineCore encountered\n an issue."}}
    fake.faults[PATH] = [lambda answer: (fake.close(), (500, error))[1]]
    with pytest.raises(RunFailed, match=r"failed: status 500, `EngineCore encountered an issue.`, then Connection ref"):
        Server(fake.url, timeout=5, retries=3).get(PATH)


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_the_time_out(servers: Any) -> None:
    fake = servers(faults={PATH: [late(5), late(5)]})
    start = time.monotonic()
    with pytest.raises(RunFailed, match=r"no answer within 0.2 s \(sampler option `timeout`\) \(GET .* attempts: 2"):
        Server(fake.url, timeout=0.2, retries=1).get(PATH)
    assert time.monotonic() - start < 4


def test_a_refusal_is_final_and_quotes_the_server(servers: Any) -> None:
    fake = servers(faults={PATH: [(400, {"error": {"message": "max_tokens is too large"}})]})
    with pytest.raises(Refused, match=r"refused /v1/models: status 400, `max_tokens is too large`") as refused:
        Server(fake.url, timeout=5, retries=3).get(PATH + "?page=1")
    assert refused.value.status == 400
    assert fake.paths() == [PATH]


def test_a_field_that_is_not_there_is_named(servers: Any) -> None:
    server = Server(servers().url, timeout=5, retries=0)
    assert server.get_field(PATH, "data", 0, "max_model_len") == 256
    with pytest.raises(RunFailed, match=r"answered /v1/models without `data.7.id`"):
        server.get_field(PATH, "data", 7, "id")


def test_the_key_is_taken_from_the_environment(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = servers(key="secret")
    server = Server(fake.url, timeout=5, retries=0)
    with pytest.raises(Refused, match="status 401"):
        server.get(PATH)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert server.get(PATH)["data"]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_an_address_may_be_the_one_given_to_openai_clients(path: str, servers: Any) -> None:
    fake = servers()
    server = Server(fake.url + path, timeout=5, retries=0)
    assert server.url == fake.url
    assert server.get("/version") == {"version": "0.32.0"}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "ftp://host", "http://host:99999", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="which is no address of a server") as refused:
        Server(url, timeout=5, retries=0)
    assert f"`{url}`" in refused.value.message
    assert refused.value.hint == "write for instance http://127.0.0.1:8000"


def test_calls_can_be_ended_at_once(servers: Any) -> None:
    fake = servers(faults={PATH: [late(20)]})
    server = Server(fake.url, timeout=30, retries=5)
    start = time.monotonic()
    threading.Timer(0.2, server.cancel).start()
    with pytest.raises(RunFailed):
        server.get(PATH)
    assert time.monotonic() - start < 5
    server.allow()
    assert server.get(PATH)["data"]
