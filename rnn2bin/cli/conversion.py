"""What trains: `convert`, `search`, `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rnn2bin import libraries, processes
from rnn2bin.cli import jobs
from rnn2bin.cli.options import RECIPE_HELP, SOURCE_HELP, as_json, data_option, json_option, recipe_names
from rnn2bin.cli.progress import json_line, progress_bar, trial_line
from rnn2bin.errors import UsageError

SPACE_HELP = "A YAML that changes which knobs are searched; for each `a.b:` {low: 1, high: 9, log: true}, a list of values, or null."


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--recipe", default="anneal.yaml", show_default=True, shell_complete=recipe_names, help=RECIPE_HELP)
@click.option("--source", help=SOURCE_HELP)
@data_option
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write (default: MODEL.rnn2bin here).")
@click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Set one knob of the recipe; may be given often.")
@click.option("--max-drop", type=float, help="Largest relative loss of the metric; more is exit code 5 and nothing written.")
@click.option("--max-density", type=float, help="Largest share of the layers' weights a step reads: sets the budget; more is exit code 5.")
@click.option("--seed", type=int, help="Seed of noise, order and split.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would happen (layers, size, memory, time) and stop.")
@click.option("--tensorboard", type=click.Path(path_type=Path), metavar="DIR", help="Log the training there for TensorBoard too.")
@click.option("--server", metavar="URL", help="Let a conversion service do it (rnn2bin serve), and fetch what it made.")
@jobs.key_option
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of an interrupted conversion.")
@click.option("--force", is_flag=True, help="Replace an existing OUT, start an interrupted conversion over.")
@json_option
def convert(model: Path, recipe: str, source: str | None, data: tuple[str, ...], out: Path | None, overrides: tuple[str, ...],
            max_drop: float | None, max_density: float | None, seed: int | None, only_plan: bool, tensorboard: Path | None,
            server: str | None, key: str | None, resume: bool, force: bool, json_out: bool) -> None:  # fmt: skip
    """Convert MODEL: distil its float gates into binary ones and write a packed directory with a report.

    With both --max-drop and --max-density the fastest network that keeps them is searched for, in at most five trainings.
    """
    from rnn2bin import recipe_yaml

    # before the heavy imports: a typo is told at once
    read = lambda: recipe_yaml.resolve(recipe, overrides, source=source, seed=seed, max_drop=max_drop, max_density=max_density)
    libraries.quiet()
    chosen = processes.first(read)
    if server is not None:
        if only_plan or tensorboard is not None or resume:
            raise UsageError("--server: --plan, --tensorboard and --resume are of conversions here; a job there: rnn2bin jobs retry ID")
        return _tell(jobs.convert(server, key, model, chosen, data, out, force=force, json_out=json_out), json_out)
    if only_plan:
        from rnn2bin import plan

        if not json_out:
            click.echo("rnn2bin: trying a few steps to time them; with a large network that takes a minute or two", err=True)
        found = plan.plan(model, chosen, data or None, out)
        return as_json(found) if json_out else click.echo(plan.render(found))
    from rnn2bin import pipeline as job
    from rnn2bin.distill import callbacks

    watchers = [] if tensorboard is None else [callbacks.tensorboard(tensorboard)]
    with progress_bar(json_out) as progress:
        options: dict[str, Any] = {"resume": resume, "force": force, "progress": progress, "callbacks": watchers}
        result = job.convert(model, recipe=chosen, data=data or None, out=out, **options)
    if processes.leads():
        _tell(result.path, json_out)


def _tell(out: Path, json_out: bool) -> None:
    """What the report of a packed directory says."""
    from rnn2bin.evaluation import html, stored

    report = stored.read(out)
    if json_out:
        return as_json(report)
    click.echo(html.render_table(report))
    for note in report["provenance"]["notes"]:
        click.echo(f"note: {note}")
    click.echo(f"report: {(out / 'report.html').resolve()}")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--recipe", default="anneal.yaml", show_default=True, help="Where the search starts. " + RECIPE_HELP)
@click.option("--source", help=SOURCE_HELP)
@data_option
@click.option("--out", type=click.Path(path_type=Path), help="Directory for study, front and chosen recipe (default: MODEL.search here).")
@click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Set one knob of the recipe; may be given often.")
@click.option("--space", "knobs", type=click.Path(path_type=Path), help=SPACE_HELP)
@click.option("--trials", type=click.IntRange(1), default=40, show_default=True, help="Finished trials in the study, of all workers.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Start no trial after so many seconds.")
@click.option("--study", metavar="URL", help="The study's data base, for workers on many machines (default: a SQLite file in OUT).")
@click.option("--max-drop", type=float, help="Choose the fastest recipe with at most this relative loss; none is exit code 5.")
@click.option("--max-density", type=float, help="Choose a recipe that reads at most this share; also ends the range of budget.density.")
@click.option("--seed", type=int, help="Seed of the trainings and of what is tried.")
@click.option("--force", is_flag=True, help="Replace the results of another search in OUT.")
@json_option
def search(model: Path, recipe: str, source: str | None, data: tuple[str, ...], out: Path | None, overrides: tuple[str, ...],
           knobs: Path | None, trials: int, timeout: float | None, study: str | None, max_drop: float | None, max_density: float | None,
           seed: int | None, force: bool, json_out: bool) -> None:  # fmt: skip
    """Search recipes for MODEL: accuracy lost against weights read, on the validation part; the front is drawn, the chosen recipe written.

    The study is stored: an interrupted search (exit code 7) goes on with the same command, and workers may share one. `rnn2bin convert
    MODEL --recipe OUT/recipe.yaml` then makes the chosen network, and measures it on what was held out.
    """
    from rnn2bin import recipe_yaml

    chosen = recipe_yaml.resolve(recipe, overrides, source=source, seed=seed, max_drop=max_drop, max_density=max_density)
    libraries.quiet()
    from rnn2bin.search import study as studies

    options: dict[str, Any] = {"knobs": knobs, "trials": trials, "timeout": timeout, "study": study, "force": force}
    report = studies.search(model, recipe=chosen, data=data or None, out=out, progress=json_line if json_out else trial_line, **options)
    as_json(report) if json_out else click.echo(studies.render(report))


@click.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.argument("model", required=False, type=click.Path(path_type=Path))
@data_option
@json_option
def reproduce(report: Path, model: Path | None, data: tuple[str, ...], json_out: bool) -> None:
    """Run the conversion again that REPORT (report.json, or a packed directory) records, and compare every bit of the weights.

    MODEL and --data: where they lie now, if not where the report says. Exit code 5 names the first difference.
    """
    libraries.quiet()
    from rnn2bin import reproduce as again

    with progress_bar(json_out) as progress:
        found = again.reproduce(report, model=model, given=data or None, progress=progress)
    as_json(found) if json_out else click.echo(again.render(found))
