"""Whether two formulas are equal, by the library math-verify, in a process that is killed when it takes too long.

math-verify decides what no scanner can (``\\frac{1}{\\sqrt{2}}`` is ``\\frac{\\sqrt{2}}{2}``), and on some formulas
never returns (Math-Verify#63, #65), inside C code where no signal handler runs. So it runs in a process of its own,
one per process of the run, started at the first question. Over the time limit or `MAX_MEGABYTES` it is killed, the
verdict is ``stopped``, and the next question gets a new one.

`compares` says which answers may be asked about at all: the library is generous where a model would use it.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Literal, get_args

from grpoforge.errors import ConfigError, RewardError

__all__ = ["Questions", "Verdict", "Worker", "compares", "require_library", "worker"]

Verdict = Literal["equal", "different", "unreadable", "stopped"]
"""``unreadable``: the reference is no formula. ``stopped``: over the limit; neither right nor wrong."""

MAX_MEGABYTES = 1024
START_SECONDS = 60.0
POLL_SECONDS = 0.02

_SCRIPT = Path(__file__).with_name("symbolic_worker.py")

_HEDGE = re.compile(r"(?<![A-Za-z\\])(?:or|and|not|but|maybe|either)(?![A-Za-z])")
_MULTIPLIER = re.compile(r"(?<![A-Za-z\\])(?:hundred|thousand|million|billion|trillion|dozen|half)(?![A-Za-z])")
_RELATION = re.compile(r"[<>=]|\\(?:approx|sim|simeq|cong|equiv|lt|gt|neq?|[lg]eq?(?:slant)?)(?![A-Za-z])")
_NEIGHBORS = re.compile(r"[0-9.](?:[ ~]|\\[,;:! ]|\\q?quad){1,9}[0-9.]")
_ASSIGNMENT = re.compile(r"[A-Za-z](?:\([A-Za-z]\))? ?=")


def require_library(verifier: str) -> str:
    """``verifier``, or a ConfigError where it needs math-verify and that is not installed."""
    if verifier != "exact" and importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            f"option `verifier` is `{verifier}`, which needs the package math-verify, and it is not installed",
            "run `pip install 'grpoforge[math]'`, or use `verifier=exact`",
        )
    return verifier


def compares(reference: str, answer: str) -> bool:
    """Whether ``answer`` may be compared with ``reference``: what it does not hold cannot be a hedge.

    math-verify reads ``42=43`` as 43, ``42 \\approx 41`` and ``42\\text{ million}`` as 42, and ``42\\;43`` as 85. So
    words that join or multiply, relations, and numbers side by side are admitted only where the reference has them
    too; ``x = 5`` may be written for ``5``.
    """
    assignment = _ASSIGNMENT.match(answer)
    stated = answer[assignment.end() :] if assignment else answer
    patterns = (_HEDGE, _MULTIPLIER, _RELATION, _NEIGHBORS)
    return all(pattern.search(reference) or not pattern.search(stated) for pattern in patterns)


class Worker:
    """A process that compares formulas, restarted when it was killed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def compare(self, reference: str, answer: str, seconds: float) -> Verdict:
        """What math-verify says within ``seconds``, not counting the start of the process.

        Raises:
            RewardError: the process does not start.
        """
        question = json.dumps({"reference": reference, "answer": answer, "seconds": seconds}) + "\n"
        with self._lock:
            process = self._running()
            verdict = _exchange(process, question.encode("ascii"), seconds)
            if verdict == "stopped" or _resident_megabytes(process.pid) > MAX_MEGABYTES // 2:
                self._kill()
        return verdict

    def close(self) -> None:
        """Kill the process, if there is one, and wait for it: no zombie stays."""
        with self._lock:
            self._kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.pid is None or self._process is None:
            self._kill()
            self._process = subprocess.Popen(
                # -P: the folder of the script holds a `math.py`, which must not be the standard library's.
                [sys.executable, "-P", str(_SCRIPT), str(os.getpid()), str(2 * MAX_MEGABYTES)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the run
            )
            for file in _pipes(self._process):
                os.set_blocking(file.fileno(), False)
            if _receive(self._process, time.monotonic() + START_SECONDS) != "ready":
                self._kill()
                raise RewardError(
                    f"the process that compares formulas did not start within {START_SECONDS:g} s",
                    "see whether `python -c 'import math_verify'` works, or use `verifier=exact`",
                )
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for file in _pipes(process):
                file.close()


class Questions:
    """The questions of one call of a reward: each is asked once, and all of them within a total time."""

    def __init__(self, seconds: float, total_seconds: float) -> None:
        self.stopped: list[str] = []
        """The answers whose check was stopped, one for each time it was asked for."""
        self._seconds = seconds
        self._deadline = time.monotonic() + total_seconds
        self._verdicts: dict[tuple[str, str], Verdict] = {}

    def ask(self, reference: str, answer: str) -> Verdict:
        """The verdict of this process's `worker`."""
        pair = reference, answer
        if pair not in self._verdicts:
            seconds = min(self._seconds, self._deadline - time.monotonic())
            self._verdicts[pair] = worker().compare(*pair, seconds) if seconds > 0 else "stopped"
        if self._verdicts[pair] == "stopped":
            self.stopped.append(answer)
        return self._verdicts[pair]


def worker() -> Worker:
    """The worker of this process; a fork gets one of its own."""
    return _workers[0]


_workers = [Worker()]


def _replace_worker() -> None:
    """After a fork: the process belongs to the parent, and the lock may be held by a thread that is not here."""
    _workers[0] = Worker()


os.register_at_fork(after_in_child=_replace_worker)
atexit.register(lambda: worker().close())


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin and process.stdout, "both were asked for"
    return process.stdin, process.stdout


def _exchange(process: subprocess.Popen[bytes], question: bytes, seconds: float) -> Verdict:
    deadline = time.monotonic() + seconds
    answer = _receive(process, deadline) if _send(process, question, deadline) else None
    return next((verdict for verdict in get_args(Verdict) if verdict == answer), "stopped")


def _send(process: subprocess.Popen[bytes], question: bytes, deadline: float) -> bool:
    """True when the whole question was taken in time."""
    file, _ = _pipes(process)
    while question and _ready(process, file, select.POLLOUT, deadline):
        try:
            question = question[os.write(file.fileno(), question) :]
        except BrokenPipeError:
            return False
    return not question


def _receive(process: subprocess.Popen[bytes], deadline: float) -> object:
    """The document that the process wrote in time, or None."""
    _, file = _pipes(process)
    received = b""
    while not received.endswith(b"\n"):
        part = os.read(file.fileno(), 4096) if _ready(process, file, select.POLLIN, deadline) else b""
        if not part:
            return None
        received += part
    return json.loads(received)


def _ready(process: subprocess.Popen[bytes], file: IO[bytes], event: int, deadline: float) -> bool:
    """True when ``file`` is ready before the deadline, and before the process grows too large."""
    poll = select.poll()
    poll.register(file, event)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(1000 * min(left, POLL_SECONDS)):
            return True
        if _resident_megabytes(process.pid) > MAX_MEGABYTES:
            return False
    return False


def _resident_megabytes(pid: int) -> float:
    """Memory that a process holds; 0 where it cannot be known."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
