from pathlib import Path

from grpoforge.plugins import load_plugins

PLUGIN = Path(__file__).with_name("grpoforge_politeness.py")


def reward():
    return load_plugins([PLUGIN], entry_points=[]).registry.get("reward", "politeness")


def test_politeness_looks_for_please_in_any_case():
    politeness = reward().build({})
    assert politeness(["Please wait.", "Wait."]) == [1.0, 0.0]


def test_the_word_is_an_option():
    politeness = reward().build({"word": "thanks"})
    assert politeness(["Thanks!", "please"]) == [1.0, 0.0]
