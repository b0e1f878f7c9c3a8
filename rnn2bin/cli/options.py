"""What several commands have in common: options, their help, and JSON on stdout."""

from __future__ import annotations

import json
from typing import Any

import click

RECIPE_HELP = "A YAML file, or the name of a bundled recipe (rnn2bin recipes ls)."
SOURCE_HELP = "A recipe of which `task`, `metric` and `source` alone are taken: what the file leaves open. How to train says --recipe."
DATA_HELP = (
    ".npz, .safetensors or .pt with `inputs` (and `lengths`, `targets`), or .txt; or train=FILE, valid=FILE, test=FILE, one --data each."
)


def as_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def recipe_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Bundled recipes that begin so, and files."""
    from click.shell_completion import CompletionItem

    from rnn2bin import recipe_yaml

    names = [CompletionItem(path.name) for path in recipe_yaml.bundled() if path.name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


json_option = click.option("--json", "json_out", is_flag=True, help="One JSON document on stdout.")
data_option = click.option("--data", multiple=True, metavar="DATA", help=DATA_HELP)
