from __future__ import annotations

import logging
import os
import signal
import threading

import pytest

from grpoforge.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_stops(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
        assert caplog.messages == [f"{number.name}: finishing this step, then saving; once more to stop at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_in_another_thread_it_changes_nothing() -> None:
    seen = []

    def run() -> None:
        with Interruption() as interruption:
            seen.append((interruption.requested, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


class TornStream(logging.Handler):
    """A handler caught in the middle of another write, as when the signal comes while stderr is written to."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")


def test_a_signal_in_the_middle_of_a_write_to_stderr_is_noted() -> None:
    logger, handler = logging.getLogger("grpoforge.interrupt"), TornStream()
    logger.addHandler(handler)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested
    finally:
        logger.removeHandler(handler)
