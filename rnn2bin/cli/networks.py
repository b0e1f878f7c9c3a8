"""What looks at networks, packed directories and reports: `inspect`, `eval`, `run`, `export`, `bench`, `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from rnn2bin import libraries
from rnn2bin.cli.options import RECIPE_HELP, as_json, data_option, json_option


@click.command()
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


@click.command("eval")
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@data_option
@json_option
def evaluate(teacher: Path, out: Path, data: tuple[str, ...], json_out: bool) -> None:
    """What binarization cost: TEACHER against its packed directory OUT on held-out data, with a 95% interval."""
    libraries.quiet()
    from rnn2bin.pipeline import evaluate_files

    report = evaluate_files(teacher, out, data=data or None)
    if json_out:
        return as_json(report)
    from rnn2bin.evaluation import html

    click.echo(html.render_table(report))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help="Inputs, as for convert; labels are not read.")
@click.option("--backend", help="native or torch: which runtime runs it (default: native where it was built).")
@click.option("--out", "target", type=click.Path(path_type=Path), help="Write outputs to this .npz (default: a summary on stdout).")
@json_option
def run(out: Path, data: str, backend: str | None, target: Path | None, json_out: bool) -> None:
    """Run a packed directory OUT over DATA."""
    libraries.quiet()
    from rnn2bin import runtime
    from rnn2bin.runtime import files

    summary = files.run_file(runtime.load(out, backend=backend), Path(data), target)
    as_json(summary) if json_out else click.echo("\n".join(f"{name}: {value}" for name, value in summary.items()))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["onnx", "torch"]), help="An ONNX graph, or a state dict for nn.LSTM and nn.GRU.")
@click.option("--out", "target", type=click.Path(path_type=Path), help="File to write (default: OUT.onnx or OUT.pt here).")
@json_option
def export(out: Path, to: str, target: Path | None, json_out: bool) -> None:
    """Write a packed directory OUT as a file that onnxruntime or plain PyTorch runs."""
    libraries.quiet()
    from rnn2bin.export import export as write

    written = write(out, to=to, out=target)
    as_json(written) if json_out else click.echo("\n".join([f"{written['file']}: {written['bytes']} bytes", *written["meaning"]]))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="DATA", help="Inputs to run on, as for run; without them random ones.")
@click.option("--against", default="torch,ort,openvino", show_default=True, help="Rivals, of those that are installed; '' for none.")
@click.option("--save", is_flag=True, help="Add the figures to OUT's report.json, report.html and model card.")
@json_option
def bench(out: Path, data: Path | None, against: str, save: bool, json_out: bool) -> None:
    """Time a step of OUT on the native runtime, one core, against other runtimes on the float network of its shape."""
    libraries.quiet()
    from rnn2bin import bench as benchmark
    from rnn2bin import packed
    from rnn2bin.bench import rivals
    from rnn2bin.spec import from_dict

    names = tuple(name for name in against.split(",") if name)
    if unknown := [name for name in names if name not in rivals.NAMES]:
        raise click.UsageError(f"--against: unknown {', '.join(unknown)}; choose of {', '.join(rivals.NAMES)}")
    config = packed.read_config(out)
    spec = from_dict(config.get("spec") or {})
    inputs = benchmark.Inputs.read(data, spec, packed.vocabulary(config)) if data else None
    if save:
        from rnn2bin.evaluation import stored

        stored.read(out)  # before the minutes that measuring takes
    found = benchmark.bench(out, inputs, benchmark.Settings(against=names))
    if save:
        stored.add(out, speed=found)
    as_json(found) if json_out else click.echo(benchmark.render(found))


@click.command()
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
