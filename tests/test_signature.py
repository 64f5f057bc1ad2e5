"""What is read from a signature: data, options, and what is refused."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from grpoforge.errors import GrpoforgeError
from grpoforge.registry import Component, Registry, make_component

if TYPE_CHECKING:
    from torch import Tensor


def brevity(completions: list[str], *, max_chars: int = 200) -> list[float]:
    """1.0 when a completion fits in `max_chars`, else 0.0.

    More about it.
    """
    return [float(len(text) <= max_chars) for text in completions]


def component(factory: Callable[..., Any], kind: Any = "reward", plugin: str = "grpoforge-brevity") -> Component:
    return make_component(kind, factory.__name__, plugin, factory)


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(GrpoforgeError) as raised:
        function(*arguments, **options)
    return raised.value.message, raised.value.hint


def test_a_dataclass_is_a_component() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Contains:
        word: str = "please"

        def __call__(self, completions: Sequence[str]) -> list[float]:
            return [float(self.word in text) for text in completions]

    one = component(Contains)
    assert one.validate({}) == {"word": "please"}
    assert one.build({"word": "a"})(["a", "b"]) == [1.0, 0.0]


class Drawer(Protocol):
    def sample(self) -> None: ...

    def greedy(self) -> None: ...

    def sync(self) -> None: ...


class Whole(Drawer):
    def sample(self) -> None: ...

    def greedy(self) -> None: ...

    def sync(self) -> None: ...


class Unfinished(Drawer):
    def sample(self) -> None: ...

    def greedy(self) -> None: ...


def test_a_class_may_inherit_from_a_protocol() -> None:
    assert component(Whole, "sampler").data == ()
    assert refusal(component, Unfinished, "sampler", "p") == (
        "sampler `p:Unfinished` has no method `sync`",
        "a sampler needs it",
    )


def test_an_async_reward_keeps_being_one() -> None:
    async def slow(completions: list[str], *, value: float = 0.0) -> list[float]:
        return [value for _ in completions]

    built = component(slow).build({"value": 1})
    assert asyncio.run(built(["a", "b"])) == [1.0, 1.0]


def test_a_decorated_function_shows_its_own_signature() -> None:
    @functools.wraps(brevity)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return brevity(*args, **kwargs)

    one = component(wrapper)
    assert one.validate({}) == {"max_chars": 200}
    assert one.source == component(brevity).source


def test_types_of_data_need_not_be_imported() -> None:
    def advantage(rewards: Tensor, weights: Tensor, *, epsilon: float = 1e-4) -> Tensor: ...  # type: ignore[empty-body]

    assert component(advantage, "advantage").validate({}) == {"epsilon": 1e-4}


def test_option_names_may_shadow_pydantic() -> None:
    def reward(completions: Any, *, copy: int = 1, schema: str = "s", json: bool = False) -> Any: ...

    assert component(reward).validate({"copy": 2}) == {"copy": 2, "schema": "s", "json": False}


def test_a_trl_reward_takes_any_data_and_no_options() -> None:
    def trl(prompts: Any, completions: Any, answer: Any = None, *, solution: Any, **kwargs: Any) -> Any: ...

    one = component(trl)
    assert one.accepts_any_data
    assert [(d.name, d.required) for d in one.data] == [
        ("prompts", True),
        ("completions", True),
        ("answer", False),
        ("solution", True),
    ]
    assert one.option_parameters == ()


def test_a_trl_style_class_has_the_options_of_its_init() -> None:
    class Judge:
        def __init__(self, *, strictness: float = 1.0) -> None:
            self.strictness = strictness

        def __call__(self, completions: Any, **kwargs: Any) -> Any: ...

    one = component(Judge)
    assert one.accepts_any_data
    assert one.validate({}) == {"strictness": 1.0}


def kwargs_loss(inputs: Any, **kwargs: Any) -> Any: ...


def kwargs_without_completions(prompts: Any, **kwargs: Any) -> Any: ...


def star(completions: Any, *rest: Any) -> Any: ...


def positional_only(completions: Any, /) -> Any: ...


def hidden_type(completions: Any, *, tensor: Tensor) -> Any: ...


def wrong_default(completions: Any, *, word: str = 3) -> Any: ...  # type: ignore[assignment]


def object_default(completions: Any, *, value: Any = object) -> Any: ...


def callable_option(completions: Any, *, value: Registry) -> Any: ...


def underscore(completions: Any, *, _secret: int = 0) -> Any: ...


class BuiltFromData:
    def __init__(self, run: Any) -> None: ...

    def __call__(self, completions: Any) -> Any: ...


class OptionsOnCall:
    def __call__(self, completions: Any, *, word: str = "a") -> Any: ...


class NotCallable:
    pass


@pytest.mark.parametrize(
    ("kind", "factory", "message", "hint"),
    [
        (
            "loss",
            kwargs_loss,
            "loss `p:x` takes `**kwargs`, which would hide a misspelled option",
            "name each option as a keyword-only parameter",
        ),
        (
            "reward",
            kwargs_without_completions,
            "reward `p:x` takes `**kwargs`, which would hide a misspelled option",
            "name each option as a keyword-only parameter",
        ),
        ("reward", star, "reward `p:x` takes `*rest`", "name each parameter: positional ones are data"),
        (
            "reward",
            positional_only,
            "reward `p:x` takes `completions` before a `/`, and data is bound by name",
            "remove the `/`",
        ),
        (
            "reward",
            hidden_type,
            "the types of the options of reward `p:x` cannot be read: name 'Tensor' is not defined",
            "import the types of options at module level, not only under TYPE_CHECKING",
        ),
        (
            "reward",
            wrong_default,
            "the default of option `word` of reward `p:x` is `3`, and it is not `str`",
            "annotate the option with a type that allows its default",
        ),
        (
            "reward",
            object_default,
            "the default of option `value` of reward `p:x` is `<class 'object'>`, and YAML cannot hold it",
            "annotate the option with a type that allows its default",
        ),
        (
            "reward",
            underscore,
            "the options of reward `p:x` cannot be checked: "
            "Fields must not use names with leading underscores; e.g., use 'secret' instead of '_secret'.",
            "options are what YAML can hold: numbers, strings, booleans, lists, tuples, mappings, None",
        ),
        (
            "reward",
            BuiltFromData,
            "`__init__` of reward `p:x` takes `run` positionally, and has no data when it is built",
            "make it an option (keyword-only), or take it in `__call__`",
        ),
        (
            "reward",
            OptionsOnCall,
            "`__call__` of reward `p:x` takes the keyword-only `word`",
            "options of a class are keyword-only parameters of its `__init__`",
        ),
        ("loss", NotCallable, "loss `p:x` has no method `__call__`", "a loss needs it"),
        (
            "tracker",
            brevity,
            "tracker `p:x` is a function, and a tracker has several methods: step_finished, evaluated, close",
            "register a class; `grpoforge.types.Tracker` says what it must have",
        ),
        (
            "reward",
            functools.partial(brevity),
            "reward `p:x` is a `partial`, not a function or a class",
            "register the function itself, or a class whose `__init__` takes the options",
        ),
    ],
)
def test_unusable_signatures_are_refused(kind: Any, factory: Any, message: str, hint: str) -> None:
    assert refusal(make_component, kind, "x", "p", factory) == (message, hint)


def test_an_option_of_an_unusable_type_is_refused() -> None:
    message, hint = refusal(make_component, "reward", "x", "p", callable_option)
    assert message.startswith("the options of reward `p:x` cannot be checked: Unable to generate pydantic-core schema")
    assert hint == "options are what YAML can hold: numbers, strings, booleans, lists, tuples, mappings, None"
