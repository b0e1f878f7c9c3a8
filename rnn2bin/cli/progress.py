"""How a conversion's or a search's progress is shown: a bar, a line now and then, or NDJSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

Report = Callable[[dict[str, Any]], None]


@contextmanager
def progress_bar(json_out: bool) -> Iterator[Report]:
    """Yields what `convert` reports its steps to: a bar on a TTY, NDJSON on stderr with --json, a line now and then otherwise."""
    if json_out:
        yield _json_report
    elif sys.stderr.isatty():
        with _rich_bar() as report:
            yield report
    else:
        yield _plain_report()


def describe(now: dict[str, Any]) -> str:
    """The line beside the bar: the metric with hard gates, temperature, slope."""
    hard = "…" if now["hard"] is None else f"{now['hard']:.4f}"
    if "trying_rate" in now:
        return f"short run at learning rate {now['trying_rate']:g}  loss {now['loss']:.4f}"
    return f"{now['metric']} (hard gates) {hard}  τ {now['temperature']:.2f}  slope {now['slope']:.2f}  loss {now['loss']:.4f}"


def json_line(now: dict[str, Any]) -> None:
    click.echo(json.dumps(now), err=True)


def trial_line(now: dict[str, Any]) -> None:
    """A finished trial of a search."""
    figures = "" if now["drop"] is None else f"  drop {100 * now['drop']:.2f}%  density {now['density']:.3f}"
    stopped = f"  {now['stopped']}" if now["stopped"] else ""
    took = f"  {now['seconds']:.0f} s" if now["seconds"] is not None else ""
    click.echo(f"trial {now['number']}: {now['state']}{figures}{stopped}{took}  ({now['finished']} of {now['trials']})", err=True)


def _json_report(now: dict[str, Any]) -> None:
    """Every hundredth of the way, and the last step, one JSON document a line."""
    if now["step"] % max(1, now["steps"] // 100) == 0 or now["step"] == now["steps"]:
        click.echo(json.dumps(now), err=True)


def _plain_report() -> Report:
    """Every tenth of the way one line, of a short run its last."""
    last = [(1, -1)]  # training, tenth

    def report(now: dict[str, Any]) -> None:
        if "trying_rate" in now:
            if now["step"] == now["steps"]:
                click.echo(f"step {now['step']}/{now['steps']}  {describe(now)}", err=True)
            return
        at = (now.get("training", 1), 10 * now["step"] // now["steps"])
        if at > last[0]:
            if at[0] > last[0][0]:
                click.echo(f"step 0/{now['steps']}  training {at[0]}: density {now['wanted_density']:.3f} is wanted", err=True)
            last[0] = at
            click.echo(f"step {now['step']}/{now['steps']}  {describe(now)}", err=True)

    return report


@contextmanager
def _rich_bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # 80 columns must do: the metric's name stands above the bar, once.
    columns = (MofNCompleteColumn(), BarColumn(bar_width=12), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("preparing", total=None)

        def report(now: dict[str, Any]) -> None:
            if bar.tasks[0].total is None:
                bar.console.print(f"hard: {now['metric']} on validation data, with hard gates")
            bar.update(row, completed=now["step"], total=max(now["steps"], now["step"]), description=short(now))

        yield report


def short(now: dict[str, Any]) -> str:
    """`describe` for the bar."""
    if "trying_rate" in now:
        return f"short run, rate {now['trying_rate']:g} loss {now['loss']:.3f}"
    hard = "…" if now["hard"] is None else f"{now['hard']:.4f}"
    return f"hard {hard} τ {now['temperature']:.2f} slope {now['slope']:.2f} loss {now['loss']:.3f}"
