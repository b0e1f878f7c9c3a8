"""Speed of gated training: forward and backward of one layer beside fused nn.LSTM and nn.GRU, or, of cells that nn has not, beside the
oracle's walk through autograd (docs/training-benchmarks.md).

    python scripts/bench_training.py --out training.json
    python scripts/bench_training.py --cells pseudo gf_lstm --depth 3 --copies 1 --sizes 128 --batches 32
    python scripts/bench_training.py --quick
    python scripts/bench_training.py --threads 2 --cores 0 1

Protocol: rnn2bin/bench. One iteration is forward, a loss on h, backward, and the gradients of input and weights.
On a machine that runs other jobs `--clock cpu` counts the processor's time (one thread only).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rnn2bin import bench, machine
from rnn2bin.cells.network import output_of, walk, zero_state
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import native, window
from rnn2bin.gates.estimators import Discretize
from rnn2bin.kinds import CELLS
from rnn2bin.spec import LayerSpec

MODES = {
    "straight-through": Discretize("straight-through", slope=2.0, backward="sigmoid"),
    "gumbel": Discretize("gumbel", temperature=0.7, slope=2.0, noise=0.2),
}
FUSED, LOW, ORACLE = "nn float32", "nn bfloat16", "step by step"


def fused(cell: str, hidden: int, x: torch.Tensor, weights: torch.Tensor, *, low: bool) -> Callable[[], int]:
    """Of a cell of `cells/memory.py` nn.LSTM, which has matrices of the same sizes."""
    layer = (nn.GRU if cell == "gru" else nn.LSTM)(hidden, hidden)

    def iteration() -> int:
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            h = layer(x)[0]
        (h.float() * weights).sum().backward()
        return x.shape[0] * x.shape[1]

    return iteration


def gated(
    cell: str, depth: int, x: torch.Tensor, weights: torch.Tensor, *, copies: int, precision: str, mode: Discretize
) -> Callable[[], int]:
    """Learned levels, every gate binary, weights as nn.LSTM starts with. Precision "step by step" is the oracle's walk."""
    hidden = x.shape[2]
    layer = LayerSpec(cell, hidden, hidden, copies=copies, depth=depth if CELLS[cell].deep else 1)
    one = Cell(layer, (True,) * len(layer.kind.gates), levels="learned")
    with torch.no_grad():
        for name, p in one.named_parameters():
            low, high = (0.0, 0.2) if name.endswith("lo") else (0.8, 1.0) if name.endswith("hi") else (-(hidden**-0.5), hidden**-0.5)
            p.uniform_(low, high)
    state = zero_state(layer, x.shape[1], x)

    def iteration() -> int:
        one.zero_grad()
        x.grad = None
        trace = walk(one, x, state, mode) if precision == ORACLE else window.run_cell(one, x, state, mode, precision=precision)
        (output_of(layer, trace.states[0]) * weights).sum().backward()
        return x.shape[0] * x.shape[1]

    return iteration


def contenders(cell: str, hidden: int, batch: int, options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    x, weights = torch.randn(options.steps, batch, hidden, requires_grad=True), torch.randn(options.steps, batch, hidden)
    found, in_nn = {}, cell in ("lstm", "gru")
    if in_nn or CELLS[cell].family == "memory":
        found[FUSED] = fused(cell, hidden, x, weights, low=False)
    if in_nn:
        low = fused(cell, hidden, x, weights, low=True)
        try:
            low()
            found[LOW] = low
        except RuntimeError as error:  # this build of torch does not train it
            print(f"{LOW}: {error}", file=sys.stderr)
    precisions = ["float32", *(["bfloat16"] if native.has_bfloat16() else [])] if in_nn else [ORACLE, "float32"]
    for copies in options.copies:
        for precision in precisions:
            for name in options.modes:
                given = {"copies": copies, "precision": precision, "mode": MODES[name]}
                found[f"{copies} {precision} {name}"] = gated(cell, options.depth, x, weights, **given)
    return found


def rivals(name: str, times: Mapping[str, Any]) -> list[str]:
    """What a contender is compared with: nn where it has the cell, and the same step by step where that runs."""
    found = [rival for rival in (FUSED, LOW) if rival in times]
    stepwise = name.replace("float32", ORACLE)
    return [*found, stepwise] if stepwise in times and stepwise != name else found


def memory(iteration: Callable[[], int]) -> float | None:
    """Bytes a token by which an iteration raises the process's memory at its peak; Linux only."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    read = lambda field: int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]) * 1024
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts again from what is held now
    before = read("VmRSS")
    tokens = iteration()
    return (read("VmHWM") - before) / tokens


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    settings = bench.Settings(blocks=options.blocks, steps=1, seed=options.seed)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    found = []
    for cell in options.cells:
        for hidden in options.sizes:
            for batch in options.batches:
                torch.manual_seed(options.seed)
                every = contenders(cell, hidden, batch, options)
                times = bench.interleaved(every, settings, clock=clock)
                new = []
                for name, mine in times.items():
                    against = {rival: bench.against(mine, times[rival], options.seed) for rival in rivals(name, times)}
                    shape = {
                        "cell": cell,
                        "depth": options.depth if CELLS[cell].deep else 1,
                        "hidden_size": hidden,
                        "batch": batch,
                        "steps": options.steps,
                        "contender": name,
                    }
                    spent = {"us_per_token": float(np.median(mine)), "us_per_token_min": float(mine.min()), "against": against}
                    new.append({**shape, **spent, "peak_bytes_per_token": memory(every[name])})
                print(render(new), file=sys.stderr)
                found += new
    return found


def render(found: list[dict[str, Any]]) -> str:
    lines = []
    for row in found:
        ratios = "  ".join(f"{r['ratio']:5.2f} [{r['ci95'][0]:.2f}, {r['ci95'][1]:.2f}]" for r in row["against"].values())
        used = "-" if row["peak_bytes_per_token"] is None else f"{row['peak_bytes_per_token'] / 1e3:6.1f} kB"
        shape = f"{row['cell']} {row['hidden_size']} x {row['batch']}"
        lines.append(f"{shape:16} {row['contender']:28} {1e6 / row['us_per_token']:9.0f} tokens/s  {ratios}  {used}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=["lstm", "gru"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--copies", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--depth", type=int, default=3, help="layers within a step, of cells that have several")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--steps", type=int, default=64, help="T of the window")
    parser.add_argument("--blocks", type=int, default=bench.BLOCKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", nargs="+", type=int, default=[0], help="to run on")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes, few blocks: minutes")
    parser.add_argument("--out", default="-", help="JSON file, or - for standard output")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu counts all threads' time: give --threads 1")
    if options.quick:
        options.sizes, options.batches, options.blocks = [128, 256], [16, 64], 5
    torch.set_num_threads(options.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options.cores)
    settings = {name: getattr(options, name) for name in ("steps", "blocks", "threads", "cores", "clock", "seed")}
    where = {**machine.versions(), "training_kernels": native.isa(), "load_average": os.getloadavg()[0]}
    document = json.dumps({"machine": where, "settings": settings, "rows": rows(options)}, indent=2) + "\n"
    sys.stdout.write(document) if options.out == "-" else Path(options.out).write_text(document)


if __name__ == "__main__":
    main()
