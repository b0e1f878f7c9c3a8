"""The command line: parses, calls, reports. No logic. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import traceback
from typing import Any

import click

from rnn2bin import __version__, processes, signals
from rnn2bin.cli import conversion, jobs, networks, recipes, service, tools
from rnn2bin.errors import BudgetError, InterruptedRunError, Rnn2binError


class Cli(click.Group):
    """Turns expected errors into one line a reason on stderr and their exit code."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta["rnn2bin.json"] = "--json" in args
        return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        try:
            with signals.raised():
                return super().invoke(context)
        except Rnn2binError as error:
            if not processes.leads():
                _told_apart(error)
                context.exit(error.exit_code)
            if context.meta["rnn2bin.json"]:
                click.echo(json.dumps({"error": {"code": error.code, "exit_code": error.exit_code, "reasons": list(error.reasons)}}))
            for reason in error.reasons:
                click.echo(f"rnn2bin: {reason}", err=True)
            context.exit(error.exit_code)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's own way to say it
                raise
            click.echo("rnn2bin: out of memory; lower train.batch_size or train.window", err=True)
            context.exit(6)
        except KeyboardInterrupt:
            if processes.leads():
                click.echo("rnn2bin: interrupted; nothing was written", err=True)
            context.exit(7)

    def main(self, *args: Any, **options: Any) -> Any:
        if processes.count() == 1:
            return super().main(*args, **options)
        try:
            super().main(*args, **options)
        except SystemExit as ended:
            processes.leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        except BaseException:
            traceback.print_exc()
            processes.leave(1)


def _told_apart(error: Rnn2binError) -> None:
    """An error of a process that does not report: told where process 0 does not know of it."""
    if not getattr(error, "told", False) and not isinstance(error, BudgetError | InterruptedRunError):
        for reason in error.reasons:
            click.echo(f"rnn2bin (process {processes.rank()}): {reason}", err=True)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rnn2bin")
def main() -> None:
    """Turn pretrained LSTMs and GRUs into networks with binary gates, run them, and say what it cost.

    \b
    Exit codes: 0 ok · 2 usage or recipe · 3 unsupported input · 4 refused as unsafe · 5 accuracy budget missed, or not reproduced ·
    6 resources · 7 interrupted, resumable · 1 a bug
    """


for command in (
    *(conversion.convert, conversion.search, conversion.reproduce),
    *(networks.inspect, networks.evaluate, networks.run, networks.export, networks.bench, networks.compare),
    *(recipes.recipes, service.serve, service.worker, jobs.jobs),
    *(tools.gradients, tools.completion, tools.doctor),
):
    main.add_command(command)
