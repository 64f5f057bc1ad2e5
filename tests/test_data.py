"""Rows to prompts: renaming, what is usable, rendering, lengths, and the order of an endless row of passes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.data import (
    Example,
    PromptFormat,
    PromptSet,
    draw_examples,
    hold_out,
    rename_columns,
    render,
    same_question,
    to_prompts,
    usable,
)
from grpoforge.errors import DataError
from grpoforge.seeds import mix
from grpoforge.sources import BadRow, Row
from grpoforge.types import Prompt


class WordTokenizer:
    """A token per word; ``chat_template`` as a real one has it."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.added_special_tokens: bool | None = None

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        self.added_special_tokens = add_special_tokens
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        if self.chat_template == "raises":
            raise ValueError("no system role\nsecond line")
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{message['role']}> {message['content']} " for message in messages) + "<assistant>"


def fmt(**changes: Any) -> PromptFormat:
    values: dict[str, Any] = {
        "column": "question",
        "system_prompt": None,
        "template": "Q: {prompt} A:",
        "max_length": None,
        "limit_origin": "`data.max_prompt_length` allows",
        "on_long": "drop",
    }
    return PromptFormat(**(values | changes))


def rows(*questions: Any) -> list[Row]:
    return [Row({"question": question}, f"f:{number}") for number, question in enumerate(questions, start=1)]


def refusal(function: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    return caught.value.message, caught.value.hint


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged as a warning, also after the command line has taken the logger over."""
    monkeypatch.setattr(logging.getLogger("grpoforge"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="grpoforge"):
        yield caplog


def test_renaming_keeps_the_order_and_the_bad_rows() -> None:
    bad = BadRow("f:2", "not JSON")
    assert rename_columns([Row({"q": 1, "a": 2}, "f:1"), bad], {"q": "question"}, "f") == [
        Row({"question": 1, "a": 2}, "f:1"),
        bad,
    ]


def test_two_columns_can_swap_names_and_renamed_rows_stay() -> None:
    assert rename_columns([Row({"a": 1, "b": 2}, "f:1")], {"a": "b", "b": "a"}, "f") == [Row({"b": 1, "a": 2}, "f:1")]
    assert rename_columns(rows("x"), {"q": "question"}, "f") == rows("x")
    assert rename_columns([], {"q": "question"}, "f") == []


def test_two_columns_cannot_take_one_name() -> None:
    message, _ = refusal(rename_columns, [Row({"a": 1, "b": 2}, "f:1")], {"a": "q", "b": "q"}, "f")
    assert message == "`data.rename.a` is `q`, and column `b` of f has that name too"


def test_bad_rows_are_left_out_with_a_count(warnings: pytest.LogCaptureFixture) -> None:
    given: list[Row | BadRow] = [*rows("one", None, "three", 4), BadRow("f:5", "not JSON")]
    assert [row.origin for row in usable(given, ["question"], "f", skip=True)] == ["f:1", "f:3"]
    assert warnings.messages == [
        "left out 3 of 5 rows of f that cannot be used; the first, f:2: column `question` is missing"
    ]


def test_good_rows_are_silent(warnings: pytest.LogCaptureFixture) -> None:
    assert usable(rows("one", "two"), ["question"], "f", skip=False) == rows("one", "two")
    assert warnings.messages == []


def test_the_first_bad_row_is_named() -> None:
    assert refusal(usable, rows("one", " "), ["question"], "f", skip=False) == (
        "f:2: column `question` is ' ', not the text of a prompt",
        "correct the row, or leave bad rows out with `--set data.skip_bad_rows=true`",
    )


def test_only_the_prompt_must_be_text() -> None:
    good = [Row({"question": "x", "answer": 0}, "f:1")]
    assert usable(good, ["question", "answer"], "f", skip=False) == good


def test_holding_out_is_a_partition_that_the_seed_decides() -> None:
    given = rows(*map(str, range(20)))
    train, held = hold_out(given, 5, seed=3)
    assert (len(train), len(held)) == (15, 5)
    assert sorted(int(row.columns["question"]) for row in [*train, *held]) == list(range(20))
    assert (train, held) == hold_out(given, 5, seed=3)
    assert held != hold_out(given, 5, seed=4)[1]


def test_at_most_half_is_held_out() -> None:
    assert [len(part) for part in hold_out(rows(*"abcde"), 512, seed=0)] == [3, 2]
    assert [len(part) for part in hold_out(rows("a"), 512, seed=0)] == [1, 0]


def test_the_plain_template() -> None:
    assert render(WordTokenizer(), "1+1?", fmt()) == "Q: 1+1? A:"
    assert render(WordTokenizer(), "{prompt} {x}", fmt()) == "Q: {prompt} {x} A:"
    assert render(WordTokenizer(), "1+1?", fmt(system_prompt="Be brief.")) == "Be brief.\nQ: 1+1? A:"


def test_the_chat_template() -> None:
    tokenizer = WordTokenizer("chat")
    assert render(tokenizer, "1+1?", fmt()) == "<user> 1+1? <assistant>"
    assert render(tokenizer, "1+1?", fmt(system_prompt="S")) == "<system> S <user> 1+1? <assistant>"


@pytest.mark.parametrize(("chat_template", "special"), [(None, True), ("chat", False)])
def test_a_chat_template_writes_its_own_special_tokens(chat_template: str | None, special: bool) -> None:
    tokenizer = WordTokenizer(chat_template)
    to_prompts(rows("a"), tokenizer, fmt())
    assert tokenizer.added_special_tokens is special


def test_a_chat_template_that_raises() -> None:
    assert refusal(to_prompts, rows("a"), WordTokenizer("raises"), fmt()) == (
        "f:1: the tokenizer's chat template failed: no system role",
        "correct the template in the model folder, or leave out `data.system_prompt` if it takes none",
    )


def test_prompts() -> None:
    assert to_prompts(rows("one two"), WordTokenizer(), fmt()) == (
        Prompt(text="Q: one two A:", token_ids=(2, 3, 3, 2), columns={"question": "one two"}, index=0, origin="f:1"),
    )


def test_a_prompt_without_tokens() -> None:
    assert refusal(to_prompts, rows(" "), WordTokenizer(), fmt(template="{prompt}")) == (
        "f:1: the prompt has no tokens",
        "check `data.template` and the tokenizer",
    )


def test_long_prompts_are_left_out_naming_the_first_and_the_count(warnings: pytest.LogCaptureFixture) -> None:
    prompts = to_prompts(rows("a", "b c", "d", "e f g"), WordTokenizer(), fmt(max_length=3))
    assert [(prompt.index, len(prompt.token_ids)) for prompt in prompts] == [(0, 3), (2, 3)]
    assert warnings.messages == [
        "f:2: the prompt has 4 tokens, more than the 3 that `data.max_prompt_length` allows; left out 2 of 4 prompts"
    ]


HINT = "shorten the prompts, lower `sampler.max_completion_length`, or raise `data.max_prompt_length` if it is set"


def test_long_prompts_stop_the_run_where_asked() -> None:
    assert refusal(to_prompts, rows("a", "b c"), WordTokenizer(), fmt(max_length=3, on_long="stop")) == (
        "f:2: the prompt has 4 tokens, more than the 3 that `data.max_prompt_length` allows",
        HINT + "; `--set data.long_prompts=drop` leaves long prompts out",
    )


def test_nothing_but_long_prompts() -> None:
    assert refusal(to_prompts, rows("a", "b c"), WordTokenizer(), fmt(max_length=2)) == (
        "f:1: the prompt has 3 tokens, more than the 2 that `data.max_prompt_length` allows "
        "(2 of 2 prompts are too long)",
        HINT,
    )


def prompt_set(size: int, seed: int = 0) -> PromptSet:
    return PromptSet(tuple(Prompt(text=str(n), token_ids=(1,), columns={}, index=n) for n in range(size)), seed)


@given(size=st.integers(1, 12), count=st.integers(1, 9), seed=st.integers(0, 3))
def test_every_pass_takes_every_prompt_once(size: int, count: int, seed: int) -> None:
    """Steps are consecutive parts of shuffled passes, also where a step is larger than the dataset."""
    prompts = prompt_set(size, seed)
    taken = [prompt.index for step in range(2 * size) for prompt in prompts.at_step(step, count)]
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


def test_a_step_larger_than_the_dataset_takes_prompts_again() -> None:
    counts = Counter(prompt.index for prompt in prompt_set(3).at_step(0, 8))
    assert sorted(counts.values()) == [2, 3, 3]
    assert [prompt.index for prompt in prompt_set(1).at_step(5, 3)] == [0, 0, 0]


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    once = [prompt.index for prompt in prompt_set(50).at_step(7, 10)]
    prompt_set(50, seed=1).at_step(3, 10)
    assert once == [prompt.index for prompt in prompt_set(50).at_step(7, 10)]
    assert once != [prompt.index for prompt in prompt_set(50, seed=1).at_step(7, 10)]
    assert once != [prompt.index for prompt in prompt_set(50).at_step(12, 10)]


def test_seeds_are_mixed_into_unrelated_ones() -> None:
    seeds = [mix(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)
    assert mix(0) == mix(0)


def test_an_instruction_under_the_question_or_around_it() -> None:
    assert render(WordTokenizer(), "1+1?", fmt(instruction="Think.")) == "Q: 1+1?\nThink. A:"
    around = fmt(instruction="Solve: {prompt} Think.")
    assert render(WordTokenizer(), "{prompt}", around) == "Q: Solve: {prompt} Think. A:"
    assert render(WordTokenizer("chat"), "1+1?", fmt(instruction="Think.")) == "<user> 1+1?\nThink. <assistant>"


EXAMPLES = (Example("one?", "1"), Example("two?", "2"), Example("three?", "3"))


def test_examples_are_earlier_turns_of_the_chat() -> None:
    shown = fmt(system_prompt="S", instruction="I", few_shot=2, examples=EXAMPLES)
    assert render(WordTokenizer("chat"), "new?", shown) == (
        "<system> S <user> one?\nI <assistant> 1 <user> two?\nI <assistant> 2 <user> new?\nI <assistant>"
    )


def test_examples_in_plain_text_are_parted_by_an_empty_line() -> None:
    shown = fmt(system_prompt="S", few_shot=2, examples=EXAMPLES)
    assert render(WordTokenizer(), "new?", shown) == "S\nQ: one? A: 1\n\nQ: two? A: 2\n\nQ: new? A:"


@pytest.mark.parametrize("text", ["one?", "  ONE?\n"])
def test_a_question_is_never_its_own_example(text: str) -> None:
    shown = render(WordTokenizer(), text, fmt(few_shot=2, examples=EXAMPLES))
    assert shown == f"Q: two? A: 2\n\nQ: three? A: 3\n\nQ: {text} A:"


def worked(*questions: str) -> list[Row]:
    return [Row({"q": text, "s": f"solution of {' '.join(text.split())}"}, "f:1") for text in questions]


def draw(rows: Sequence[Row], count: int, seed: int = 0) -> tuple[Example, ...]:
    return draw_examples(rows, count, seed, prompt="q", solution="s", source="f")


@given(
    questions=st.lists(st.sampled_from(["a", "A ", "b", "c  d", "c d", "e", "f"]), min_size=1, max_size=12),
    count=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_no_prompt_ever_shows_its_own_solution(questions: list[str], count: int, seed: int) -> None:
    """Whatever repeats: each prompt shows `count` examples, and none asks what it asks."""
    rows = worked(*questions)
    if len({same_question(text) for text in questions}) <= count:
        with pytest.raises(DataError):
            draw(rows, count, seed)
        return
    shown = fmt(column="q", few_shot=count, examples=draw(rows, count, seed))
    for row in rows:
        examples = shown.shown_before(row.columns["q"])
        assert len(examples) == count
        assert same_question(row.columns["q"]) not in {same_question(one.prompt) for one in examples}
        assert all(one.solution == f"solution of {' '.join(one.prompt.split())}" for one in examples)


def test_the_seed_draws_the_examples() -> None:
    rows = worked(*map(str, range(50)))
    assert draw(rows, 3) == draw(rows, 3)
    assert draw(rows, 3) != draw(rows, 3, seed=1)
    assert draw(rows, 0) == ()


def test_too_few_examples() -> None:
    rows = [*worked("a", "b", "B"), Row({"q": "c", "s": None}, "f:4")]
    assert refusal(draw, rows, 2) == (
        "`data.few_shot` is 2, and f has 2 different questions with a `s`: each needs 2 others",
        "use at most 1, or name the column of the worked solutions with `--set data.solution=COLUMN`",
    )


def test_examples_count_in_the_length_of_a_prompt(warnings: pytest.LogCaptureFixture) -> None:
    shown = fmt(few_shot=2, examples=EXAMPLES, instruction="Think hard.", max_length=14)
    # Three questions of "Q: x? A:" (3 words), three instructions of 2, two solutions of 1: 17 words.
    assert refusal(to_prompts, rows("new?"), WordTokenizer(), shown)[0].startswith("f:1: the prompt has 17 tokens")
