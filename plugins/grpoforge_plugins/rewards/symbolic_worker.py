"""The process that compares formulas: a question a line on stdin, a verdict a line on stdout, JSON both.

It is run by its path, as a script, by `symbolic`, and imports the standard library and math_verify, never this
package, which would load torch. It may be killed at any time; nothing is lost. It dies by itself

* when its parent is gone: its input ends, or its parent's process id is another;
* by SIGALRM a moment after the time limit of a question, also inside a long C call: a parent that is gone cannot
  kill it.

Arguments: the parent's process id, and the address space it may use in MB.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator

GRACE_SECONDS = 1.0
"""The parent kills first, and counts; the alarm is for when there is no parent."""


def main() -> None:
    """Answer questions until the parent is gone."""
    parent, max_megabytes = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    # What a library prints must not be read as a verdict.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # A parent's blocked or ignored alarm is inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401 - loaded before the first question, whose time is limited

    _limit_memory(max_megabytes)
    print(json.dumps("ready"), file=answers)
    for line in _lines(parent):
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["seconds"] + GRACE_SECONDS)
        found = verdict(question["reference"], question["answer"])
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(found), file=answers)


def verdict(reference: str, answer: str) -> str:
    """``equal``, ``different``, or ``unreadable`` where the reference cannot be read.

    Strict comparison: names of variables matter. Decimals agree when they do in six places.
    """
    from math_verify import verify

    gold = _parsed(reference)
    if not gold:
        return "unreadable"
    return "equal" if verify(gold, _parsed(answer), timeout_seconds=None) else "different"


def _parsed(formula: str) -> list[object]:
    from math_verify import LatexExtractionConfig, parse

    found: list[object] = parse(
        f"${formula}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        # Its own limits use signals, and do not hold inside C code.
        parsing_timeout=None,
    )
    return found


def _limit_memory(max_megabytes: int) -> None:
    for limit, amount in (
        (resource.RLIMIT_AS, max_megabytes << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (amount, amount))


def _lines(parent: int) -> Iterator[bytes]:
    """Lines of stdin until it ends or the parent is gone: a fork of it may hold the other end of the pipe."""
    pending = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        part = os.read(0, 1 << 16)
        if not part:
            return
        *lines, pending = (pending + part).split(b"\n")
        yield from lines


if __name__ == "__main__":
    main()
