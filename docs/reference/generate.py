"""Write docs/reference/config.md and components.md from the code: `python docs/reference/generate.py [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpoforge.config import Config, Part
from grpoforge.plugins import load_plugins
from grpoforge.registry import KINDS, Component

HERE = Path(__file__).parent
NOTE = "<!-- written by docs/reference/generate.py; do not edit -->\n\n"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as ``LoRAConfig | None`` or ``list[RewardPart]``."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def rows(section: BaseModel, prefix: str = "") -> list[str]:
    """One table row per key of ``section``, which holds the defaults; the sections in it expanded."""
    lines = []
    for name, field in type(section).model_fields.items():
        lines += key_rows(f"{prefix}{name}", field, getattr(section, name))
    if isinstance(section, Part):
        lines.append(f"| `{prefix}OPTION` | | Any option of the component, see [Components](components.md). |")
    return lines


def key_rows(key: str, field: FieldInfo, value: Any) -> list[str]:
    """The row of one key, or the rows of the section that stands there."""
    if isinstance(value, BaseModel):
        return rows(value, f"{key}.")
    inner = section_of(field.annotation)
    if inner is None:
        return [row(key, value, meaning(field))]
    if isinstance(value, list):
        # The first key of a member is its name, which is where it stands already.
        return [row(key, value, LISTS[key]), *rows(inner.model_validate({"name": "NAME"}), f"{key}.NAME.")[1:]]
    return [row(key, value, f"{meaning(field)} null: off."), *rows(inner(), f"{key}.")]


def row(key: str, value: Any, text: str) -> str:
    return f"| `{key}` | `{as_yaml(value)}` | {text} |"


def meaning(field: FieldInfo) -> str:
    """What the key is for, and the values that it may have where they can be counted."""
    text = " ".join((field.description or "").split()).replace("``", "`")
    allowed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{text} One of {', '.join(f'`{value}`' for value in allowed)}." if allowed else text


def as_yaml(value: Any) -> str:
    """``value`` in YAML's flow style, on one line."""
    if isinstance(value, Part):
        return f"{{name: {value.name}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    if isinstance(value, str) and re.fullmatch(r"[\w@./-]+", value):
        return value
    return json.dumps(value)


LISTS = {
    "rewards": "What completions are paid for; `--reward NAME` on the command line.",
    "corrections": "Off-policy corrections: their weights multiply the policy loss of each token.",
    "trackers": "What records the run.",
}

CONFIG_HEAD = """# Configuration keys

Every key, its default, and what it does. Recipes set most of them; `grpoforge recipes show NAME` shows what one sets.
A key is typed as it stands here, in a file as nested YAML or on the command line: `--set optim.learning_rate=1e-5`.

`NAME` is the name of a reward, correction or tracker that the run has, and `OPTION` an option of that component:
`--set rewards.brevity.weight=0.3`, `--set sampler.temperature=0.7`, `--set trackers.console.sample_every=5`.

A list chooses its members and replaces the one below it; what was said about a member that stays is kept. So a tracker
is added or dropped by naming all that the run should have:

```sh
grpoforge train --set 'trackers=[{name: console},{name: jsonl}]'
```

| key | default | meaning |
|---|---|---|
"""


def config_page() -> str:
    return NOTE + CONFIG_HEAD + "\n".join(rows(Config())) + "\n"


def component_lines(component: Component) -> list[str]:
    """A heading, the documentation and the options of one component."""
    text = component.full_doc.replace("``", "`")
    lines = [f"### {component.name}", "", text, ""]
    if component.option_parameters:
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{o.name}` | {str(o.type).replace('|', 'or')} | `{as_yaml(o.default)}` | {o.help or ''} |"
            for o in component.option_parameters
        ]
        lines.append("")
    return lines


def components_page() -> str:
    registry = load_plugins().registry
    lines = ["# Components that come with the package", ""]
    for kind in KINDS:
        lines += [f"## {kind}", ""]
        for component in registry.list(kind):
            if component.plugin == "grpoforge":
                lines += component_lines(component)
    return NOTE + "\n".join(lines).rstrip() + "\n"


def main() -> int:
    pages = {"config.md": config_page(), "components.md": components_page()}
    if "--check" in sys.argv:
        stale = [name for name, text in pages.items() if (HERE / name).read_text() != text]
        sys.stderr.write("".join(f"docs/reference/{name} is stale; run docs/reference/generate.py\n" for name in stale))
        return 1 if stale else 0
    for name, text in pages.items():
        (HERE / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
