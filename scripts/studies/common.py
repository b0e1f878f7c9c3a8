"""What the studies share: runs that are kept as they end, tables with 95% intervals, a plot, and the page they stand in.

A study is a list of variants and a function `measure(variant, seed, size)` -> numbers by name. Every finished run is written to
OUT/NAME.json at once, so that a study that was stopped goes on where it was. The table goes between two marks of OUT/NAME.md; what stands
around them is written by hand and stays.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- table: written by the script -->", "<!-- end of table -->"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a626d")  # Okabe-Ito

Numbers = dict[str, float]


@dataclass(frozen=True)
class Column:
    """A number of each run: its name in the results, its heading, how many digits behind the point, whether its interval is shown."""

    name: str
    heading: str
    digits: int = 2
    interval: bool = True


@dataclass(frozen=True)
class Study:
    """`variants`: rows by name, in the table's order. `sizes`: "quick" and "full", each a frozen dataclass of numbers with `seeds`."""

    name: str
    title: str
    columns: tuple[Column, ...]
    variants: Callable[[Any], Sequence[str]]
    measure: Callable[[str, int, Any], Numbers]
    sizes: Mapping[str, Any]
    plot: Callable[[Results, Path], None]
    finish: Callable[[Results, Path], None] | None = None  # more pictures


@dataclass
class Results:
    """What was measured: row -> seed -> numbers, with the size it was measured at."""

    size: dict[str, Any]
    runs: dict[str, dict[str, Numbers]]
    seconds: float = 0.0

    def values(self, row: str, column: str) -> list[float]:
        return [numbers[column] for numbers in self.runs.get(row, {}).values() if column in numbers]

    def interval(self, row: str, column: str) -> tuple[float, float]:
        """Mean and half of its 95% interval: over seeds, or for one run over held-out examples where `measure` gave COLUMN_half."""
        values, halves = self.values(row, column), self.values(row, f"{column}_half")
        return (values[0], halves[0]) if len(values) == len(halves) == 1 else interval(values)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval (Student's t over seeds); NaN where one run cannot tell."""
    if not values:
        return float("nan"), float("nan")
    if len(values) == 1:
        return values[0], float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def shown(results: Results, row: str, column: Column) -> str:
    """`1.23 ± 0.04`; no interval where nothing tells it."""
    mean, half = results.interval(row, column.name)
    if mean != mean:
        return "–"
    return f"{mean:.{column.digits}f}" + ("" if half != half or not column.interval else f" ± {half:.{column.digits}f}")


def over_examples(values: Any) -> float:
    """Half the 95% interval of the mean of a tensor of examples' values."""
    return 1.96 * float(values.double().std()) / len(values) ** 0.5


def table(study: Study, results: Results) -> str:
    """The results in Markdown."""
    lines = ["| | " + " | ".join(c.heading for c in study.columns) + " | runs |", "|---" * (len(study.columns) + 2) + "|"]
    for row, runs in results.runs.items():
        cells = [shown(results, row, column) for column in study.columns]
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join(lines)


def run(study: Study, argv: Sequence[str] | None = None) -> Results:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=study.title, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute; writes to a temporary folder unless --out is given")
    parser.add_argument("--out", type=Path, help="folder for NAME.json, NAME.md, NAME.png (default: docs/studies)")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="these rows alone")
    parser.add_argument("--table", action="store_true", help="measure nothing: write table and plot of the results that are there")
    size_of = study.sizes["full"]
    for name, value in asdict(size_of).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), help=f"full: {value}")
    args = parser.parse_args(argv)
    chosen = study.sizes["quick" if args.quick else "full"]
    size = type(chosen)(**{name: value if getattr(args, name) is None else getattr(args, name) for name, value in asdict(chosen).items()})
    out = args.out or (Path(tempfile.mkdtemp(prefix="study-")) if args.quick else ROOT / "docs" / "studies")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{study.name}.json"
    results = _begin(path, size)
    if not args.table:
        _measure_all(study, size, results, path, only=args.only)
    study.plot(results, out / f"{study.name}.png")
    if study.finish:
        study.finish(results, out)
    write_page(study, results, out / f"{study.name}.md")
    print(f"written: {out / study.name}.json, .md, .png", file=sys.stderr)
    return results


def _begin(path: Path, size: Any) -> Results:
    if not path.exists():
        return Results(asdict(size), {})
    content = json.loads(path.read_text())
    same = {k: v for k, v in content["size"].items() if k != "seeds"} == {k: v for k, v in asdict(size).items() if k != "seeds"}
    if not same:
        raise SystemExit(f"{path} holds runs of another size ({content['size']}); give these, or another --out")
    return Results(content["size"] | {"seeds": max(asdict(size)["seeds"], content["size"]["seeds"])}, content["runs"], content["seconds"])


def _measure_all(study: Study, size: Any, results: Results, path: Path, *, only: Sequence[str] | None) -> None:
    # Seed by seed, so that a study that is stopped has every row.
    for seed in range(size.seeds):
        for row in study.variants(size):
            if (only and row not in only) or str(seed) in results.runs.setdefault(row, {}):
                continue
            torch.manual_seed(seed)
            began = time.perf_counter()
            numbers = study.measure(row, seed, size)
            took = time.perf_counter() - began
            results.runs[row][str(seed)] = numbers | {"seconds": took}
            results.seconds += took
            results.size["seeds"] = max(results.size["seeds"], seed + 1)
            kept = {"size": results.size, "seconds": results.seconds, "versions": versions(), "runs": results.runs}
            path.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{row:40} seed {seed}  {took:6.1f} s  {numbers}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "rnn2bin": version("rnn2bin"), "processor": processor()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_page(study: Study, results: Results, path: Path) -> None:
    """Writes the table between its marks; a page that is not there begins as nothing but them."""
    size = ", ".join(f"{name} {value}" for name, value in results.size.items())
    made = versions()
    note = f"Size: {size}. {results.seconds / 60:.0f} minutes on the clock, one thread; {', '.join(f'{k} {v}' for k, v in made.items())}."
    parts = [
        BEGIN,
        table(study, results),
        f"± is half a 95% interval: over seeds (Student's t), of a single run over held-out examples. {note}",
    ]
    block = "\n\n".join([*parts, f"![{study.name}]({study.name}.png)", END])
    page = path.read_text(encoding="utf-8") if path.exists() else f"# {study.title}\n\n{BEGIN}{END}\n"
    before, _, rest = page.partition(BEGIN)
    path.write_text(before + block + rest.partition(END)[2], encoding="utf-8")


def points(results: Results, path: Path, *, column: str, label: str, marks: Mapping[str, float] | None = None) -> None:
    """One point a row with its 95% interval; `marks`: vertical lines by name (a public figure, the float network)."""
    plt = pyplot()
    rows = [row for row in results.runs if results.values(row, column)]
    found = [results.interval(row, column) for row in rows]
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(rows) + 1.2))
    spread = [0 if half != half else half for _, half in found]
    axes.errorbar([mean for mean, _ in found], range(len(rows)), xerr=spread, fmt="o", color=COLOURS[0], ecolor="#9aa7b8", capsize=2)
    for n, (name, value) in enumerate((marks or {}).items()):
        axes.axvline(value, linestyle="--", color=COLOURS[1 + n], label=name)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(color="#dfe3e8")
    axes.set_axisbelow(True)
    if marks:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)
