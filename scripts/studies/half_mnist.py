"""Half-and-half MNIST: the lower half of an image from the upper half, through a bottleneck that is Gaussian or of bits.

    python scripts/studies/half_mnist.py                 # one night on two cores
    python scripts/studies/half_mnist.py --quick         # a minute

392 → 200 → bottleneck of U → 200 → 392; the loss is the negative log-likelihood of the lower half's pixels (as probabilities) in nats.
`loss`: one drawn bottleneck an image; `bound`: −log of the mean likelihood of 20; `hard`: bits cut at 0 instead of drawn. The row of the
soft gate is the control: its `loss` is that of a network that has no bits, its `hard` what is left with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import mnist
import torch
from common import Column, Numbers, Results, Study, over_examples, points, run
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin.gates import score, synthetic
from rnn2bin.gates.estimators import Discretize, Sample, logistic_noise

PASSED: dict[str, tuple[Discretize, bool]] = {  # estimator, whether the temperature or slope anneals
    "soft sigmoid (control)": (Discretize("sigmoid"), False),
    "sharpened sigmoid, τ 0.2 (control)": (Discretize("sigmoid", temperature=0.2), False),
    "straight-through, identity": (Discretize("straight-through", backward="identity"), False),
    "straight-through, sigmoid": (Discretize("straight-through", backward="sigmoid"), False),
    "straight-through, hard-sigmoid": (Discretize("straight-through", backward="hard-sigmoid"), False),
    "straight-through, hard-sigmoid, slope 1 → 5": (Discretize("straight-through", backward="hard-sigmoid"), True),
    "stochastic, identity": (Discretize("stochastic", backward="identity"), False),
    "stochastic, sigmoid": (Discretize("stochastic", backward="sigmoid"), False),
    "stochastic, hard-sigmoid": (Discretize("stochastic", backward="hard-sigmoid"), False),
    "Gumbel-sigmoid, τ 1 → 0.1": (Discretize("gumbel"), True),
    "Gumbel-sigmoid, τ 0.9, noise on a fifth": (Discretize("gumbel", temperature=0.9, noise=0.2), False),
    "Gumbel-sigmoid, hard, τ 1 → 0.1": (Discretize("gumbel-hard"), True),
    "Gumbel-softmax, τ 1 → 0.1": (Discretize("gumbel-softmax"), True),
    "ReinMax": (Discretize("reinmax"), False),
}
SCORED: dict[str, tuple[score.Kind, float | None]] = {  # baseline, temperature of an exponential reward
    "REINFORCE, no baseline": ("none", None),
    "REINFORCE, running mean": ("mean", None),
    "REINFORCE, per unit": ("unit", None),
    "REINFORCE, conditional mean": ("conditional", None),
    "REINFORCE, exponential reward": ("mean", 100.0),
}
EXPECTED: dict[str, dict] = {
    "expected REINFORCE": {},
    "expected REINFORCE, 4 repeats": {"repeats": 4},
    "expected REINFORCE, without ∂L/∂bit": {"masked": "gradient"},
    "expected REINFORCE, interval 1 → 8": {"growth": math.log(8)},
}
ROWS = ["Gaussian, reparameterized", *PASSED, *SCORED, "DisARM", *EXPECTED]
QUICK = ("Gaussian, reparameterized", "stochastic, sigmoid", "REINFORCE, running mean", "DisARM", "expected REINFORCE")


@dataclass(frozen=True)
class Size:
    epochs: int
    batch_size: int
    units: int
    train: int
    held_out: int
    seeds: int


SIZES = {"quick": Size(1, 50, 20, 600, 100, 1), "full": Size(100, 50, 50, 4000, 1000, 5)}


class Net(nn.Module):
    def __init__(self, units: int, *, gaussian: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(392, 200), nn.ReLU(), nn.Linear(200, units * (1 + gaussian)))
        self.decoder = nn.Sequential(nn.Linear(units, 200), nn.ReLU(), nn.Linear(200, 392))

    def nll(self, bottleneck: Tensor, lower: Tensor) -> Tensor:
        """(N,U), (N,392) -> nats of each image (N,)."""
        return functional.binary_cross_entropy_with_logits(self.decoder(bottleneck), lower, reduction="none").sum(1)


def annealed(mode: Discretize, progress: float) -> Discretize:
    if mode.estimator.startswith("gumbel"):
        return replace(mode, temperature=0.1**progress)
    return replace(mode, slope=1 + 4 * progress)


class Trainer:
    """One row: what is random and what is remembered stands here, not in the network."""

    def __init__(self, row: str, seed: int, size: Size) -> None:
        self.row, self.size = row, size
        self.generator = torch.Generator().manual_seed(seed)
        self.net = Net(size.units, gaussian=row == ROWS[0])
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.baseline = score.baseline(SCORED[row][0] if row in SCORED else "mean")
        self.options = EXPECTED.get(row, {})
        self.step = 0
        self.mode = Discretize()
        if row in EXPECTED:
            inputs = [name for name in synthetic.INPUTS if name != self.options.get("masked")]
            self.subnet = synthetic.subnet(size.units, context=392, inputs=inputs)
            self.fitter = torch.optim.Adam(self.subnet.parameters(), lr=1e-3)

    def loss(self, upper: Tensor, lower: Tensor, *, progress: float, steps: int) -> Tensor:
        """What is differentiated: the mean loss, and a term for the encoder where bits send nothing back."""
        pre = self.net.encoder(upper)
        if self.row == ROWS[0]:
            return self.net.nll(self.gaussian(pre), lower).mean()
        if self.row in PASSED:
            mode, moves = PASSED[self.row]
            self.mode = annealed(mode, progress) if moves else mode
            return self.net.nll(self.bits(pre), lower).mean()
        if self.row in SCORED:
            bits = score.draw(pre, generator=self.generator)
            losses = self.net.nll(bits, lower)
            temperature = SCORED[self.row][1]
            # Scaled back: −T·e^(−L/T) has the loss's own slope where L is small.
            credit = losses if temperature is None else temperature * score.exponential(losses, temperature=temperature)
            term, self.baseline = score.reinforce(pre, bits, losses=credit, baseline=self.baseline, context=upper)
            return losses.mean() + term
        if self.row == "DisARM":
            one, other = score.antithetic(pre, generator=self.generator)
            losses, others = self.net.nll(one, lower), self.net.nll(other, lower)
            return (losses.mean() + others.mean()) / 2 + score.disarm(pre, one, other, losses=losses, other_losses=others)
        found = synthetic.expected_reinforce(
            pre,
            lambda bits: self.net.nll(bits, lower),
            subnet=self.subnet,
            baseline=self.baseline,
            context=upper,
            repeats=self.options.get("repeats", 1),
            generator=self.generator,
        )
        self.baseline = found.baseline
        if synthetic.due(self.step, interval=1, growth=self.options.get("growth", 0.0) / steps):
            self.fitter.zero_grad()
            found.fit.backward()
            self.fitter.step()
        self.step += 1
        return found.losses.mean() + found.surrogate

    def gaussian(self, pre: Tensor) -> Tensor:
        mean, log_deviation = pre.chunk(2, 1)
        return mean + log_deviation.exp() * torch.randn(mean.shape, generator=self.generator)

    def bits(self, pre: Tensor) -> Tensor:
        mode = replace(self.mode, generator=self.generator)
        return Sample.apply(pre, logistic_noise(pre.shape, mode, pre) if mode.draws else None, mode)

    def drawn(self, pre: Tensor) -> Tensor:
        """The bottleneck as it is at test: what training drew; soft gates stay soft."""
        if self.row == ROWS[0]:
            return self.gaussian(pre)
        if self.row in PASSED:
            return self.bits(pre)
        return score.draw(pre, generator=self.generator)


def measure(row: str, seed: int, size: Size) -> Numbers:
    x, _, test, _ = mnist.images(size.held_out)
    x = x[: size.train]
    one = Trainer(row, seed, size)
    per_epoch = len(x) // size.batch_size
    steps = size.epochs * per_epoch
    for epoch in range(size.epochs):
        for k, index in enumerate(mnist.batches(len(x), size.batch_size, one.generator)):
            upper, lower = x[index].chunk(2, 1)
            total = one.loss(upper, lower, progress=(epoch * per_epoch + k) / steps, steps=steps)
            one.optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(one.net.parameters(), 100.0)
            one.optimizer.step()
    with torch.no_grad():
        upper, lower = test.chunk(2, 1)
        pre = one.net.encoder(upper)
        each = torch.stack([one.net.nll(one.drawn(pre), lower) for _ in range(20)])
        bound = math.log(20) - torch.logsumexp(-each, 0)
        numbers: Numbers = {"loss": float(each.mean()), "loss_half": over_examples(each.mean(0))}
        numbers |= {"bound": float(bound.mean()), "bound_half": over_examples(bound)}
        if row != ROWS[0]:
            hard = one.net.nll((pre > 0).float(), lower)
            numbers |= {"hard": float(hard.mean()), "hard_half": over_examples(hard)}
            numbers["open"] = 100 * float((pre > 0).float().mean())
    return numbers


def plot(results: Results, path: Path) -> None:
    points(results, path, column="loss", label="−log p(lower half | upper half) on held-out images, nats; one drawn bottleneck")


STUDY = Study(
    name="half_mnist",
    title="Half-and-half MNIST",
    columns=(
        Column("loss", "loss, nats", 1),
        Column("bound", "bound of 20", 1),
        Column("hard", "bits cut at 0", 1),
        Column("open", "bits on %", 0),
        Column("seconds", "s", 0, interval=False),
    ),
    variants=lambda size: ROWS if size != SIZES["quick"] else QUICK,
    measure=measure,
    sizes=SIZES,
    plot=plot,
)

if __name__ == "__main__":
    run(STUDY)
