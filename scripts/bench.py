"""The curves of docs/benchmarks.md: networks with random weights whose gates are set to a density, two layers, token input, batch 1.

    pip install 'rnn2bin[bench]'
    python scripts/bench.py --out bench.json --plot docs/benchmarks.png
    python scripts/bench.py --sizes 256 --densities 0.1 1.0 --blocks 7 --out -

Protocol: rnn2bin/bench. Real networks: rnn2bin bench OUT --data DATA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rnn2bin import bench, pack
from rnn2bin.cells.network import Network
from rnn2bin.spec import EmbeddingSpec, LayerSpec, RnnSpec, SectionSpec

VOCABULARY = 64


def rate_for(cell: str, density: float) -> float:
    """The open rate of o and i (LSTM), of updates and resets (GRU, gates by changed units), at which a step asks for that density."""
    share = (lambda p: p * (3 + p) / 4) if cell == "lstm" else (lambda p: p * (2 + p) / 3)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < density else (low, middle)
    return high


@torch.no_grad()
def network_of(
    cell: str, hidden: int, density: float, *, layers: int = 2, tokens: bool = True, seed: int = 0, weights: str = "fp16"
) -> Network:
    """Uniform weights, on eight-bit grids where they are int8; each unit's gate biases moved until it opens as `density` asks for."""
    stack = tuple(LayerSpec(cell, hidden, hidden) for _ in range(layers))
    spec = RnnSpec({"main": SectionSpec(stack, EmbeddingSpec(VOCABULARY, hidden) if tokens else None)})
    network = Network(spec, {name: (True,) * len(y.kind.gates) for name, y in spec.cell_names()}, levels="learned")
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if ".levels." in name:
            p.fill_(0.3 if name.endswith("lo") else 0.95)
        elif name.endswith("embedding.weight"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        elif p.ndim == 2:
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * (3 / p.shape[1]) ** 0.5)
        elif name.endswith("gates.bias"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    if weights == "int8":
        network.round_weights()
        network.load_state_dict(network.shipped())
    rate = rate_for(cell, density)
    wanted = {"i": rate, "f": 0.7, "o": rate, "r": rate, "z": 1 - rate}
    x = torch.randint(VOCABULARY, (40, 4), generator=generator) if tokens else torch.randn(40, 4, hidden, generator=generator)
    for _ in range(6):
        pres = network(x).pre
        for one, pre in zip(network.cells().values(), pres, strict=True):
            for k, gate in enumerate(one.layer.kind.gate_names):
                # unit by unit: one that never opens would leave its column zero for ever
                decided = pre[8:, :, k].flatten(0, 1).sort(0).values
                one.part("gates").bias.view(-1, hidden)[k] -= decided[int((1 - min(wanted[gate], 0.999)) * (len(decided) - 1))]
    return network.half().float()


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    settings = bench.Settings(against=tuple(options.against), blocks=options.blocks, steps=options.steps, clock=options.clock)
    found = []
    for cell in options.cells:
        for hidden in options.sizes:
            for density in options.densities:
                with tempfile.TemporaryDirectory() as folder, bench.one_core():
                    network = network_of(cell, hidden, density, weights=options.weights)
                    pack.write_model(network, Path(folder), provenance={}, task={"name": "match"})
                    for compute, batch in itertools.product(options.compute, options.batches):
                        new = [
                            {"asked_density": density, **row} for row in bench.rows_of(Path(folder), compute, None, settings, batch=batch)
                        ]
                        found += new
                        print(
                            bench.render({"machine": {"cpu": "", "isa": "", "read_gb_per_s": ""}, "rows": new}).split("\n", 1)[1],
                            file=sys.stderr,
                        )
    return found


def break_even(found: list[dict[str, Any]]) -> list[str]:
    """For each network, call and rival the density at which times are equal: between the two measured densities where the ratio passes 1,
    straight in the logarithms."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(
            (row["cell"], row["hidden_size"], row["call"], row["batch"], row.get("weights", "fp16"), row["compute"]), []
        ).append(row)
    lines = []
    for key, rows_ in groups.items():
        rows_ = sorted(rows_, key=lambda row: row["density"])
        for rival in rows_[0]["rivals"]:
            points = [(math.log(row["density"]), math.log(row["rivals"][rival]["ratio"])) for row in rows_]
            lines.append(f"{' '.join(map(str, key))} against {rival}: {_crossing(points)}")
    return lines


def _crossing(points: list[tuple[float, float]]) -> str:
    if points[-1][1] > 0:
        return f"ahead up to a density of {math.exp(points[-1][0]):.2f}, the largest tried"
    if points[0][1] < 0:
        return f"behind at a density of {math.exp(points[0][0]):.2f}, the smallest tried"
    (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(points) if a[1] >= 0 > b[1])
    return f"equal at a density of {math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)):.2f}"


def plot(found: list[dict[str, Any]], target: Path) -> None:
    """Time against density for each size, and against size at each density; sequence calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls = [row for row in found if row["call"] == "sequence"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, by, other in ((axes[0], "density", "hidden_size"), (axes[1], "hidden_size", "asked_density")):
        groups: dict[tuple[str, str, str, Any], list[tuple[float, float]]] = {}
        for row in calls:
            key = (row["cell"], row.get("weights", "fp16"), row["compute"], row[other])
            groups.setdefault(key, []).append((row[by], row["us_per_step"]))
        colours = {value: f"C{k}" for k, value in enumerate(sorted({key[-1] for key in groups}))}
        for (cell, weights, compute, value), points in sorted(groups.items()):
            name = f"{cell.upper()} {weights} {compute}, {other.replace('_', ' ')} {value}"
            axis.plot(*zip(*sorted(points), strict=True), "--s" if cell == "gru" else "-o", color=colours[value], label=name)
        axis.set(xscale="log", yscale="log", xlabel=by.replace("_", " "), ylabel="µs a step")
        ticks = sorted({row["hidden_size"] for row in calls}) if by == "hidden_size" else (0.05, 0.1, 0.25, 0.5, 1)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.05, 0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--weights", choices=("fp16", "int8"), default="fp16")
    parser.add_argument("--compute", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--against", nargs="*", default=["torch", "ort", "openvino"])
    parser.add_argument("--blocks", type=int, default=bench.BLOCKS)
    parser.add_argument("--steps", type=int, default=bench.STEPS)
    parser.add_argument("--clock", choices=tuple(bench.CLOCKS), default="wall")
    parser.add_argument("--out", default="-", help="JSON file, or - for standard output")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--of", nargs="+", type=Path, help="measure nothing: plot and compare what --out wrote before")
    options = parser.parse_args()
    if options.of:
        found = [row for file in options.of for row in json.loads(file.read_text())["rows"]]
        print("\n".join(break_even(found)))
        return plot(found, options.plot) if options.plot else None
    found = rows(options)
    document = json.dumps({"machine": bench.machine(), "clock": options.clock, "rows": found}, indent=2) + "\n"
    sys.stdout.write(document) if options.out == "-" else Path(options.out).write_text(document)
    for line in break_even(found):
        print(line, file=sys.stderr)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
