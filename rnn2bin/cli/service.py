"""`serve` with its keys, and `worker`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from rnn2bin.cli.options import as_json, json_option

home_option = click.option("--home", type=click.Path(path_type=Path), help="Where files lie (default: ~/.local/share/rnn2bin).")
db_option = click.option("--db", metavar="URL", help="postgresql://…, for many machines (default: an SQLite file in --home).")


def worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a process that converts is told, alone or behind a page."""
    options = (
        click.option(
            "--slots", type=click.IntRange(1), default=1, show_default=True, help="Conversions a worker runs at once; of all workers."
        ),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a conversion."),
        click.option("--memory", type=click.FloatRange(0.5), default=16.0, show_default=True, help="GB that a conversion may take."),
        click.option(
            "--hours", type=click.FloatRange(0.01), default=48.0, show_default=True, help="Processor hours a conversion may take."
        ),
        click.option(
            "--lease", type=click.FloatRange(1), default=15.0, show_default=True, help="Seconds until a silent worker is taken for dead."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def service_settings(home: Path | None, db: str | None, *, slots: int = 1, threads: int = 1, memory: float = 16.0, hours: float = 48.0,
                     lease: float = 15.0, **more: Any) -> Any:  # fmt: skip
    """The service's settings; UsageError where what it needs is not installed."""
    from importlib.util import find_spec

    from rnn2bin.errors import UsageError

    if missing := [
        name for name in ("dbos", "fastapi", "uvicorn", "sqlalchemy", "prometheus_client", "psycopg") if find_spec(name) is None
    ]:
        raise UsageError(f"the service needs {', '.join(missing)}: pip install 'rnn2bin[serve]'")
    from rnn2bin.serve import settings

    limits = settings.Limits(memory=int(memory * 1e9), cpu=int(hours * 3600), threads=threads)
    return settings.settings(home, db, slots=slots, lease=lease, limits=limits, **more)


@click.group(invoke_without_command=True)
@home_option
@db_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; what others reach needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free.")
@click.option("--name", "names", multiple=True, help="Another name that this machine is asked by, behind a proxy.")
@click.option("--upload-gb", type=click.FloatRange(0.001), default=2.0, show_default=True, help="GB of the largest upload.")
@click.option("--no-worker", is_flag=True, help="Page and API only; `rnn2bin worker` converts.")
@worker_options
@click.pass_context
def serve(context: click.Context, home: Path | None, db: str | None, host: str, port: int, names: tuple[str, ...], upload_gb: float,
          no_worker: bool, **options: Any) -> None:  # fmt: skip
    """The conversion service: upload a network, choose a recipe, watch it binarize, read the report, download the packed directory."""
    found = service_settings(home, db, upload_bytes=int(upload_gb * 1e9), **options)
    context.obj = found
    if context.invoked_subcommand is None:
        from rnn2bin.serve import server

        context.exit(server.serve(found, host=host, port=port, names=names, work=not no_worker, ready=click.echo))


@serve.group()
def keys() -> None:
    """Who may use the service: a key each, with quotas."""


@keys.command("add")
@click.argument("name")
@click.option("--jobs", type=click.IntRange(1), default=4, show_default=True, help="Conversions waiting or running at once.")
@click.option("--gb", type=click.FloatRange(0.001), default=20.0, show_default=True, help="GB of uploads and results.")
@click.pass_obj
def keys_add(settings: Any, name: str, jobs: int, gb: float) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from rnn2bin.serve import access, store

    with store.opened(settings.db) as found:
        click.echo(access.add_key(found, name, max_jobs=jobs, max_bytes=int(gb * 1e9)))


@keys.command("ls")
@json_option
@click.pass_obj
def keys_ls(settings: Any, json_out: bool) -> None:
    """The keys, without what is secret of them."""
    from rnn2bin.serve import access, store

    with store.opened(settings.db) as found:
        listed = [access.shown(key) for key in found.list_keys()]
    as_json(listed) if json_out else click.echo(
        "\n".join(f"{k['name']}  {k['max_jobs']} jobs  {k['max_bytes'] / 1e9:g} GB" for k in listed) or "no keys"
    )


@keys.command("rm")
@click.argument("name")
@click.pass_obj
def keys_rm(settings: Any, name: str) -> None:
    """Take a key away: it is refused from now on."""
    from rnn2bin.errors import UsageError
    from rnn2bin.serve import store

    with store.opened(settings.db) as found:
        if not found.remove_key(name):
            raise UsageError(f"{name}: there is no key of this name")


@click.command()
@home_option
@db_option
@worker_options
def worker(home: Path | None, db: str | None, **options: Any) -> None:
    """Convert what is asked of a service that shares this data base; as many of these as there are machines."""
    from rnn2bin.errors import UsageError

    if db is None and home is None:
        raise UsageError("worker: --db says whose jobs these are")
    found = service_settings(home, db, **options)
    from rnn2bin.serve import server

    raise SystemExit(server.work(found, ready=click.echo))
