"""A server that speaks what vLLM 0.32 speaks, over a real socket, with a model that transformers runs."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch

from grpoforge.config import ModelConfig
from grpoforge.policy import Policy
from grpoforge.types import Prompt
from grpoforge_plugins import load_policy
from grpoforge_plugins.samplers import vllm_http
from grpoforge_plugins.samplers.hf import generate, seeded

Answer = tuple[int, Any]

ONE_AT_A_TIME = threading.Lock()
"""All servers are in one process, which has one global random generator."""


@dataclass
class View:
    """What `generate` needs of a policy, with ends of the request's choosing."""

    policy: Policy
    ends: frozenset[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def eos_token_ids(self) -> frozenset[int]:
        return self.ends


class FakeVLLM:
    """One server. ``faults`` are taken one per request of their path: a status and body, or a function to call.

    A function may change the true answer, wait, or raise ``ConnectionResetError`` to hang up.
    """

    def __init__(self, policy: Policy, port: int = 0) -> None:
        self.policy = policy
        self.version, self.weight_version = "0.32.0", "default"
        self.logprobs_mode, self.max_model_len = "processed_logprobs", 256
        self.transfer: dict[str, str] | None = None
        self.is_development = True
        self.is_paused = False
        self.key = ""
        self.faults: dict[str, list[Any]] = {}
        self.seen: list[tuple[str, Any]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop listening, as a server does whose machine went away."""
        self._server.shutdown()
        self._server.server_close()

    def paths(self) -> list[str]:
        """The paths asked for, in order."""
        return [path for path, _ in self.seen]

    def answer(self, path: str, query: Mapping[str, str], body: Any) -> Answer:
        """The status and JSON of one request."""
        with self._lock:
            fault = self.faults.get(path, []).pop(0) if self.faults.get(path) else None
        if isinstance(fault, tuple):
            return fault
        route = getattr(self, "on_" + path.strip("/").replace("/", "_"), None)
        if route is None or (not self.is_development and path not in ("/version", "/v1/models", "/v1/completions")):
            return 404, {"detail": "Not Found"}
        if path == "/v1/completions" and self.is_paused:
            time.sleep(30)
        with ONE_AT_A_TIME:
            answer: Answer = route({**query, **(body or {})})
        return fault(answer) if fault else answer

    def on_version(self, _: Any) -> Answer:
        return 200, {"version": self.version}

    def on_v1_models(self, _: Any) -> Answer:
        return 200, {"data": [{"id": "the-model", "max_model_len": self.max_model_len}]}

    def on_server_info(self, asked: Mapping[str, Any]) -> Answer:
        assert asked["config_format"] == "json"
        config = {"logprobs_mode": self.logprobs_mode}
        return 200, {"vllm_config": {"model_config": config, "weight_transfer_config": self.transfer}}

    def on_weight_info(self, _: Any) -> Answer:
        return 200, {"weight_version": self.weight_version}

    def on_update_weight_version(self, asked: Mapping[str, Any]) -> Answer:
        self.weight_version = asked["new_version"]
        return 200, {"success": True}

    def on_pause(self, asked: Mapping[str, Any]) -> Answer:
        assert asked["mode"] == "abort"
        self.is_paused = True
        return 200, {"status": "paused"}

    def on_resume(self, _: Any) -> Answer:
        self.is_paused = False
        return 200, {"status": "resumed"}

    def on_reset_prefix_cache(self, _: Any) -> Answer:
        return 200, {"success": True}

    def on_collective_rpc(self, asked: Mapping[str, Any]) -> Answer:
        from transformers import AutoModelForCausalLM

        assert asked["method"] == "reload_weights" and self.is_paused
        try:
            self.policy.model = AutoModelForCausalLM.from_pretrained(
                asked["kwargs"]["weights_path"], dtype=torch.float32, local_files_only=True
            )
        except OSError as error:
            return 500, {"error": {"message": f"Call to collective_rpc method failed: {error}"}}
        return 200, {"results": [None]}

    def on_v1_completions(self, asked: Mapping[str, Any]) -> Answer:
        prompt, length = asked["prompt"], asked["max_tokens"]
        vocabulary = self.policy.model.config.vocab_size
        if max(prompt) >= vocabulary:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        if len(prompt) + length > self.max_model_len:
            return 400, {"error": {"message": f"max_tokens={length} cannot be greater than max_model_len"}}
        view = View(self.policy, frozenset(asked.get("stop_token_ids", ())))
        question = Prompt(text="", token_ids=tuple(prompt), columns={}, index=0)
        temperature = asked.get("temperature", 1.0)
        cuts = {"top_p": asked.get("top_p", 1.0), "top_k": asked.get("top_k", 0)} if temperature else {}
        choices = []
        for index in range(asked.get("n", 1)):
            with seeded(asked.get("seed", 0) + index, self.policy.device):
                (one,) = generate(view, [question], [temperature or 1.0], length, do_sample=temperature > 0, **cuts)
            choices.append(
                {
                    "index": index,
                    "text": "not to be used",
                    "finish_reason": one.finish_reason,
                    "token_ids": list(one.token_ids) if asked.get("return_token_ids") else None,
                    "logprobs": {"token_logprobs": list(one.logprobs)} if "logprobs" in asked else None,
                }
            )
        return 200, {"choices": choices[::-1]}  # in any order: `index` tells

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                address = urlsplit(self.path)
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(content) if content else None
                fake.seen.append((address.path, body))
                if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                    self.reply(401, {"error": "Unauthorized"})
                    return
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    self.reply(*fake.answer(address.path, dict(parse_qsl(address.query)), body))

            def reply(self, status: int, answer: Any) -> None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                """Nothing."""

        return Handler


@dataclass
class Servers:
    """Starts servers and closes them when the test is over."""

    make_policy: Callable[[], Policy]
    started: list[FakeVLLM] = field(default_factory=list)

    def __call__(self, port: int = 0, **changes: Any) -> FakeVLLM:
        fake = FakeVLLM(self.make_policy(), port)
        for name, value in changes.items():
            setattr(fake, name, value)
        self.started.append(fake)
        return fake


@pytest.fixture
def servers(tiny_policy: Callable[..., Policy]) -> Iterator[Servers]:
    """`servers()` starts one, with weights that are not the policy's."""
    starter = Servers(lambda: tiny_policy(seed=3, dtype=torch.float32))
    yield starter
    for fake in starter.started:
        fake.close()


@pytest.fixture
def tiny_math_servers() -> Iterator[Servers]:
    """`servers`, with the embedded model."""
    starter = Servers(lambda: load_policy(ModelConfig(name="tiny-math", precision="fp32")))
    yield starter
    for fake in starter.started:
        fake.close()


@pytest.fixture
def policy(tiny_policy: Callable[..., Policy]) -> Policy:
    """The policy that is trained."""
    return tiny_policy(dtype=torch.float32)


@pytest.fixture
def prompts(make_prompts: Callable[..., tuple[Prompt, ...]]) -> tuple[Prompt, ...]:
    return make_prompts([[5, 9, 3], [7], [4, 4, 21, 6]])


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries that do not wait long."""
    monkeypatch.setattr(vllm_http, "FIRST_WAIT", 0.01)


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
