"""Tables and plot of docs/results.json, whose rows scripts/results.py makes. Nothing is computed here that a row does not say."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BEGIN, END = "<!-- from docs/results.json: scripts/results.py --table -->", "<!-- end -->"
NONE = "–"
SETTINGS = (("none", "learned"), ("0.25", "learned"), ("0.10", "learned"), ("none", "strict"), ("0.25", "strict"), ("0.10", "strict"))
# Okabe and Ito's colours, told apart by the colour-blind too; markers tell the rest.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
MARKERS = "osD^vP*XhpH"


def newest(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The last row of each case and setting, in the order of `names` and SETTINGS: a row made again replaces the one before."""
    found = {(row["case"], row["budget"], row["levels"]): row for row in rows}
    return [found[name, *setting] for name in names for setting in SETTINGS if (name, *setting) in found]


# ---- cells of a table ----------------------------------------------------------------------------------------------------------


def setting(row: Row) -> str:
    budget = "no budget" if row["budget"] == "none" else f"density {row['budget']}"
    return budget if row["levels"] == "learned" else f"{budget}, strict"


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def drop(row: Row) -> str:
    (low, high), value = row["drop"]["ci95"], row["drop"]["value"]
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def call(row: Row, tell: Callable[[Row], str]) -> str:
    """What there is of both calls: 100 steps, one step."""
    return " / ".join(tell(row["bench"][name]) for name in ("sequence", "stream") if name in row["bench"]) if row["bench"] else NONE


def speed(row: Row) -> str:
    return call(row, lambda one: f"{one['us_per_step']:.1f}")


def rival(row: Row) -> str:
    return call(row, lambda one: f"{one['best']['ratio']:.2f} {one['best']['rival']}" if one["best"] else NONE)


def trained(row: Row) -> str:
    seconds = row["seconds"]
    minutes = f"{seconds['student'] / 60:.1f} of {seconds['all'] / 60:.1f} min"
    core = f" ({seconds['processor'] / 60:.1f} of a core)" if "processor" in seconds else ""
    return f"{row['steps']:,} of {row['batch_size']}, {minutes}{core}"


def control(row: Row, name: str) -> str:
    return number(row["controls"].get(name))


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("gates", setting),
    ("float", lambda row: number(row["teacher"])),
    ("plain cut", lambda row: control(row, "threshold_only")),
    ("binary", lambda row: f"**{row['binary']:.4f}**"),
    ("drop (95% interval)", drop),
    ("relative", lambda row: percent(row["drop"]["relative"], 2)),
    ("float, same compute", lambda row: control(row, "float_same_compute")),
    ("read", lambda row: percent(row["density"]["read"])),
    ("µs a step", speed),
    ("best rival / ours", rival),
    ("packed", lambda row: f"{row['size']['packed_bytes'] / 1e6:.2f} of {row['size']['source_bytes'] / 1e6:.2f} MB"),
    ("steps, student's of all minutes", trained),
)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def table(rows: Sequence[Row], names: dict[str, str]) -> str:
    """docs/results.md: a line a row, and what the rows say against the aims."""
    chosen = newest(rows, list(names))
    head = ["network", "metric", *(title for title, _ in COLUMNS)]
    lines = [[names[row["case"]], metric(row), *(cell(row) for _, cell in COLUMNS)] for row in chosen]
    return "\n\n".join([markdown(head, lines), aims(chosen)])


def metric(row: Row) -> str:
    return f"{row['metric']['name'].replace('_', ' ')} {'↑' if row['metric']['higher_is_better'] else '↓'}"


def short_table(rows: Sequence[Row], names: dict[str, str]) -> str:
    """The README's: a line a network, with learned levels."""
    chosen = newest(rows, list(names))
    head = ["network", "metric", "float", "plain cut", "same compute, float", "no budget", "density 0.25", "density 0.10"]
    lines = []
    for name in dict.fromkeys(row["case"] for row in chosen):
        own = {row["budget"]: row for row in chosen if row["case"] == name and row["levels"] == "learned"}
        if own:
            first = next(iter(own.values()))
            controls = [control(first, "threshold_only"), control(first, "float_same_compute")]
            lines.append(
                [names[name], metric(first), number(first["teacher"]), *controls, *(brief(own.get(b)) for b in ("none", "0.25", "0.10"))]
            )
    return markdown(head, lines)


def brief(row: Row | None) -> str:
    return NONE if row is None else f"{number(row['binary'])} ({percent(row['density']['read'], 0)} read)"


def aims(rows: Sequence[Row]) -> str:
    """How many rows reach what is aimed at."""
    learned = [row for row in rows if row["levels"] == "learned"]
    free = [row for row in learned if row["budget"] == "none"]
    sparse = [row for row in learned if row["budget"] == "0.10"]
    said = [
        ("No budget: the drop's interval reaches 0", free, lambda row: row["drop"]["ci95"][0] <= 0),
        ("No budget: the relative drop is at most 1%", free, lambda row: row["drop"]["relative"] <= 0.01),
        ("Density 0.10: the relative drop is at most 1%", sparse, lambda row: row["drop"]["relative"] <= 0.01),
        ("Density 0.10: the relative drop is at most 3%", sparse, lambda row: row["drop"]["relative"] <= 0.03),
        ("Density 0.10: at most 0.15 is read on the test part", sparse, lambda row: row["density"]["read"] <= 0.15),
    ]
    return "\n".join(f"- {text}: {counted(of, reached)}" for text, of, reached in said)


def counted(rows: Sequence[Row], reached: Callable[[Row], bool]) -> str:
    kept, missed = ([row["case"] for row in rows if bool(reached(row)) == wanted] for wanted in (True, False))
    return f"{len(kept)} of {len(rows)}" + (f" (not {', '.join(missed)})" if missed else "") + "."


def replace(path: Path, text: str) -> None:
    """Put `text` between the file's two markers; SystemExit where they are not there."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: no lines `{BEGIN}` and `{END}` to write between")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


# ---- plot ----------------------------------------------------------------------------------------------------------------------


def points(rows: Sequence[Row], case: str, levels: str = "learned") -> list[tuple[float, float, float, float]]:
    """(density read, relative drop in percent, its interval's low and high end), by density."""
    found = []
    for row in rows:
        if (row["case"], row["levels"]) == (case, levels):
            scale = 100 / abs(row["teacher"])
            found.append((row["density"]["read"], scale * row["drop"]["value"], *(scale * end for end in row["drop"]["ci95"])))
    return sorted(found)


def plot(rows: Sequence[Row], names: dict[str, str], target: Path) -> None:
    """Loss relative to the teacher against density; filled: learned levels, hollow: strict."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = newest(rows, list(names))
    figure, axis = pyplot.subplots(figsize=(12, 6))
    for k, (case, name) in enumerate(names.items()):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "capsize": 2, "markersize": 7}
        for levels, look in (
            ("learned", {"linestyle": "--" if k >= len(COLOURS) else "-"}),
            ("strict", {"linestyle": "none", "mfc": "white"}),
        ):
            if found := points(chosen, case, levels):
                x, y, low, high = (list(column) for column in zip(*found, strict=True))
                ends = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
                axis.errorbar(
                    x, y, [[max(0.0, v) for v in end] for end in ends], label=name if levels == "learned" else None, **style, **look
                )
    axis.set(xscale="log", xlabel="share of the layers' weights read at a step (log)", ylabel="loss relative to the float network, %")
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_yticks(ticks := (-1, 0, 0.5, 1, 3, 10, 30, 100), [f"{value:g}" for value in ticks])
    axis.set_xticks(ticks := (0.1, 0.15, 0.25, 0.5, 0.75, 1), [f"{value:g}" for value in ticks])
    axis.minorticks_off()
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axis.set_title("Binary gates: what is lost against what is read (hollow: strict levels; bars: 95% intervals)", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
