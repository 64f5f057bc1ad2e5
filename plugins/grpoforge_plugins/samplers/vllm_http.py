"""JSON over HTTP to one vLLM server: time-outs, retries with back-off, and errors that name the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from grpoforge.errors import ConfigError, RunFailed, first_line

CONNECT_SECONDS = 10.0
"""To wait for a connection; what comes after it is waited for as long as the option says."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first retry, doubled before each further one, up to the longest."""
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

SEE = "docs/guides/vllm.md says how it is started"
GO_ON = "start it again (docs/guides/vllm.md), then continue with `grpoforge train --resume`"


class _Failed(Exception):
    """One attempt failed in a way that may pass."""


class Refused(RunFailed):
    """The server understood and said no: another attempt would hear the same."""

    def __init__(self, message: str, hint: str = "", status: int = 400) -> None:
        super().__init__(message, hint)
        self.status = status


class Server:
    """One server. ``get`` and ``post`` may be called from several threads; `cancel` ends what they wait for."""

    def __init__(self, base_url: str, *, timeout: float, retries: int) -> None:
        parts = _parts(base_url)
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries = timeout, retries
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        self._prefix = urlsplit(self.url).path
        self._open: set[socket.socket] = set()
        self._cancelled = threading.Event()

    def get(self, path: str) -> Any:
        """The JSON at ``path``. Raises as `post`."""
        return self._call("GET", path, None)

    def get_field(self, path: str, *keys: str | int) -> Any:
        """What stands under ``keys`` in the JSON at ``path``. Raises as `post`; RunFailed where nothing does."""
        found = self.get(path)
        try:
            for key in keys:
                found = found[key]
        except (KeyError, IndexError, TypeError) as failure:
            name = ".".join(map(str, keys))
            raise RunFailed(
                f"the vLLM server {self.url} answered {path.partition('?')[0]} without `{name}`", f"is it vLLM? {SEE}"
            ) from failure
        return found

    def post(self, path: str, body: Any = None) -> Any:
        """The JSON that the server answers.

        Raises:
            RunFailed: no answer, or none that is JSON, after every retry.
            Refused: it answered with a status that a retry would not change.
        """
        return self._call("POST", path, body)

    def cancel(self) -> None:
        """Let every call under way fail at once, and no further one begin until `allow`."""
        self._cancelled.set()
        for link in tuple(self._open):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def allow(self) -> None:
        """Take calls again after `cancel`."""
        self._cancelled.clear()

    def _call(self, method: str, path: str, body: Any) -> Any:
        start, failures = time.monotonic(), []
        for number in range(self.retries + 1):
            if number and self._cancelled.wait(min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT)):
                break
            try:
                return self._attempt(method, path, body)
            except _Failed as failure:
                failures.append(str(failure))
        # The first failure tells why, where the server died of it; the last how it is now.
        told = dict.fromkeys((failures[0], failures[-1]))
        seconds = time.monotonic() - start
        raise RunFailed(
            f"the vLLM server {self.url} failed: {', then '.join(told)} "
            f"({method} {path.partition('?')[0]}, attempts: {len(failures)}, {seconds:.0f} s)",
            GO_ON,
        )

    def _attempt(self, method: str, path: str, body: Any) -> Any:
        try:
            status, content = self._exchange(method, path, body)
        except TimeoutError as failure:
            raise _Failed(f"no answer within {self.timeout:g} s (sampler option `timeout`)") from failure
        except (OSError, http.client.HTTPException) as failure:
            raise _Failed(_reason(failure)) from failure
        if status in TRANSIENT:
            raise _Failed(f"status {status}, {_said(content)}")
        if status >= 400:
            raise Refused(
                f"the vLLM server {self.url} refused {path.partition('?')[0]}: status {status}, {_said(content)}",
                SEE,
                status,
            )
        try:
            return json.loads(content) if content else None
        except ValueError as failure:
            raise _Failed(f"an answer that is not JSON: {_said(content)}") from failure

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """One request and its whole answer, within the time-out in all."""
        deadline = time.monotonic() + self.timeout
        with self._connected() as (connection, link):
            link.settimeout(self.timeout)
            connection.request(method, self._prefix + path, json.dumps(body) if body is not None else None, _headers())
            response = connection.getresponse()
            chunks = []
            while chunk := response.read1(1 << 20):
                chunks.append(chunk)
                link.settimeout(max(deadline - time.monotonic(), 1e-3))
            return response.status, b"".join(chunks)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[http.client.HTTPConnection, socket.socket]]:
        """A connection of its own for one request, which `cancel` can break."""
        limit = min(CONNECT_SECONDS, self.timeout)
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=limit)
        try:
            connection.connect()
        except TimeoutError as failure:
            raise ConnectionError(f"no connection within {limit:g} s") from failure
        link = connection.sock
        self._open.add(link)
        try:
            if self._cancelled.is_set():
                raise ConnectionAbortedError("cancelled")
            yield connection, link
        finally:
            self._open.discard(link)
            connection.close()


def _parts(base_url: str) -> Any:
    """The URL in parts. Raises ConfigError for what is no address of a server."""
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(
            f"sampler option `base_urls` has `{base_url}`, which is no address of a server",
            "write for instance http://127.0.0.1:8000",
        )
    return parts


def _headers() -> dict[str, str]:
    """The key, if there is one, is in the environment, where vLLM itself looks for it; never in a configuration."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _reason(failure: BaseException) -> str:
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return first_line(failure)


def _said(content: bytes) -> str:
    """What an answer says, in one line: vLLM's own message where there is one."""
    text = content.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
        text = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    line = " ".join(text.split())
    return f"`{line[:300]}`" if line else "an empty answer"
