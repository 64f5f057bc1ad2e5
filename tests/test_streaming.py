"""Rows read as they are needed: every pass whole, a place to come back to, a buffer and no more."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.data import PromptFormat
from grpoforge.errors import DataError
from grpoforge.sources import BadRow, Row
from grpoforge.streaming import RowStream, Shuffled, StreamedPrompts, usable_rows
from grpoforge.types import Prompt


class WordTokenizer:
    """A token per word."""

    chat_template = None

    def __init__(self) -> None:
        self.num_texts = 0

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        self.num_texts += len(texts)
        return {"input_ids": [[1] * len(text.split()) for text in texts]}


def fmt(**changes: Any) -> PromptFormat:
    values: dict[str, Any] = {
        "column": "question",
        "system_prompt": None,
        "template": "{prompt}",
        "max_length": 3,
        "limit_origin": "`data.max_prompt_length` allows",
        "on_long": "drop",
    }
    return PromptFormat(**(values | changes))


def row_stream(questions: Sequence[str], buffer: int = 3, seed: int = 0) -> RowStream:
    rows = [Row({"question": text}, f"f:{number}") for number, text in enumerate(questions, start=1)]
    return RowStream(source="f", open=lambda: iter(rows), columns=("question",), buffer=buffer, seed=seed)


def prompts_of(size: int, buffer: int = 3, seed: int = 0) -> StreamedPrompts:
    return StreamedPrompts(row_stream([str(n) for n in range(size)], buffer, seed), WordTokenizer(), fmt())


def indices(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged as a warning, also after the command line has taken the logger over."""
    monkeypatch.setattr(logging.getLogger("grpoforge"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="grpoforge"):
        yield caplog


@given(size=st.integers(1, 12), buffer=st.integers(1, 15), count=st.integers(1, 9), seed=st.integers(0, 3))
def test_every_pass_takes_every_row_once(size: int, buffer: int, count: int, seed: int) -> None:
    stream = prompts_of(size, buffer, seed)
    taken = [index for step in range(2 * size) for index in indices(stream.at_step(step, count))]
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


@given(size=st.integers(1, 12), buffer=st.integers(1, 15), count=st.integers(1, 5), steps=st.lists(st.integers(0, 9)))
def test_a_step_is_a_function_of_its_number(size: int, buffer: int, count: int, steps: list[int]) -> None:
    """Steps asked for in any order are those of a stream that is read straight through."""
    through = prompts_of(size, buffer)
    expected = [(indices(through.at_step(step, count)), indices(through.extra(step, 1, 4))) for step in range(10)]
    jumping = prompts_of(size, buffer)
    for step in steps:
        assert (indices(jumping.at_step(step, count)), indices(jumping.extra(step, 1, 4))) == expected[step]


@given(size=st.integers(1, 12), buffer=st.integers(1, 15), count=st.integers(1, 5), step=st.integers(0, 9))
def test_what_is_resumed_goes_on_as_it_would_have(size: int, buffer: int, count: int, step: int) -> None:
    whole, resumed = prompts_of(size, buffer), prompts_of(size, buffer)
    for number in range(step):
        whole.at_step(number, count)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for number in range(step, step + 5):
        assert indices(whole.at_step(number, count)) == indices(resumed.at_step(number, count))
        assert indices(whole.extra(number, 2, 3)) == indices(resumed.extra(number, 2, 3))


def test_resuming_tokenizes_nothing_again() -> None:
    stream = prompts_of(100)
    stream.at_step(0, 50)
    tokenizer = WordTokenizer()
    resumed = StreamedPrompts(row_stream([str(n) for n in range(100)]), tokenizer, fmt())
    resumed.load_state_dict(stream.state_dict())
    assert tokenizer.num_texts == 0
    assert indices(resumed.at_step(5, 10)) == indices(stream.at_step(5, 10))
    assert tokenizer.num_texts == 10


def test_the_seed_decides_the_order_and_passes_differ() -> None:
    first, second = (indices(prompts_of(50, 20, seed).at_step(0, 50)) for seed in (0, 1))
    assert first != second
    assert first != indices(prompts_of(50, 20).at_step(1, 50))
    assert first != sorted(first)


def test_the_buffer_bounds_what_is_read_ahead() -> None:
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield Row({"question": str(number)}, f"f:{number}")

    shuffled = Shuffled(RowStream(source="f", open=rows, columns=("question",), buffer=10, seed=0))
    for taken in range(1, 500):
        number, _ = next(shuffled)
        assert len(shuffled.buffer) == 10
        assert read == taken + 10
        assert number < taken + 10


def test_long_prompts_are_left_out_and_the_next_take_their_place(warnings: pytest.LogCaptureFixture) -> None:
    texts = ["a", "b c d e", "f", "g h i j k", "l"]
    stream = StreamedPrompts(row_stream(texts, buffer=1), WordTokenizer(), fmt())
    assert sorted(prompt.text for prompt in stream.at_step(0, 3)) == ["a", "f", "l"]
    assert warnings.messages == [
        "f:2: the prompt has 4 tokens, more than the 3 that `data.max_prompt_length` allows; "
        "other prompts that are too long are left out in silence"
    ]
    assert sorted(prompt.index for prompt in stream.at_step(1, 3)) == [0, 2, 4]
    assert all(prompt.text in "afl" for prompt in stream.extra(1, 1, 20))


@pytest.mark.parametrize("buffer", [1, 2, 30])
def test_nothing_but_long_prompts(buffer: int) -> None:
    stream = StreamedPrompts(row_stream(["a b c d", "e f g h"], buffer), WordTokenizer(), fmt())
    with pytest.raises(DataError) as caught:
        stream.at_step(0, 1)
    assert caught.value.message.endswith(
        "the prompt has 4 tokens, more than the 3 that `data.max_prompt_length` allows, and so has every other of f"
    )
    assert caught.value.hint.startswith("shorten the prompts")


def test_a_long_prompt_stops_where_asked() -> None:
    stream = StreamedPrompts(row_stream(["a", "b c d e"]), WordTokenizer(), fmt(on_long="stop"))
    with pytest.raises(DataError) as caught:
        stream.at_step(0, 2)
    assert "f:2: the prompt has 4 tokens" in caught.value.message
    assert "data.long_prompts=drop" in caught.value.hint


def test_an_empty_stream() -> None:
    stream = StreamedPrompts(row_stream([]), WordTokenizer(), fmt())
    with pytest.raises(DataError) as caught:
        stream.at_step(0, 1)
    assert caught.value.message == "f ends within the rows held out for evaluation: nothing is left to train on"
    assert "data.num_eval" in caught.value.hint


GIVEN = [Row({"q": "a"}, "f:1"), BadRow("f:2", "not JSON"), Row({"q": None}, "f:3"), Row({"q": "b"}, "f:4")]


def test_the_first_bad_row_stops_when_it_is_reached() -> None:
    rows = usable_rows(GIVEN, ["q"], "f", skip=False)
    assert next(rows).origin == "f:1"
    with pytest.raises(DataError) as caught:
        next(rows)
    assert caught.value.message == "f:2: not JSON"
    assert caught.value.hint == "correct the row, or leave bad rows out with `--set data.skip_bad_rows=true`"


def test_bad_rows_are_left_out_where_asked(warnings: pytest.LogCaptureFixture) -> None:
    assert [row.origin for row in usable_rows(GIVEN, ["q"], "f", skip=True)] == ["f:1", "f:4"]
    assert warnings.messages == ["left out f:2: not JSON; other unusable rows of this pass go unnamed"]


@pytest.mark.parametrize(
    ("given", "message"), [([], "f is empty"), (GIVEN[1:3], "none of the 2 rows of f can be used")]
)
def test_nothing_that_can_be_used(given: list[Row | BadRow], message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(usable_rows(given, ["q"], "f", skip=True))
    assert caught.value.message == message


MEASURE = """
import sys
from pathlib import Path
from grpoforge.layers import build
from grpoforge.parts import resolve
from grpoforge.plugins import load_plugins
from grpoforge.streaming import Shuffled

streaming = sys.argv[2] == "streaming"
data = {"dataset": sys.argv[1], "num_eval": 10, "streaming": streaming, "shuffle_buffer": 1000}
host = load_plugins()
# Not ru_maxrss, which a process inherits from the one that started it.
status = lambda: Path("/proc/self/status").read_text().split()
peak = lambda: int(status()[status().index("VmHWM:") + 1]) // 1024
before = peak()
parts = resolve(build([("mine", {"max_steps": 1, "data": data})]), host)
rows = Shuffled(parts.stream) if streaming else iter(parts.train_rows)
total = sum(1 for _ in zip(range(199_990), rows))
print(total, peak() - before)
"""


@pytest.mark.slow
def test_a_large_file_is_not_held(tmp_path: Path) -> None:
    """200,000 rows, 110 MB: a stream grows by what its buffer holds, reading them all by more than the file."""
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for number in range(200_000):
            file.write(json.dumps({"question": f"{number} " + "x" * 500, "answer": str(number)}) + "\n")
    grown = {}
    for how in ("streaming", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), how], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        total, grown[how] = map(int, done.stdout.split())
        assert total == 199_990
    print(f"\npeak memory above the start, MiB: {grown}")
    assert grown["streaming"] < 15
    assert grown["whole"] > 100
