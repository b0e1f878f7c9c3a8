"""`recipes`: the bundled ones, and checking one's own."""

from __future__ import annotations

from pathlib import Path

import click

from rnn2bin.cli.options import as_json, json_option


@click.group()
def recipes() -> None:
    """The bundled recipes."""


@recipes.command("ls")
@json_option
def recipes_ls(json_out: bool) -> None:
    """Names, and what each is for."""
    from rnn2bin import recipe_yaml

    found = {path.name: recipe_yaml.summary(path) for path in recipe_yaml.bundled()}
    wide = max(map(len, found))
    as_json(found) if json_out else click.echo("\n".join(f"{name:{wide}} {text}" for name, text in found.items()))


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print a recipe with its comments."""
    from rnn2bin import recipe_yaml

    click.echo(recipe_yaml.find(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path), default=Path())
@click.option("--force", is_flag=True, help="Replace an existing file.")
def recipes_cp(name: str, target: Path, force: bool) -> None:
    """Copy a recipe here (or to TARGET), to be edited."""
    from rnn2bin import recipe_yaml

    click.echo(recipe_yaml.copy(name, target, force=force))


@recipes.command("validate")
@click.argument("file")
@click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Knobs to set, as in convert.")
@json_option
def recipes_validate(file: str, overrides: tuple[str, ...], json_out: bool) -> None:
    """Check a recipe; every error with its line and column. Prints the resolved recipe with --json."""
    from rnn2bin import recipe_yaml

    recipe = recipe_yaml.read(file, overrides=overrides)
    as_json(recipe.model_dump(mode="json")) if json_out else click.echo(f"{file}: a valid recipe")


@recipes.command("schema")
def recipes_schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from rnn2bin import recipe_yaml

    as_json(recipe_yaml.schema())
