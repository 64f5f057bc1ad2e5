"""Components read from signatures, their options, and finding them by name."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import pytest

from grpoforge.errors import ConfigError, GrpoforgeError, PluginError
from grpoforge.registry import KINDS, BrokenPlugin, Component, DataParameter, Registry, make_component

if TYPE_CHECKING:
    from torch import Tensor


def brevity(completions: list[str], *, max_chars: int = 200) -> list[float]:
    """1.0 when a completion fits in `max_chars`, else 0.0.

    More about it.
    """
    return [float(len(text) <= max_chars) for text in completions]


class Color(enum.Enum):
    RED = "red"


def many(
    completions: list[str],
    *,
    scale: Annotated[float, "multiplies the score"] = 1.0,
    temperatures: tuple[float, ...] = (0.7, 1.3),
    mode: Literal["strict", "loose"] = "strict",
    folder: Path | None = None,
    color: Color = Color.RED,
    is_on: bool = True,
    tail: Annotated[int, pydantic.Field(ge=1, description="characters kept")] = 4096,
) -> list[float]:
    return []


def needs(completions: list[str], *, word: Annotated[str, "what to look for"]) -> list[float]:
    return [float(word in text) for text in completions]


class Clip:
    """A loss with a rule between its options."""

    def __init__(self, *, low: float = 0.2, high: float = 0.2) -> None:
        if low > high:
            raise ConfigError(f"`low` is {low:g}, above `high`, {high:g}", "swap them")
        self.low, self.high = low, high

    def __call__(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return inputs, {}


class Memory:
    def __init__(self, run: str, *, limit: int = 3) -> None:
        self.run, self.limit = run, limit

    def step_finished(self, report: Any) -> None: ...

    def evaluated(self, step: int, metrics: Any) -> None: ...

    def close(self) -> None: ...


def component(factory: Callable[..., Any], kind: Any = "reward", plugin: str = "grpoforge-brevity") -> Component:
    return make_component(kind, factory.__name__, plugin, factory)


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(GrpoforgeError) as raised:
        function(*arguments, **options)
    return raised.value.message, raised.value.hint


def test_the_kinds_are_a_closed_set() -> None:
    assert KINDS == ("reward", "sampler", "advantage", "kl", "loss", "correction", "tracker", "dataset")


def test_a_function_says_what_it_needs() -> None:
    one = component(brevity)
    assert one.id == "grpoforge-brevity:brevity"
    assert one.data == (DataParameter("completions", True),)
    assert (one.weight, one.gate, one.accepts_any_data) == (1.0, None, False)
    assert one.doc == "1.0 when a completion fits in `max_chars`, else 0.0."
    assert one.full_doc == one.doc + "\n\nMore about it."
    assert one.source.endswith(f"test_registry.py:{brevity.__code__.co_firstlineno}")


def test_data_with_a_default_is_optional() -> None:
    def accuracy(completions: Any, answer: Any, prompts: Any = None) -> Any: ...

    names = [(one.name, one.required) for one in component(accuracy).data]
    assert names == [("completions", True), ("answer", True), ("prompts", False)]


def test_options_carry_type_default_and_help() -> None:
    options = {option.name: option for option in component(many).option_parameters}
    assert list(options) == ["scale", "temperatures", "mode", "folder", "color", "is_on", "tail"]
    assert (options["scale"].type, options["scale"].default) == ("float", 1.0)
    assert options["scale"].help == "multiplies the score"
    assert options["tail"].help == "characters kept"
    assert options["mode"].type == "Literal['strict', 'loose']"
    assert options["folder"].type == "Path | None"
    assert options["temperatures"].type == "tuple[float, ...]"
    required = component(needs).option_parameters[0]
    assert (required.required, required.default) == (True, None)


def test_options_take_what_yaml_can_say() -> None:
    given = {"scale": 2, "temperatures": [1, 0.5], "mode": "loose", "folder": "a/b", "color": "red"}
    assert component(many).validate(given) == {
        "scale": 2.0,
        "temperatures": (1.0, 0.5),
        "mode": "loose",
        "folder": Path("a/b"),
        "color": Color.RED,
        "is_on": True,
        "tail": 4096,
    }


def test_validated_options_validate_again() -> None:
    one = component(many)
    assert one.validate(one.validate({"scale": 2})) == one.validate({"scale": 2})


def test_an_infinite_float_survives() -> None:
    assert component(many).validate({"scale": float("inf")})["scale"] == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": True}, "option `scale` of reward `p:many`: input should be a valid number, got `True`"),
        ({"scale": "2"}, "option `scale` of reward `p:many`: input should be a valid number, got `'2'`"),
        ({"tail": 2.0}, "option `tail` of reward `p:many`: input should be a valid integer, got `2.0`"),
        (
            {"tail": 0},
            "option `tail` of reward `p:many`: input should be greater than or equal to 1, got `0`",
        ),
        ({"is_on": 1}, "option `is_on` of reward `p:many`: input should be a valid boolean, got `1`"),
        ({"mode": "x"}, "option `mode` of reward `p:many`: input should be 'strict' or 'loose', got `'x'`"),
        (
            {"temperatures": [1, False]},
            "option `temperatures[1]` of reward `p:many`: input should be a valid number, got `False`",
        ),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    assert refusal(component(many, plugin="p").validate, options)[0] == message


def test_a_bool_is_not_an_integer() -> None:
    message, hint = refusal(component(brevity).validate, {"max_chars": True})
    assert message == (
        "option `max_chars` of reward `grpoforge-brevity:brevity`: input should be a valid integer, got `True`"
    )
    assert hint == "`max_chars` is `int`"


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    message, hint = refusal(component(brevity).validate, {"max_char": 3})
    assert message == ("unknown option `max_char` of reward `grpoforge-brevity:brevity`; it takes: max_chars")
    assert hint == "did you mean `max_chars`?"


def test_an_option_of_a_component_without_options_is_refused() -> None:
    def plain(completions: Any) -> Any: ...

    message, hint = refusal(component(plain, plugin="p").build, {"x": 1})
    assert message == "unknown option `x` of reward `p:plain`; it takes: no options"
    assert hint == "remove the option"


def test_a_missing_option_is_named() -> None:
    message, hint = refusal(component(needs, plugin="p").build, {})
    assert message == "option `word` of reward `p:needs` is required"
    assert hint == "`word` is `str`: what to look for"


def test_a_value_that_yaml_cannot_hold_is_refused() -> None:
    message, hint = refusal(component(brevity, plugin="p").validate, {"max_chars": object()})
    assert message == "options of reward `p:brevity`: Unable to serialize unknown type: <class 'object'>"
    assert hint == "options are what YAML can hold"


def test_a_long_value_is_cut_in_the_message() -> None:
    message, _ = refusal(component(brevity).validate, {"max_chars": "9" * 500})
    assert message.endswith("got `'" + "9" * 78 + "…`")


def test_building_a_function_binds_its_options() -> None:
    one = component(brevity)
    assert one.build({}) is brevity
    assert one.build({"max_chars": 2})(["a", "abc"]) == [1.0, 0.0]


def test_building_a_class_gives_an_instance() -> None:
    memory = component(Memory, "tracker").build({"limit": 5}, "the run")
    assert (memory.run, memory.limit) == ("the run", 5)
    assert [one.name for one in component(Memory, "tracker").data] == ["run"]


def test_a_rule_between_options_passes_through() -> None:
    one = component(Clip, "loss")
    assert one.build({"high": 1}).high == 1.0
    assert one.data == (DataParameter("inputs", True),)
    assert refusal(one.build, {"low": 0.5}) == ("`low` is 0.5, above `high`, 0.2", "swap them")


@pytest.mark.parametrize("name", ["", "a:b", "0.5", "two words", "x" * 65, None])
def test_names_that_the_command_line_could_not_say_are_refused(name: Any) -> None:
    message, hint = refusal(make_component, "reward", name, "p", brevity)
    assert message.startswith("plugin `p` registers a reward under the name ")
    assert hint == "a name is letters, digits, `.`, `_` and `-`, at most 64, a letter or `_` first"


def test_weight_and_gate_belong_to_rewards() -> None:
    paid = make_component("reward", "x", "p", brevity, weight=1, gate="math")
    assert (paid.weight, paid.gate) == (1.0, "math")
    assert refusal(make_component, "loss", "x", "p", Clip, weight=0.5) == (
        "loss `p:x` is registered with `weight=0.5`",
        "only rewards have a weight",
    )
    assert refusal(make_component, "loss", "x", "p", Clip, gate="math") == (
        "loss `p:x` is registered with `gate='math'`",
        "only rewards have a gate",
    )


@pytest.mark.parametrize("weight", [True, "1", float("nan"), float("inf")])
def test_a_weight_is_a_finite_number(weight: Any) -> None:
    assert refusal(make_component, "reward", "x", "p", brevity, weight=weight) == (
        f"reward `p:x` is registered with `weight={weight!r}`",
        "a weight is a finite number",
    )


def test_a_gate_is_a_name() -> None:
    assert refusal(make_component, "reward", "x", "p", brevity, gate="") == (
        "reward `p:x` is registered with `gate=''`",
        "a gate is the name of another reward",
    )


def registry(*names: str) -> Registry:
    """A registry of rewards, each given as ``plugin:name``."""
    built = Registry()
    for name in names:
        plugin, _, bare = name.partition(":")
        built.add(make_component("reward", bare, plugin, brevity))
    return built


def test_a_component_is_found_by_name_and_by_id() -> None:
    built = registry("a:brevity", "b:math")
    assert built.get("reward", "math").id == "b:math"
    assert built.get("reward", "b:math").id == "b:math"


def test_two_plugins_may_share_a_name_that_is_then_written_in_full() -> None:
    built = registry("my_reward:brevity", "grpoforge-brevity:brevity")
    source = component(brevity).source
    message, hint = refusal(built.get, "reward", "brevity")
    assert message == (
        "two plugins register the reward `brevity`:\n"
        f"  grpoforge-brevity:brevity        {source}\n"
        f"  my_reward:brevity                {source}"
    )
    assert hint == "write one of them in full, e.g., `grpoforge-brevity:brevity`"
    assert built.get("reward", "my_reward:brevity").plugin == "my_reward"


def test_many_plugins_with_one_name_are_counted() -> None:
    message, _ = refusal(registry(*(f"p{index}:same" for index in range(5))).get, "reward", "same")
    assert message.startswith("5 plugins register the reward `same`:\n")


def test_an_unknown_name_gets_a_suggestion() -> None:
    assert refusal(registry("a:math").get, "reward", "maths") == (
        "unknown reward `maths`",
        "did you mean `math`?",
    )
    assert refusal(registry("a:math").get, "reward", "a:maths")[1] == "did you mean `a:math`?"
    assert refusal(registry("a:math").get, "loss", "clip") == ("unknown loss `clip`", "none is known")


def test_a_broken_plugin_explains_a_missing_name() -> None:
    built = registry("a:math")
    built.add_broken(BrokenPlugin(name="grpoforge-zeal", source="zeal", reason="no module `zeal`"))
    hint = "; or repair the plugin `grpoforge-zeal`, which is broken: no module `zeal`"
    assert refusal(built.get, "reward", "zeal")[1] == "known: math" + hint
    assert refusal(built.get, "reward", "grpoforge-zeal:zeal")[1].endswith(hint)
    assert "broken" not in refusal(built.get, "reward", "a:zeal")[1]
    assert built.get("reward", "math").id == "a:math"


def test_one_plugin_cannot_register_a_name_twice() -> None:
    built = registry("a:same")
    source = component(brevity).source
    other = make_component("reward", "same", "a", needs)
    assert refusal(built.add, other) == (
        f"plugin `a` registers the reward `same` twice: {source} and {other.source}",
        "rename one of them",
    )
    built.add(make_component("loss", "same", "a", Clip))


def test_components_are_listed_by_kind_name_and_plugin() -> None:
    built = registry("b:brevity", "a:math", "a:brevity")
    built.add(make_component("loss", "a_loss", "z", Clip))
    ids = ["a:brevity", "b:brevity", "a:math"]
    assert [one.id for one in built.list()] == [*ids, "z:a_loss"]
    assert [one.id for one in built.list("reward")] == ids
    assert built.list("kl") == ()


def test_the_errors_are_plugin_errors() -> None:
    with pytest.raises(PluginError):
        Registry().get("reward", "math")
