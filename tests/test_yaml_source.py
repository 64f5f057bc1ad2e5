"""YAML as it is read and written: numbers, refusals, ``--set``, and that nothing but ConfigError escapes."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.errors import ConfigError
from grpoforge.yaml_source import as_mapping, dump_yaml, parse_override, parse_yaml, read_file, read_recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1E3", -1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-7", -7),
        ("010", 10),
        (".inf", math.inf),
        ("true", True),
        ("yes", True),
        ("null", None),
        ("", None),
        # What YAML 1.1 would turn into ninety, a date, a grouped and a hexadecimal number is text.
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_values(text: str, value: Any) -> None:
    read = parse_yaml(text, "f.yaml")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [", "f.yaml:2: expected the node content, but found '<stream end>'"),
        ("a: 1\n\ta: 1", "f.yaml:2: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 1", "f.yaml:2: but found another document"),
        ("x: {a: 1,\n b: 1, a: 2}", "f.yaml:2: key `a` stands twice"),
        ("x: {[1]: 2}", "f.yaml:1: key [1] is not text"),
        ("a: &big [1]\nb: [*big, *big]", "f.yaml:2: aliases (`*big`) are not allowed"),
        ("a: !!python/name:os.system", "f.yaml:1: tags (`tag:yaml.org,2002:python/name:os.system`) are not allowed"),
        ("a: !!int x", "f.yaml:1: tags (`tag:yaml.org,2002:int`) are not allowed"),
        ("\n" + "[" * 21 + "]" * 21, "f.yaml:2: nested deeper than 20 levels"),
        ("a: \x07", "f.yaml:1: character U+0007 cannot stand in YAML"),
        ("a: 1\nb: \ud800", "f.yaml:2: character U+D800 cannot stand in YAML"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert caught.value.message == message
    assert caught.value.hint


def test_a_bomb_of_aliases_costs_nothing() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(ConfigError, match=r"f.yaml:2: aliases"):
        parse_yaml(bomb, "f.yaml")


def test_size_is_limited() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml("a" * 1_000_001, "f.yaml")
    assert caught.value.message == "f.yaml has 1000001 characters"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(JSON)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert parse_yaml(dump_yaml(value), "f.yaml") == value


@pytest.mark.parametrize(
    "text", ["1e-5", "1e5", "010", "1:30", "yes", "null", "<<", "=", "0x1f", ".inf", "", " a ", "#"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text}), "f.yaml") == {"key": text}


def test_written_yaml_never_acts_on_a_terminal() -> None:
    hostile = "\x1b[31mred\u202e\u2066\x9b2J\nnew"
    text = dump_yaml({"name": hostile, "plain": "你好"})
    assert not {"\x1b", "\u202e", "\u2066", "\x9b"} & set(text)
    assert parse_yaml(text, "f.yaml") == {"name": hostile, "plain": "你好"}


def test_ordinary_text_is_written_as_it_is() -> None:
    assert dump_yaml({"template": "问题: {prompt}"}) == "template: '问题: {prompt}'\n"


@given(st.text(max_size=80) | st.text(alphabet="{}[]:,-&*!|>'\"%@`#\n ab1", max_size=40))
def test_only_config_errors_escape(text: str) -> None:
    with contextlib.suppress(ConfigError):
        dump_yaml(parse_yaml(text, "f.yaml"))


@given(st.text(max_size=40) | st.from_regex(r"\A[a-z.]{1,12}=[^=]{0,20}\Z"))
def test_only_config_errors_escape_from_overrides(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert len(parse_override(text)) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1e-5", {"a": {"b": 1e-5}}),
        ("a=", {"a": None}),
        ("a=b=c", {"a": "b=c"}),
        (" a . b = x", {"a": {"b": "x"}}),
        ("data.rename={q: question}", {"data": {"rename": {"q": "question"}}}),
        ("model.name=nan", {"model": {"name": "nan"}}),
        ("data.prompt=infinity", {"data": {"prompt": "infinity"}}),
    ],
)
def test_overrides(text: str, value: Any) -> None:
    assert parse_override(text) == value


@pytest.mark.parametrize("text", ["", "a", "=1", "a..b=1", ".a=1", "a.=1", " =1"])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert caught.value.message == f"`--set {text}` is not KEY=VALUE"
    assert caught.value.hint == "write for instance `--set optim.learning_rate=1e-5`"


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 1\r\nepochs: 2\r\n")
    assert read_file(file) == {"seed": 1, "epochs": 2}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("# nothing\n")
    assert read_file(tmp_path / "f.yaml") == {}
    assert as_mapping(None, "f") == {}


def test_a_file_that_may_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_file(tmp_path / ("n" * 300 + ".yaml"))
    assert caught.value.message == f"cannot read {tmp_path}/{'n' * 300}.yaml: File name too long"


def test_an_unknown_recipe_says_who_asked() -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe("tiny-mth", "mine.yaml")
    assert (caught.value.message, caught.value.hint) == (
        "unknown recipe `tiny-mth` (from mine.yaml)",
        "did you mean `tiny-math`?",
    )
