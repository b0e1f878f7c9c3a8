"""The command line: parses, calls, reports. No logic. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rnn2bin import __version__, processes, signals
from rnn2bin.errors import BudgetError, InterruptedRunError, Rnn2binError

RECIPE_HELP = "A YAML file, or the name of a bundled recipe (rnn2bin recipes ls)."
SOURCE_HELP = "A recipe of which `task`, `metric` and `source` alone are taken: what the file leaves open. How to train says --recipe."
DATA_HELP = (
    ".npz, .safetensors or .pt with `inputs` (and `lengths`, `targets`), or .txt; or train=FILE, valid=FILE, test=FILE, one --data each."
)


SPACE_HELP = "A YAML that changes which knobs are searched; for each `a.b:` {low: 1, high: 9, log: true}, a list of values, or null."


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


@main.command()
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
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of an interrupted conversion.")
@click.option("--force", is_flag=True, help="Replace an existing OUT, start an interrupted conversion over.")
@json_option
def convert(model: Path, recipe: str, source: str | None, data: tuple[str, ...], out: Path | None, overrides: tuple[str, ...],
            max_drop: float | None, max_density: float | None, seed: int | None, only_plan: bool, tensorboard: Path | None,
            resume: bool, force: bool, json_out: bool) -> None:  # fmt: skip
    """Convert MODEL: distil its float gates into binary ones and write a packed directory with a report.

    With both --max-drop and --max-density the fastest network that keeps them is searched for, in at most five trainings.
    """
    from rnn2bin import recipe_yaml

    # before the heavy imports: a typo is told at once
    read = lambda: recipe_yaml.resolve(recipe, overrides, source=source, seed=seed, max_drop=max_drop, max_density=max_density)
    quiet_libraries()
    chosen = processes.first(read)
    if only_plan:
        from rnn2bin import plan

        found = plan.plan(model, chosen, data or None, out)
        return as_json(found) if json_out else click.echo(plan.render(found))
    from rnn2bin import pipeline as job
    from rnn2bin.distill import callbacks

    watchers = [] if tensorboard is None else [callbacks.tensorboard(tensorboard)]
    with progress_bar(json_out) as progress:
        options: dict[str, Any] = {"resume": resume, "force": force, "progress": progress, "callbacks": watchers}
        result = job.convert(model, recipe=chosen, data=data or None, out=out, **options)
    if not processes.leads():
        return
    if json_out:
        return as_json(result.report)
    from rnn2bin.evaluation import html

    click.echo(html.render_table(result.report))
    for note in result.report["provenance"]["notes"]:
        click.echo(f"note: {note}")
    click.echo(f"report: {(result.path / 'report.html').resolve()}")


@main.command()
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
    quiet_libraries()
    from rnn2bin.search import study as studies

    options: dict[str, Any] = {"knobs": knobs, "trials": trials, "timeout": timeout, "study": study, "force": force}
    report = studies.search(model, recipe=chosen, data=data or None, out=out, progress=_json_line if json_out else _trial_line, **options)
    as_json(report) if json_out else click.echo(studies.render(report))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--recipe", default="anneal.yaml", show_default=True, help="Whose `source:` says what the file leaves open. " + RECIPE_HELP)
@click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Set one knob of it: source.inputs={sr: 16000}.")
@json_option
def inspect(model: Path, recipe: str, overrides: tuple[str, ...], json_out: bool) -> None:
    """What is in MODEL: recognised parts, what was not recognised, and a `source:` section to start from. Runs no code from it."""
    from rnn2bin import recipe_yaml
    from rnn2bin.loaders import inspect as look

    found = look(model, source=recipe_yaml.read(recipe, overrides=overrides).source)
    as_json(found.to_dict()) if json_out else click.echo(found.render())


@main.command("eval")
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@data_option
@json_option
def evaluate(teacher: Path, out: Path, data: tuple[str, ...], json_out: bool) -> None:
    """What binarization cost: TEACHER against its packed directory OUT on held-out data, with a 95% interval."""
    quiet_libraries()
    from rnn2bin.pipeline import evaluate_files

    report = evaluate_files(teacher, out, data=data or None)
    if json_out:
        return as_json(report)
    from rnn2bin.evaluation import html

    click.echo(html.render_table(report))


@main.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.argument("model", required=False, type=click.Path(path_type=Path))
@data_option
@json_option
def reproduce(report: Path, model: Path | None, data: tuple[str, ...], json_out: bool) -> None:
    """Run the conversion again that REPORT (report.json, or a packed directory) records, and compare every bit of the weights.

    MODEL and --data: where they lie now, if not where the report says. Exit code 5 names the first difference.
    """
    quiet_libraries()
    from rnn2bin import reproduce as again

    with progress_bar(json_out) as progress:
        found = again.reproduce(report, model=model, given=data or None, progress=progress)
    as_json(found) if json_out else click.echo(again.render(found))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help="Inputs, as for convert; labels are not read.")
@click.option("--backend", help="native or torch: which runtime runs it (default: native where it was built).")
@click.option("--out", "target", type=click.Path(path_type=Path), help="Write outputs to this .npz (default: a summary on stdout).")
@json_option
def run(out: Path, data: str, backend: str | None, target: Path | None, json_out: bool) -> None:
    """Run a packed directory OUT over DATA."""
    quiet_libraries()
    from rnn2bin import runtime
    from rnn2bin.runtime import files

    summary = files.run_file(runtime.load(out, backend=backend), Path(data), target)
    as_json(summary) if json_out else click.echo("\n".join(f"{name}: {value}" for name, value in summary.items()))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["onnx", "torch"]), help="An ONNX graph, or a state dict for nn.LSTM and nn.GRU.")
@click.option("--out", "target", type=click.Path(path_type=Path), help="File to write (default: OUT.onnx or OUT.pt here).")
@json_option
def export(out: Path, to: str, target: Path | None, json_out: bool) -> None:
    """Write a packed directory OUT as a file that onnxruntime or plain PyTorch runs."""
    quiet_libraries()
    from rnn2bin.export import export as write

    written = write(out, to=to, out=target)
    as_json(written) if json_out else click.echo("\n".join([f"{written['file']}: {written['bytes']} bytes", *written["meaning"]]))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="DATA", help="Inputs to run on, as for run; without them random ones.")
@click.option("--against", default="torch,ort,openvino", show_default=True, help="Rivals, of those that are installed; '' for none.")
@click.option("--save", is_flag=True, help="Add the figures to OUT's report.json, report.html and model card.")
@json_option
def bench(out: Path, data: Path | None, against: str, save: bool, json_out: bool) -> None:
    """Time a step of OUT on the native runtime, one core, against other runtimes on the float network of its shape."""
    quiet_libraries()
    from rnn2bin import bench as benchmark
    from rnn2bin import packed
    from rnn2bin.bench import rivals
    from rnn2bin.spec import from_dict

    names = tuple(name for name in against.split(",") if name)
    if unknown := [name for name in names if name not in rivals.NAMES]:
        raise click.UsageError(f"--against: unknown {', '.join(unknown)}; choose of {', '.join(rivals.NAMES)}")
    config = packed.read_config(out)
    spec = from_dict(config.get("spec") or {})
    inputs, sequence = benchmark.inputs_from(data, spec, packed.vocabulary(config)) if data else (None, None)
    if save:
        from rnn2bin.evaluation import stored

        stored.read(out)  # before the minutes that measuring takes
    found = benchmark.bench(out, inputs, benchmark.Settings(against=names, sequence=sequence))
    if save:
        stored.add(out, speed=found)
    as_json(found) if json_out else click.echo(benchmark.render(found))


@main.command()
@click.option("--bits", type=click.IntRange(1), default=8, show_default=True, help="Bits of the layer; up to 12 are enumerated.")
@click.option("--loss", type=click.Choice(["linear", "multilinear", "quadratic", "network"]), default="network", show_default=True,
              help="What the bits are for: how much of it a straight-through gradient can see.")  # fmt: skip
@click.option("--examples", type=click.IntRange(1), default=4, show_default=True, help="Examples in a batch.")
@click.option("--samples", type=click.IntRange(2), default=10_000, show_default=True, help="Draws for each estimator.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Of the Gumbel family.")
@click.option("--slope", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Multiplies pre-activations.")
@click.option("--estimator", "names", multiple=True, metavar="NAME", help="One of those in the table; may be given often (default: all).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of problem and draws.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw bias against spread into this .svg.")
@json_option
def gradients(bits: int, loss: str, examples: int, samples: int, temperature: float, slope: float, names: tuple[str, ...], seed: int,
              plot: Path | None, json_out: bool) -> None:  # fmt: skip
    """Compare gradient estimators with the exact gradient of a layer of random bits: bias, variance, direction (docs/estimators.md)."""
    from rnn2bin import diagnostics

    given = diagnostics.problem(bits, loss=loss, examples=examples, slope=slope, seed=seed)  # type: ignore[arg-type]
    found = diagnostics.compare(given, names=names, samples=samples, temperature=temperature, seed=seed)
    if plot:
        diagnostics.write_plot(found, plot)
    as_json(diagnostics.as_dicts(found)) if json_out else click.echo(diagnostics.render(found))


@main.command()
@click.argument("one", metavar="A", type=click.Path(path_type=Path))
@click.argument("other", metavar="B", type=click.Path(path_type=Path))
@click.option("--out", "target", type=click.Path(path_type=Path), metavar="F.html", help="Write the comparison as one HTML page too.")
@json_option
def compare(one: Path, other: Path, target: Path | None, json_out: bool) -> None:
    """Two reports side by side: A and B are packed directories, or their report.json. Other tasks or metrics are refused."""
    from rnn2bin.evaluation import html
    from rnn2bin.evaluation.comparing import compare as beside

    found = beside(one, other)
    if target is not None:
        from rnn2bin import storage

        with storage.failures(target, "choose another --out"):
            storage.write_synced(target, html.render_comparison(found))
    as_json(found) if json_out else click.echo(html.render_comparison_table(found))


@main.group()
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


@main.group(invoke_without_command=True)
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


@main.command()
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


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and recipes in SHELL.

    \b
    bash: rnn2bin completion bash > ~/.local/share/bash-completion/completions/rnn2bin
    zsh:  rnn2bin completion zsh > a folder of $fpath, as _rnn2bin
    fish: rnn2bin completion fish > ~/.config/fish/completions/rnn2bin.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "rnn2bin", "_RNN2BIN_COMPLETE").source())


@main.command()
@json_option
def doctor(json_out: bool) -> None:
    """Versions, CPU, and a tiny real conversion in under a minute."""
    quiet_libraries()
    from rnn2bin import doctor as check

    found = check.examine()
    as_json(found) if json_out else click.echo(check.render(found))
    if not found["conversion"]["ok"]:
        raise SystemExit(1)


def quiet_libraries() -> None:
    """No advice, bars or telemetry of the libraries between our own lines."""
    import os
    import warnings

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    ours = logging.getLogger("rnn2bin")
    if not ours.handlers:
        ours.addHandler(_echo_handler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _echo_handler() -> logging.Handler:
    """Our own warnings, a line each on what is stderr at that moment."""
    handler = logging.Handler()
    handler.emit = lambda record: click.echo(f"rnn2bin: {record.getMessage()}", err=True)  # type: ignore[method-assign]
    return handler


@contextmanager
def progress_bar(json_out: bool):
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


def _json_line(now: dict[str, Any]) -> None:
    click.echo(json.dumps(now), err=True)


def _trial_line(now: dict[str, Any]) -> None:
    """A finished trial of a search."""
    figures = "" if now["drop"] is None else f"  drop {100 * now['drop']:.2f}%  density {now['density']:.3f}"
    stopped = f"  {now['stopped']}" if now["stopped"] else ""
    took = f"  {now['seconds']:.0f} s" if now["seconds"] is not None else ""
    click.echo(f"trial {now['number']}: {now['state']}{figures}{stopped}{took}  ({now['finished']} of {now['trials']})", err=True)


def _json_report(now: dict[str, Any]) -> None:
    """Every hundredth of the way, and the last step, one JSON document a line."""
    if now["step"] % max(1, now["steps"] // 100) == 0 or now["step"] == now["steps"]:
        click.echo(json.dumps(now), err=True)


def _plain_report() -> Callable[[dict[str, Any]], None]:
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
def _rich_bar():
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
