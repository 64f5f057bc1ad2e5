"""``grpoforge recipes``: the recipes that come with the package."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from grpoforge.cli.plugins_command import ListByDefault

app = typer.Typer(name="recipes", cls=ListByDefault, help="Show the recipes that come with the package.")

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


GROUPS = {
    "task": "tasks: a model, problems and rewards",
    "algorithm": "algorithms: on tiny-math, or over a task (grpoforge train TASK ALGORITHM)",
}


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes and what each is: tasks first, then algorithms."""
    from grpoforge.yaml_source import read_recipe, recipe_names, recipe_text

    kinds = {name: "task" if "model" in read_recipe(name) else "algorithm" for name in recipe_names()}
    names = sorted(kinds, key=lambda name: (list(GROUPS).index(kinds[name]), name))
    about = {name: headline(recipe_text(name)) for name in names}
    if as_json:
        listed = [{"name": name, "kind": kinds[name], "about": text} for name, text in about.items()]
        typer.echo(json.dumps(listed, indent=2))
        return
    width = max(len(name) for name in names)
    for kind, title in GROUPS.items():
        typer.echo(title)
        for name in (name for name in names if kinds[name] == kind):
            typer.echo(f"  {name:<{width}}  {about[name]}")


@app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    as_json: AsJson = False,
) -> None:
    """Show a recipe as it stands (YAML), or with every default filled in (JSON)."""
    from grpoforge.layers import build
    from grpoforge.yaml_source import recipe_layers, recipe_text

    if as_json:
        config = build(recipe_layers(name))
        typer.echo(config.model_dump_json(indent=2))
    else:
        typer.echo(recipe_text(name), nl=False)


def headline(text: str) -> str:
    """The first comment line of a recipe, without its name."""
    first = text.partition("\n")[0].lstrip("# ")
    return first.partition(": ")[2] or first
