"""What stands by itself: `gradients`, `completion`, `doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from rnn2bin import libraries
from rnn2bin.cli.options import as_json, json_option


@click.command()
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


@click.command()
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
    click.echo(found(click.get_current_context().find_root().command, {}, "rnn2bin", "_RNN2BIN_COMPLETE").source())


@click.command()
@json_option
def doctor(json_out: bool) -> None:
    """Versions, CPU, and a tiny real conversion in under a minute."""
    libraries.quiet()
    from rnn2bin import doctor as check

    found = check.examine()
    as_json(found) if json_out else click.echo(check.render(found))
    if not found["conversion"]["ok"]:
        raise SystemExit(1)
