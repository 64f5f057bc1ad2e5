"""vLLM as one or several servers: requests spread over them, weights pushed to all of them."""

from __future__ import annotations

import importlib.util
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from grpoforge.errors import ConfigError, RunFailed
from grpoforge.types import PolicyView
from grpoforge_plugins.samplers.vllm_http import GO_ON, Refused, Server
from grpoforge_plugins.samplers.vllm_protocol import Drawn, Malformed, Request, read_choices
from grpoforge_plugins.samplers.vllm_weights import save_weights

Sync = Literal["auto", "transfer", "reload"]
T = TypeVar("T")

OLDEST = (0, 32)
"""The first version of vLLM whose interface is the one spoken here."""
START = "start it with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`"


class Servers:
    """All servers hold the same weights; each request goes to the server with the fewest under way.

    Weights get there by ``sync``: ``transfer`` through vLLM's weight-transfer interface, from GPU to GPU; ``reload``
    through a folder that the servers read; ``auto`` by transfer where the servers and this process can.
    """

    def __init__(self, servers: Sequence[Server], *, sync: Sync, folder: str, concurrency: int) -> None:
        self.servers = tuple(servers)
        self.sync = sync
        self.folder = folder
        self.concurrency = concurrency
        self._names: dict[str, str] = {}
        self._lengths: dict[str, int] = {}
        self._backends: dict[str, str | None] = {}
        self._senders: dict[str, Callable[[PolicyView], None]] = {}
        self._is_connected = False
        self._vocabulary = 0
        self._version = ""
        self._busy = dict.fromkeys((one.url for one in self.servers), 0)
        self._lock = threading.Lock()

    def load(self, policy: PolicyView, version: str, is_main: bool) -> None:
        """Bring every server to the policy's weights and name them ``version``; only the main process sends.

        Raises:
            ConfigError: at the first call, a server that is not there or does not fit the policy.
            RunFailed: a server failed, or the folder cannot be written.
        """
        if not self._is_connected:
            self._connect(policy)
            self._is_connected = True
        self._version = version
        if not is_main:
            return
        if self._transfers(policy):
            self._push(self._by_transfer(policy))
            return
        with _room(self.folder or tempfile.gettempdir()) as folder:
            _write(policy, folder)
            self._push(lambda server: _reload(server, folder))

    def generate(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        """The completions of every request, in order.

        Raises:
            RunFailed: a server failed, answered nonsense, or holds other weights than were loaded.
        """
        self._check_lengths(requests)
        jobs = [partial(self._complete, request) for request in requests]
        answers = self._all(jobs, self.concurrency * len(self.servers))
        # Afterwards: weights that are right now have been right all the time, because no version is used twice.
        self._each(self._check_version)
        return answers

    def _complete(self, request: Request) -> list[Drawn]:
        server = self._take()
        try:
            body = {"model": self._names[server.url], "prompt": list(request.prompt_ids), "return_token_ids": True}
            return read_choices(server.post("/v1/completions", body | request.sampling()), request, self._vocabulary)
        except Malformed as failure:
            raise RunFailed(
                f"the vLLM server {server.url} answered {failure}", f"is it vLLM {_dotted(OLDEST)} or newer? {START}"
            ) from failure
        finally:
            with self._lock:
                self._busy[server.url] -= 1

    def _take(self) -> Server:
        """The server with the fewest requests under way."""
        with self._lock:
            server = min(self.servers, key=lambda one: self._busy[one.url])
            self._busy[server.url] += 1
            return server

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        for url, limit in self._lengths.items():
            if longest > limit:
                raise ConfigError(
                    f"prompt and completion may take {longest} tokens, and the vLLM server {url} takes {limit}",
                    "lower `sampler.max_completion_length`, or start it with a larger `--max-model-len`",
                )

    def _check_version(self, server: Server) -> None:
        found = server.get_field("/weight_info", "weight_version")
        if found != self._version:
            raise RunFailed(
                f"the vLLM server {server.url} holds the weights `{found}`, not `{self._version}` that this run loaded",
                "it was started anew, or another run uses it: give each run servers of its own, then continue with "
                "`grpoforge train --resume`",
            )

    def _connect(self, policy: PolicyView) -> None:
        """Ask every server who it is, once, and refuse what cannot work before anything is drawn."""
        self._vocabulary = policy.model.get_input_embeddings().weight.shape[0]
        try:
            versions = self._each(self._introduce)
        except Refused as failure:
            if failure.status != 404:
                raise ConfigError(failure.message, failure.hint) from failure
            raise ConfigError(f"{failure.message}: it is not in development mode", START) from failure
        except RunFailed as failure:
            raise ConfigError(failure.message, f"{START}, or correct `sampler.base_urls`") from failure
        for server, version in zip(self.servers, versions, strict=True):
            if version != versions[0]:
                raise ConfigError(
                    f"the vLLM servers are of several versions: {self.servers[0].url} is {versions[0]}, {server.url} "
                    f"is {version}",
                    "use one version: log-probs differ between them",
                )

    def _introduce(self, server: Server) -> str:
        version = str(server.get_field("/version", "version"))
        if _number(version) < OLDEST:
            raise ConfigError(
                f"the vLLM server {server.url} is version {version}; this sampler needs {_dotted(OLDEST)} or newer",
                f"pip install 'vllm>={_dotted(OLDEST)}' where it runs",
            )
        info = server.get_field("/server_info?config_format=json", "vllm_config")
        mode = info.get("model_config", {}).get("logprobs_mode")
        if mode != "processed_logprobs":
            raise ConfigError(
                f"the vLLM server {server.url} reports `{mode}`, which are not those that tokens are drawn with",
                START,
            )
        self._names[server.url] = server.get_field("/v1/models", "data", 0, "id")
        self._lengths[server.url] = server.get_field("/v1/models", "data", 0, "max_model_len")
        self._backends[server.url] = (info.get("weight_transfer_config") or {}).get("backend")
        server.post("/resume")  # a run that died while its weights were loaded has left it paused
        self._check_vocabulary(server)
        return version

    def _check_vocabulary(self, server: Server) -> None:
        """The last token of the policy's vocabulary is known to the server, the one behind it is not."""
        for token, expected in ((self._vocabulary - 1, True), (self._vocabulary, False)):
            try:
                server.post("/v1/completions", {"model": self._names[server.url], "prompt": [token], "max_tokens": 1})
                is_known = True
            except Refused as refusal:
                if "vocabulary" not in refusal.message:
                    raise
                is_known = False
            if is_known is not expected:
                raise ConfigError(
                    f"the vLLM server {server.url} {'knows' if is_known else 'does not know'} token {token}, and the "
                    f"policy's vocabulary has {self._vocabulary}",
                    "start it with the model that is trained (`model.name`)",
                )

    def _push(self, send: Callable[[Server], None]) -> None:
        """Nothing is drawn while weights change, and nothing cached from the old ones is used afterwards."""

        def update(server: Server) -> None:
            server.post("/pause?mode=abort")
            send(server)
            server.post("/reset_prefix_cache")
            server.post("/update_weight_version", {"new_version": self._version})
            server.post("/resume")

        self._each(update)

    def _by_transfer(self, policy: PolicyView) -> Callable[[Server], None]:
        from grpoforge_plugins.samplers.vllm_transfer import nccl_sender

        for server in self.servers:
            if server.url not in self._senders:
                self._senders[server.url] = nccl_sender(server, policy)
        return lambda server: self._senders[server.url](policy)

    def _transfers(self, policy: PolicyView) -> bool:
        """Whether weights go from GPU to GPU.

        Raises:
            ConfigError: they have to, and cannot.
        """
        if self.sync == "reload":
            return False
        lacking = [f"{url} was started without it" for url, backend in self._backends.items() if backend != "nccl"]
        if importlib.util.find_spec("vllm") is None:
            lacking.append("vLLM is not installed in this environment")
        if policy.device.type != "cuda":
            lacking.append(f"the policy is on {policy.device}, not on a GPU")
        if lacking and self.sync == "transfer":
            raise ConfigError(
                f"sampler option `sync` is `transfer`, and NCCL weight transfer cannot be used: {lacking[0]}",
                'start the servers with `--weight-transfer-config \'{"backend": "nccl"}\'`, or choose `sync: reload`',
            )
        return not lacking

    def _each(self, job: Callable[[Server], T]) -> list[T]:
        """``job`` for every server at the same time."""
        return self._all([partial(job, server) for server in self.servers], len(self.servers))

    def _all(self, jobs: Sequence[Callable[[], T]], num_threads: int) -> list[T]:
        """The results of ``jobs`` in order. The first failure, or an interrupt, ends the others at once."""
        for server in self.servers:
            server.allow()
        pool = ThreadPoolExecutor(min(num_threads, len(jobs)), thread_name_prefix="vllm")
        futures: list[Future[T]] = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failures = [future.exception() for future in futures if future in done]
            if failed := next((one for one in failures if one is not None), None):
                raise failed
            return [future.result() for future in futures]
        finally:
            if not all(future.done() for future in futures):
                for server in self.servers:
                    server.cancel()
            pool.shutdown(wait=True, cancel_futures=True)


def _room(place: str) -> tempfile.TemporaryDirectory[str]:
    """A new folder in ``place``, gone when the servers have read it."""
    try:
        return tempfile.TemporaryDirectory(prefix="grpoforge-weights-", dir=place)
    except OSError as failure:
        raise _unwritten(place, failure) from failure


def _write(policy: PolicyView, folder: str) -> None:
    try:
        save_weights(policy, Path(folder))
    except OSError as failure:
        raise _unwritten(folder, failure) from failure


def _unwritten(place: str, failure: OSError) -> RunFailed:
    return RunFailed(
        f"the weights for the vLLM servers cannot be written to {place}: {failure.strerror or failure}",
        "name a folder with room, which this process and the servers see, with `sampler.sync_folder`",
    )


def _reload(server: Server, folder: str) -> None:
    try:
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
    except RunFailed as failure:
        hint = f"can the server read {folder}? `sampler.sync_folder` names a folder that both see; {GO_ON}"
        raise RunFailed(failure.message, hint) from failure


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
