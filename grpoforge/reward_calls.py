"""Running foreign code: each reward in a thread of its own, everything awaitable on one event loop.

A reward may hang, raise anything or never come back. The caller waits as long as it likes and then cancels.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any

import torch

from grpoforge.declarations import unbound
from grpoforge.errors import RewardError


class RewardCall:
    """One call of a reward, in a daemon thread: a hung reward cannot keep the process alive."""

    def __init__(self, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.name = name
        self.failure: BaseException | None = None
        self.values: Any = None
        self.function = function
        # A reward that edits its arguments must change neither what its neighbors see nor the dataset.
        self._arguments = {name: _copy(value) for name, value in arguments.items()}
        self._device = _cuda_device()
        self._started = self._finished = 0.0
        self._cancelled = False
        self._awaited: Future[Any] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"reward {name}")

    def start(self) -> None:
        self._started = time.perf_counter()
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Wall time so far, or until it finished."""
        return (self._finished or time.perf_counter()) - self._started

    def wait(self, seconds: float) -> bool:
        """True when the reward finished within ``seconds``."""
        self._thread.join(max(seconds, 0.0))
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Stop what is awaited. A plain function cannot be stopped: it stays behind in its thread."""
        self._cancelled = True
        if self._awaited is not None:
            self._awaited.cancel()

    def _run(self) -> None:
        try:
            _use_cuda_device(self._device)
            result = self.function(**self._arguments)
            self.values = self._await(result) if inspect.isawaitable(result) else result
        except BaseException as failure:  # the boundary: a reward is foreign code
            self.failure = failure
        self._finished = time.perf_counter()

    def _await(self, result: Awaitable[Any]) -> Any:
        self._awaited = asyncio.run_coroutine_threadsafe(_awaited(result, self._device), _event_loop())
        if self._cancelled:  # before there was anything to cancel
            self._awaited.cancel()
        return self._awaited.result()


def _copy(value: Any) -> Any:
    """Lists, sets and mappings copied through and through; everything else is shared."""
    return copy.deepcopy(value) if isinstance(value, list | dict | set) else value


def _cuda_device() -> int | None:
    """The current CUDA device of this thread; None while the process has not used CUDA, which asking would start."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if in_use else None


def _use_cuda_device(device: int | None) -> None:
    """The current device belongs to a thread, and a new thread starts at device 0."""
    if device is not None:
        torch.cuda.set_device(device)


async def _awaited(result: Awaitable[Any], device: int | None) -> Any:
    _use_cuda_device(device)
    return await result


_starting = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of every reward of the process: a client or a semaphore belongs to the loop that first used it."""
    with _starting:
        return _started_loop()


@cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_forever, args=(loop,), daemon=True, name="async rewards").start()
    return loop


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        # A task that raises SystemExit or KeyboardInterrupt ends `run_forever`; the other rewards go on.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def raised(call: RewardCall, failure: BaseException) -> RewardError:
    """The error for what a reward raised: its name, the first line of it, and the line of its own file."""
    frames = traceback.extract_tb(failure.__traceback__)
    function: Any = inspect.unwrap(unbound(call.function))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    text = (str(failure).strip().splitlines() or [""])[0]
    what = f"{type(failure).__name__}: {text}" if text else type(failure).__name__
    hint = "fix the reward, or pass `--set scoring.on_error=skip` to leave its rows unscored"
    if any("signal only works in main thread" in str(cause) for cause in _causes(failure)):
        hint = (
            "switch off the reward's own time limit (math_verify: `parsing_timeout=None`, `timeout_seconds=None`); "
            "`scoring.time_limit` bounds it"
        )
    if "string indices must be integers" in text:
        hint = "completions are strings here, not chat messages: read `completion`, not `completion[0]['content']`"
    return RewardError(f"reward `{call.name}` raised {what} ({frame.filename}:{frame.lineno})", hint)


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """``failure``, and what it was raised from."""
    cause: BaseException | None = failure
    while cause is not None:
        yield cause
        cause = cause.__cause__
