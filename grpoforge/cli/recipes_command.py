"""``grpoforge recipes``: the recipes that come with the package."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from grpoforge.cli.plugins_command import ListByDefault

app = typer.Typer(name="recipes", cls=ListByDefault, help="Show the recipes that come with the package.")

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes and what each is."""
    from grpoforge.yaml_source import recipe_names, recipe_text

    about = {name: headline(recipe_text(name)) for name in recipe_names()}
    if as_json:
        typer.echo(json.dumps([{"name": name, "about": text} for name, text in about.items()], indent=2))
        return
    width = max(len(name) for name in about)
    for name, text in about.items():
        typer.echo(f"{name:<{width}}  {text}")


@app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    as_json: AsJson = False,
) -> None:
    """Show a recipe as it stands (YAML), or with every default filled in (JSON)."""
    from grpoforge.layers import build
    from grpoforge.yaml_source import read_recipe, recipe_text

    if as_json:
        config = build([(f"recipe {name}", {"recipe": name, **read_recipe(name)})])
        typer.echo(config.model_dump_json(indent=2))
    else:
        typer.echo(recipe_text(name), nl=False)


def headline(text: str) -> str:
    """The first comment line of a recipe, without its name."""
    first = text.partition("\n")[0].lstrip("# ")
    return first.partition(": ")[2] or first
