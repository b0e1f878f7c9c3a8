"""Gated feedback: a stack whose layers all read all layers of the step before, through global gates, against a plain stack of equal size.

    python scripts/studies/gated_feedback.py             # two hours of one core
    python scripts/studies/gated_feedback.py --quick     # a minute

Characters of the King James Bible. The plain stack is as wide as gives it the same number of weights. `binary global gates`: the first half
of the steps with float gates, the second with the global gates as bits (straight-through, σ behind them) and all others float; a closed one
leaves a whole layer-to-layer matrix unread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import text
import torch
from common import Column, Numbers, Results, Study, points, run
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin import student
from rnn2bin.cells.network import Network, Output, State
from rnn2bin.distill.window import run_cell
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.kinds import CELLS
from rnn2bin.recipe import parse
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

EMBEDDING = 64
KINDS = {"RNN": ("rnn", "gf_tanh", []), "GRU": ("gru_reset_before", "gf_gru", ["r", "z"]), "LSTM": ("lstm", "gf_lstm", ["i", "f", "o"])}
ROWS = {
    row: (kind, how)
    for kind in KINDS
    for row, how in ((f"stacked {kind}", "stacked"), (f"GF-{kind}", "float"), (f"GF-{kind}, binary global gates", "binary"))
}
BITS = Discretize("straight-through", backward="sigmoid")


@dataclass(frozen=True)
class Size:
    steps: int
    depth: int
    hidden: int
    batch_size: int
    window: int
    train: int  # characters
    held_out: int
    seeds: int


SIZES = {"quick": Size(6, 2, 16, 8, 10, 2000, 400, 1), "full": Size(2000, 3, 100, 32, 50, 1_000_000, 40_000, 3)}


def feedback(cell: str, vocabulary: int, size: Size) -> Network:
    if cell not in CELLS:
        raise SystemExit(f"this rnn2bin has no cell {cell}; it has {', '.join(CELLS)}")
    return network((LayerSpec(cell, EMBEDDING, size.hidden, depth=size.depth),), vocabulary)  # type: ignore[call-arg]


def stacked(cell: str, vocabulary: int, size: Size, *, weights: int) -> Network:
    """The stack whose number of weights is nearest to `weights`."""
    if cell not in CELLS:
        raise SystemExit(f"this rnn2bin has no cell {cell}; it has {', '.join(CELLS)}")
    count = lambda layers: sum(math.prod(shape) for layer in layers for shape in layer.tensors().values())
    of = lambda hidden: tuple(LayerSpec(cell, EMBEDDING if k == 0 else hidden, hidden) for k in range(size.depth))
    best = min(range(size.hidden // 2, 3 * size.hidden), key=lambda hidden: abs(count(of(hidden)) - weights))
    return network(of(best), vocabulary)


def network(layers: tuple[LayerSpec, ...], vocabulary: int) -> Network:
    head = (LinearSpec(layers[-1].output_size, vocabulary),)
    made = Network(RnnSpec({"main": SectionSpec(layers, EmbeddingSpec(vocabulary, EMBEDDING), head)}))
    bound = layers[0].hidden_size ** -0.5
    for name, p in made.named_parameters():
        nn.init.normal_(p, std=0.1) if "embedding" in name else nn.init.uniform_(p, -bound, bound)
    return made


def in_layers(net: Network) -> int:
    return sum(p.numel() for cell in net.cells().values() for p in cell.parameters())


def nats(net: Network, x: Tensor, y: Tensor, state: State | None, mode: Discretize) -> tuple[Tensor, Output]:
    out = net(x, state, mode=mode, walk=run_cell, logits=True)
    return functional.cross_entropy(out.y.flatten(0, 1), y.flatten()), out


def windows(tokens: Tensor, size: Size) -> list[tuple[Tensor, Tensor]]:
    whole = text.streams(tokens, size.batch_size)
    starts = range(0, len(whole) - size.window - 1, size.window)
    return [(whole[at : at + size.window], whole[at + 1 : at + size.window + 1]) for at in starts]


def train(net: Network, found: list[tuple[Tensor, Tensor]], *, steps: int, mode: Discretize) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    state: State | None = None
    for step in range(steps):
        x, y = found[step % len(found)]
        loss, out = nats(net, x, y, state if step % len(found) else None, mode)
        state = [[tuple(t.detach() for t in direction) for direction in layer] for layer in out.state]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def measure(row: str, seed: int, size: Size) -> Numbers:
    kind, how = ROWS[row]
    plain, fed, units = KINDS[kind]
    tokens, test, vocabulary = text.characters(size.train, size.held_out)
    found = windows(tokens, size)
    net = feedback(fed, vocabulary, size)
    if how == "stacked":
        net = stacked(plain, vocabulary, size, weights=in_layers(net))
    half = size.steps // 2
    train(net, found, steps=half, mode=FLOAT)
    if how == "binary":
        net = student.student(net, parse({"gates": {"soft": units, "levels": "strict"}}).gates)
    train(net, found, steps=size.steps - half, mode=BITS if how == "binary" else FLOAT)
    mode = BINARY if how == "binary" else FLOAT
    losses, opened, state = [], [], None
    with torch.no_grad():
        for x, y in windows(test, size):
            loss, out = nats(net, x, y, state, mode)
            state = out.state
            losses.append(float(loss))
            if how == "binary":
                names = [n for n, name in enumerate(net.spec.sections["main"].layers[0].kind.gate_names) if name.startswith("g")]
                opened.append(float((out.pre[0][:, :, names, 0] > 0).float().mean()))
    numbers: Numbers = {"bits": sum(losses) / len(losses) / math.log(2), "weights": in_layers(net) / 1000}
    if opened:
        numbers["skipped"] = 100 * (1 - sum(opened) / len(opened))
    return numbers


def plot(results: Results, path: Path) -> None:
    points(results, path, column="bits", label="bits per character on held-out text")


STUDY = Study(
    name="gated_feedback",
    title="Gated feedback against plain stacks",
    columns=(
        Column("bits", "bits per character", 3),
        Column("skipped", "matrices skipped %", 1),
        Column("weights", "thousand weights", 1, interval=False),
        Column("seconds", "s", 0, interval=False),
    ),
    variants=lambda size: list(ROWS),
    measure=measure,
    sizes=SIZES,
    plot=plot,
)

if __name__ == "__main__":
    run(STUDY)
