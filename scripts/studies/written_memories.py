"""Written memories: the pseudo-LSTM, the LSTM, and the six networks between them, at four learning rates.

    python scripts/studies/written_memories.py           # two hours of one core
    python scripts/studies/written_memories.py --quick   # a minute

The pseudo-LSTM lacks three things that the basic LSTM has: (1) it reads after it writes, (2) its gates read the read-gated state, (3) its
output is read-gated. A row names those that were given to it, so {1, 2, 3} is the basic LSTM. Characters of the King James Bible; float
gates, forget bias 1, Adam, truncation as the window; the loss is nats per window, as at the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import text
import torch
from common import Column, Numbers, Results, Study, points, run
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin.cells.network import Network, State
from rnn2bin.distill.window import run_cell
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.kinds import CELLS
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

VARIANTS = {
    "pseudo-LSTM": "pseudo",
    "{1}": "pseudo_1",
    "{2}": "pseudo_2",
    "{3}": "pseudo_3",
    "{1, 2}": "pseudo_12",
    "{1, 3}": "pseudo_13",
    "{2, 3}": "pseudo_23",
    "{1, 2, 3}, basic LSTM": "pseudo_123",
}
RATES = ("3e-3", "1e-3", "3e-4", "1e-4")
ROWS = {f"{variant}, rate {rate}": (cell, float(rate)) for (variant, cell), rate in product(VARIANTS.items(), RATES)}


@dataclass(frozen=True)
class Size:
    epochs: int
    hidden: int
    batch_size: int
    window: int
    train: int  # characters
    held_out: int
    seeds: int


SIZES = {"quick": Size(1, 16, 10, 10, 1000, 500, 1), "full": Size(4, 128, 30, 30, 100_000, 20_000, 5)}


def network(cell: str, vocabulary: int, size: Size) -> Network:
    if cell not in CELLS:
        raise SystemExit(f"this rnn2bin has no cell {cell}; it has {', '.join(CELLS)}")
    section = SectionSpec((LayerSpec(cell, 64, size.hidden),), EmbeddingSpec(vocabulary, 64), (LinearSpec(size.hidden, vocabulary),))
    made = Network(RnnSpec({"main": section}))
    bound = size.hidden**-0.5
    for name, p in made.named_parameters():
        nn.init.normal_(p, std=0.1) if "embedding" in name else nn.init.uniform_(p, -bound, bound)
        if name.endswith("gates.bias"):
            with torch.no_grad():
                p.view(-1, size.hidden)[CELLS[cell].gate_names.index("f")] = 1.0
    return made


def nats(net: Network, x: Tensor, y: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Mean loss of a window, and the state behind it."""
    out = net(x, state, mode=FLOAT, walk=run_cell, logits=True)
    return functional.cross_entropy(out.y.flatten(0, 1), y.flatten()), out.state


def windows(tokens: Tensor, size: Size) -> list[tuple[Tensor, Tensor]]:
    whole = text.streams(tokens, size.batch_size)
    starts = range(0, len(whole) - size.window - 1, size.window)
    return [(whole[at : at + size.window], whole[at + 1 : at + size.window + 1]) for at in starts]


def measure(row: str, seed: int, size: Size) -> Numbers:
    cell, rate = ROWS[row]
    train, test, vocabulary = text.characters(size.train, size.held_out)
    net = network(cell, vocabulary, size)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    best = math.inf
    for _ in range(size.epochs):
        state: State | None = None
        for x, y in windows(train, size):
            loss, state = nats(net, x, y, state)
            state = [[tuple(t.detach() for t in direction) for direction in layer] for layer in state]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
        with torch.no_grad():
            state, losses = None, []
            for x, y in windows(test, size):
                loss, state = nats(net, x, y, state)
                losses.append(float(loss))
        best = min(best, sum(losses) / len(losses))
    return {"sequence": best * size.window, "bits": best / math.log(2)}


def plot(results: Results, path: Path) -> None:
    points(results, path, column="sequence", label="nats per window on held-out text, best epoch")


STUDY = Study(
    name="written_memories",
    title="Written memories: eight LSTMs",
    columns=(Column("sequence", "nats per window", 2), Column("bits", "bits per character", 3), Column("seconds", "s", 0, interval=False)),
    variants=lambda size: list(ROWS) if size != SIZES["quick"] else [row for row in ROWS if row.endswith("1e-3")],
    measure=measure,
    sizes=SIZES,
    plot=plot,
)

if __name__ == "__main__":
    run(STUDY)
