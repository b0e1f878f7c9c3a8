"""Conversions of a service, from here: `convert --server`, and `jobs` to look at them, stop them, fetch what they made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rnn2bin import libraries
from rnn2bin.cli.options import as_json, json_option
from rnn2bin.cli.progress import progress_bar

if TYPE_CHECKING:
    from rnn2bin.recipe import Recipe
    from rnn2bin.serve.client import Client, Job

SERVER = "http://127.0.0.1:8765"
key_option = click.option("--key", envvar="RNN2BIN_KEY", help="Of that service, where it wants one (default: $RNN2BIN_KEY).")


def client(server: str, key: str | None) -> Client:
    """UsageError where what a client needs is not installed."""
    from importlib.util import find_spec

    from rnn2bin.errors import UsageError

    if find_spec("httpx") is None:
        raise UsageError("a service is asked with httpx: pip install 'rnn2bin[serve]'")
    from rnn2bin.serve.client import Client

    return Client(server, key=key)


def convert(server: str, key: str | None, model: Path, recipe: Recipe, data: tuple[str, ...], out: Path | None, *,
            force: bool, json_out: bool) -> Path:  # fmt: skip
    """The packed directory of a conversion that `server` did. Ctrl-C leaves the job running there."""
    from rnn2bin import recipe_yaml
    from rnn2bin.data import named_files

    names = {name: Path(file) for name, file in recipe.data.files().items() if name in ("vocabulary", "labels")}
    given = named_files(data or None, recipe.data) | names
    bare = recipe.model_copy(update={"data": recipe.data.without_files()})
    out = out or Path(f"{model.name}.rnn2bin")
    with client(server, key) as service:
        service.check_out(out, force=force)
        job = service.convert(model, data=given or None, recipe_text=recipe_yaml.dump(bare))
        click.echo(f"job {job['id']}: {server}/#/jobs/{job['id']}", err=True)
        return _fetched(service, job["id"], out, force=force, json_out=json_out)


def _fetched(service: Client, id: str, out: Path, *, force: bool, json_out: bool) -> Path:
    with progress_bar(json_out) as progress:
        service.finished(id, progress=progress)
    return service.download(id, out, force=force)


def line(job: Job) -> str:
    result, error = job["result"], job["error"]
    told = f"drop {result['drop']['value']:.4g}" if result else error["code"] if error else job["stage"] or ""
    return f"{job['id']}  {job['state']:9}  {told:18}  {job['name']}"


@click.group()
@click.option("--server", envvar="RNN2BIN_SERVER", default=SERVER, show_default=True, help="The service (default: $RNN2BIN_SERVER).")
@key_option
@click.pass_context
def jobs(context: click.Context, server: str, key: str | None) -> None:
    """Conversions of a service: the jobs that its page shows."""
    libraries.quiet()
    context.obj = context.with_resource(client(server, key))


def one(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command about one job, which prints it."""
    return click.argument("id")(json_option(click.pass_obj(command)))


def _show(job: Job, json_out: bool) -> None:
    as_json(job) if json_out else click.echo(line(job))


@jobs.command("ls")
@click.option("--state", type=click.Choice(["queued", "running", "done", "failed", "cancelled"]), help="Only those.")
@json_option
@click.pass_obj
def jobs_ls(service: Client, state: str | None, json_out: bool) -> None:
    """All jobs, newest first."""
    found = list(service.list(state=state))
    as_json(found) if json_out else click.echo("\n".join(map(line, found)) or "no jobs")


@jobs.command("show")
@one
def jobs_show(service: Client, id: str, json_out: bool) -> None:
    """A job: its state, result or error."""
    job = service.get(id)
    _show(job, json_out)
    for reason in (job["error"] or {}).get("reasons", []) if not json_out else []:
        click.echo(f"  {reason}")


@jobs.command("fetch")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write (default: the job's name + .rnn2bin here).")
@click.option("--force", is_flag=True, help="Replace an existing OUT.")
@one
def jobs_fetch(service: Client, id: str, out: Path | None, force: bool, json_out: bool) -> None:
    """Wait for a job's end and write its packed directory; its errors have the exit codes of `convert`."""
    out = out or Path(f"{Path(service.get(id)['name']).name}.rnn2bin")
    service.check_out(out, force=force)
    written = _fetched(service, id, out, force=force, json_out=json_out)
    as_json({"out": str(written)}) if json_out else click.echo(written)


@jobs.command("cancel")
@one
def jobs_cancel(service: Client, id: str, json_out: bool) -> None:
    """Stop a job; what it trained stays for `retry`."""
    _show(service.cancel(id), json_out)


@jobs.command("retry")
@one
def jobs_retry(service: Client, id: str, json_out: bool) -> None:
    """Begin again what failed or was cancelled, from its last checkpoint."""
    _show(service.retry(id), json_out)


@jobs.command("rm")
@click.argument("id")
@click.pass_obj
def jobs_rm(service: Client, id: str) -> None:
    """Forget an ended job and all it made."""
    service.delete(id)
