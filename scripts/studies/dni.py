"""DNI: a feed-forward net on MNIST trained by synthetic gradients alone, against backpropagation.

    python scripts/studies/dni.py                        # one night on two cores
    python scripts/studies/dni.py --quick                # a minute

784 → 256 → 256 → 256 → 10. Every layer but the last is trained by what a subnet guesses from its output (`DNI`), and from its output and
the label (`conditional DNI`); each subnet is fitted to the gradient that the next layer hands down, itself made of guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mnist
import torch
from common import Column, Numbers, Results, Study, over_examples, points, run
from torch import nn
from torch.nn import functional

from rnn2bin.gates import synthetic

ROWS = ("backpropagation", "DNI", "conditional DNI", "first layers frozen (control)")


@dataclass(frozen=True)
class Size:
    epochs: int
    batch_size: int
    hidden: int
    train: int
    held_out: int
    seeds: int


SIZES = {"quick": Size(2, 50, 64, 600, 200, 1), "full": Size(200, 50, 256, 4000, 1000, 5)}


def measure(row: str, seed: int, size: Size) -> Numbers:
    x, y, test_x, test_y = mnist.images(size.held_out)
    x, y = x[: size.train], y[: size.train]
    generator = torch.Generator().manual_seed(seed)
    wide = [784, size.hidden, size.hidden, size.hidden]
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(wide)]
    net = nn.Sequential(*layers, nn.Linear(size.hidden, 10))
    widths = {"sample": size.hidden} | ({"context": 10} if row == "conditional DNI" else {})
    guessers = nn.ModuleList([synthetic.Subnet(size.hidden, widths=widths, hidden=128) for _ in layers])
    parameters = list(net[-1].parameters()) if row.startswith("first") else list(net.parameters())
    optimizers = [torch.optim.Adam(parameters, lr=3e-4), torch.optim.Adam(guessers.parameters(), lr=3e-4)]
    missed = 0.0
    for _ in range(size.epochs):
        for index in mnist.batches(len(x), size.batch_size, generator):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of = lambda out, index=index: functional.cross_entropy(out, y[index])
            if "DNI" in row:
                label = functional.one_hot(y[index], 10).float() if row == "conditional DNI" else None
                _, error = synthetic.dni_step(list(net), list(guessers), x[index], loss_of, context=label)
                missed = float(error)
            else:
                loss_of(net(x[index])).backward()
            for optimizer in optimizers:
                optimizer.step()
    net.eval()
    with torch.no_grad():
        wrong = (net(test_x).argmax(1) != test_y).float()
        train_loss = float(functional.cross_entropy(net(x), y))
    return {"error": 100 * float(wrong.mean()), "error_half": 100 * over_examples(wrong), "train_loss": train_loss, "missed": missed}


def plot(results: Results, path: Path) -> None:
    points(results, path, column="error", label="error on held-out images, %", marks={"DNI, source": 2.4, "DNI, paper": 2.2})


STUDY = Study(
    name="dni",
    title="DNI: a feed-forward net trained by synthetic gradients",
    columns=(Column("error", "error %", 2), Column("train_loss", "training loss, nats", 4), Column("seconds", "s", 0, interval=False)),
    variants=lambda size: ROWS,
    measure=measure,
    sizes=SIZES,
    plot=plot,
)

if __name__ == "__main__":
    run(STUDY)
