"""Binary neurons on MNIST: two convolutions of 29k parameters whose neurons are bits, by straight-through or REINFORCE.

    python scripts/studies/mnist_neurons.py              # one night on two cores
    python scripts/studies/mnist_neurons.py --quick      # a minute

Neurons of the first, the last or both convolutions are 1[pre > 0] (deterministic) or drawn with probability σ(slope·pre) (stochastic).
Straight-through sends back the gradient of σ(slope·pre); REINFORCE credits the bits with (loss − running mean). `annealed`: the slope is
1.005^(epoch−1) of the source, stretched so that it ends at the same 1.64 as there after 100 epochs. Tested with bits, drawn ones where
neurons are stochastic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import mnist
import torch
from common import Column, Numbers, Results, Study, over_examples, points, pyplot, run, save
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin.gates import score
from rnn2bin.gates.estimators import Discretize, Sample, logistic_noise

LAST_SLOPE = 1.005**99
FLOAT = "float"
ROWS = {
    f"{forward}, {how}, {where}, slope {slope}": (forward, how, where, slope)
    for forward, how, where, slope in product(
        ("deterministic", "stochastic"), ("straight-through", "REINFORCE"), ("first", "last", "both"), ("fixed", "annealed")
    )
}
PUBLIC = {  # seed 001, slope as it was best there, % of the full test set
    ("stochastic", "straight-through"): (98.29, 98.31, 97.54),
    ("deterministic", "straight-through"): (98.65, 97.81, 97.57),
    ("stochastic", "REINFORCE"): (97.56, 88.95, 80.68),
    ("deterministic", "REINFORCE"): (97.76, 95.42, 93.40),
}


@dataclass(frozen=True)
class Size:
    epochs: int
    batch_size: int
    train: int
    held_out: int
    seeds: int


SIZES = {"quick": Size(1, 50, 600, 200, 1), "full": Size(30, 50, 4000, 1000, 5)}


class Net(nn.Module):
    """conv 5×5 → 16, pool, neurons, conv 5×5 → 32, pool, neurons, linear: 28,938 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 32, 5, padding=2)])
        self.head = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: Tensor, neurons: list[Neurons | None]) -> Tensor:
        for convolution, neuron in zip(self.convolutions, neurons, strict=True):
            pre = functional.max_pool2d(convolution(x), 2)
            x = torch.relu(pre) if neuron is None else neuron(pre)
        return self.head(x.flatten(1))


@dataclass
class Neurons:
    """A layer's neurons in one call: what they were told, and what was drawn."""

    mode: Discretize
    pre: Tensor | None = None
    bits: Tensor | None = None

    def __call__(self, pre: Tensor) -> Tensor:
        noise = logistic_noise(pre.shape, self.mode, pre) if self.mode.draws else None
        self.pre, self.bits = pre, Sample.apply(pre, noise, self.mode)
        return self.bits


def mode_of(forward: str, how: str, slope: float, generator: torch.Generator) -> Discretize:
    if how == "REINFORCE":
        return Discretize("reinforce", slope=slope, noise=float(forward == "stochastic"), generator=generator)
    name = "stochastic" if forward == "stochastic" else "straight-through"
    return Discretize(name, slope=slope, backward="sigmoid", generator=generator)


def measure(row: str, seed: int, size: Size) -> Numbers:
    forward, how, where, annealed = ROWS.get(row, ("", "", "", ""))
    x, y, test_x, test_y = mnist.images(size.held_out)
    x, y = x[: size.train].view(-1, 1, 28, 28), y[: size.train]
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    binary = {"first": (True, False), "last": (False, True), "both": (True, True)}.get(where, (False, False))
    baselines: list[score.Baseline] = [score.baseline("mean") for _ in binary]
    neurons: list[Neurons | None] = [None, None]

    def told(epoch: int) -> list[Neurons | None]:
        slope = LAST_SLOPE ** (epoch / max(size.epochs - 1, 1)) if annealed == "annealed" else 1.0
        return [Neurons(mode_of(forward, how, slope, generator)) if b else None for b in binary]

    for epoch in range(size.epochs):
        neurons = told(epoch)
        for index in mnist.batches(len(x), size.batch_size, generator):
            losses = functional.cross_entropy(net(x[index], neurons), y[index], reduction="none")
            total = losses.mean()
            for k, neuron in enumerate(neurons):
                if neuron is not None and how == "REINFORCE":
                    assert neuron.pre is not None
                    assert neuron.bits is not None
                    pre, bits = neuron.mode.slope * neuron.pre.flatten(1), neuron.bits.detach().flatten(1)
                    term, baselines[k] = score.reinforce(pre, bits, losses=losses, baseline=baselines[k])
                    total = total + term
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    with torch.no_grad():
        right = [net(part.view(-1, 1, 28, 28), neurons).argmax(1) for part in test_x.split(250)]
        net(test_x[:1].view(-1, 1, 28, 28), neurons)
        seen = (
            neurons[0].bits
            if neurons[0] is not None
            else torch.relu(functional.max_pool2d(net.convolutions[0](test_x[:1].view(-1, 1, 28, 28)), 2))
        )
    assert seen is not None
    correct = (torch.cat(right) == test_y).float()
    numbers: Numbers = {"accuracy": 100 * float(correct.mean()), "accuracy_half": 100 * over_examples(correct)}
    if neurons[0] is not None or neurons[1] is not None:
        numbers["open"] = 100 * float(torch.cat([n.bits.flatten() for n in neurons if n is not None and n.bits is not None]).mean())
    if seed == 0:
        numbers["map"] = [[round(v, 3) for v in line] for line in seen[0].mean(0).tolist()]  # type: ignore[assignment]
    return numbers


def plot(results: Results, path: Path) -> None:
    points(results, path, column="accuracy", label="accuracy on held-out images, %", marks={"float, source": 98.79})


def heat_maps(results: Results, out: Path) -> None:
    """The first layer's neurons over one held-out digit, averaged over channels, of every row."""
    plt = pyplot()
    found = {row: runs["0"]["map"] for row, runs in results.runs.items() if "map" in runs.get("0", {})}
    columns = 5
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 2.4 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (row, values) in zip(axes.flat, found.items(), strict=False):
        axis.imshow(values, cmap="viridis")
        words = row.split(", ")
        axis.set_title(", ".join(words[:2]) + "\n" + ", ".join(words[2:]), fontsize=7)
    save(figure, out / "mnist_neurons_maps.png")


STUDY = Study(
    name="mnist_neurons",
    title="Binary neurons on MNIST",
    columns=(Column("accuracy", "accuracy %", 2), Column("open", "neurons on %", 1), Column("seconds", "s", 0, interval=False)),
    variants=lambda size: [FLOAT, *ROWS] if size != SIZES["quick"] else [FLOAT, *[r for r in ROWS if r.endswith("both, slope annealed")]],
    measure=measure,
    sizes=SIZES,
    plot=plot,
    finish=heat_maps,
)

if __name__ == "__main__":
    run(STUDY)
