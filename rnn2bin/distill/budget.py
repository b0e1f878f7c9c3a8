"""Density by itself: a price on the distance between what a step reads and what it may read, raised while that distance is too large.

The wanted density falls from what the student reads at first to `budget.density`, in equal ratios, until `budget.until` of the run; what is
left of it trains at that density. The price moves by ratios too, so that no scale of a loss has to be known. A network that reads less than
it may is drawn back up, since open gates are what accuracy is made of; one that read less from the start is left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rnn2bin import cost, tasks
from rnn2bin.cells.network import EQUATIONS, Network, Output
from rnn2bin.data import Batch
from rnn2bin.distill import native
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import UnreachableError
from rnn2bin.gates.estimators import BINARY, Discretize, Sample
from rnn2bin.recipe import DENSITY_TOLERANCE, Budget

TOLERANCE = DENSITY_TOLERANCE
MOST_SHIFT = 2 * TOLERANCE  # by which training may aim beside the wanted density to meet it on validation data
FIRST_PRICE, LEAST_PRICE, MOST_PRICE = 0.1, 1e-3, 1e3  # in units of loss for the whole network's weights
STEP = 0.03  # the share by which the price moves at a step, up while the density stays off by more than half the tolerance, else down
STAYS = 0.5  # of the longer mean: an error below that is on its way to 0, and a price that still rose would carry the density beyond
# What one batch reads scatters around what the network reads, widely where sequences are short: both means are over the last steps.
NEAR, FAR = 0.8, 0.95
TOO_DENSE = -1e6  # what a checkpoint is worth that reads too much, less than any metric

# Counted in bits; the gradient is that of σ(pre), which reaches every unit and not only those near the threshold.
_COUNT = Discretize("straight-through", slope=1.0, backward="sigmoid")


def density(student: Network, prepared: tasks.Prepared, output: Output, *, learn: bool = True) -> Tensor:
    """Share of the recurrent and input weights that these steps read (a GRU's by its changed units alone), differentiable with `learn`."""
    bit = (lambda pre: Sample.apply(pre, None, _COUNT)) if learn else cost.bits
    found = cost.cells(student, prepared, output, bit=bit, pairs=native.closed_and_open if learn else None)
    # In a window that carries a state, what its first step reads lies before it.
    reads = (read if read.rested else replace(read, start=1) for read in found)
    counts = [cost.count(read, bit=bit) for read in reads]
    return torch.stack([c.incremental for c in counts]).sum() / torch.stack([c.dense for c in counts]).sum()


@torch.no_grad()
def check(budget: Budget, student: Network, teacher: Network, task: tasks.Task, batch: Batch) -> None:
    """UnreachableError for a density that no gates can bring about: first layers' inputs that are no tokens meet every gate's row. It is a
    lower bound: later layers' inputs, soft gates and cells that declare their own equations count as if nothing had to be read."""
    if budget.density is None:
        return
    prepared = tasks.prepare(task, batch, teacher, walk=run_cell)
    found = cost.cells(student, prepared, prepared.forward(student, mode=BINARY, walk=run_cell))
    least, dense, where = 0.0, 0.0, []
    for read in found:
        layer, kind = read.cell.layer, read.cell.layer.kind
        dense += float(cost.count(read).dense)
        if read.inputs is not None and ".layers.0." in read.name and kind.name not in EQUATIONS:
            least += float((read.inputs * read.mask).sum()) * len(kind.gates) * layer.gate_rows(layer.shared_inputs)
            where.append(read.name)
    if least > budget.density * dense:
        raise UnreachableError(
            f"budget.density: {budget.density:g} cannot be reached: a step reads {least / dense:.1%} of the layers' weights whatever its "
            f"gates do, since inputs that are no tokens meet every gate ({', '.join(where)}); ask for more"
        )


@dataclass
class Price:
    """What a weight read costs now, at most: where the density is less than a tolerance off, it costs that share, and below the aim it
    pays. `first`: the density before training; `None` until it is measured. `near`, `far`: means of what the last steps read above the
    aim, a short one that says how much of the price is charged and a longer one that moves it. `shift`: training aims that much above
    the wanted density, so that the validation part, with hard gates, meets it; it starts below, since the price rests half a hundredth
    above. `fallen`: whether the wanted density was the budget at the last measurement."""

    price: float = FIRST_PRICE
    first: float | None = None
    near: float | None = None
    far: float | None = None
    shift: float = -TOLERANCE / 2
    fallen: bool = False

    def wanted(self, budget: Budget, progress: float) -> float:
        """The density wanted at this progress."""
        assert budget.density is not None
        if self.first is None or self.first <= budget.density:
            return budget.density
        share = min(progress / budget.until, 1.0)
        return self.first * (budget.density / self.first) ** share

    def charge(self, found: Tensor, budget: Budget, progress: float) -> Tensor:
        """The loss for a density, and the next price. Without a wanted density the price is the recipe's."""
        if budget.density is None:
            return budget.price * found.float()
        now = float(found.detach())
        if self.first is None:
            self.first = now
        wanted = self.wanted(budget, progress)
        error = now - (wanted + self.shift)
        self.near = error if self.near is None else NEAR * self.near + (1 - NEAR) * error
        self.far = error if self.far is None else FAR * self.far + (1 - FAR) * error
        share = min(max(self.near / TOLERANCE, -1.0), 1.0)
        if self.first <= wanted:
            share = max(share, 0.0)
        charged = self.price * share * (found.float() - (now - error))
        stays = abs(self.far) > TOLERANCE / 2 and math.copysign(1.0, self.far) * self.near > STAYS * abs(self.far)
        moved = self.price * (1 + STEP if stays else 1 - STEP)
        self.price = min(max(moved, LEAST_PRICE), MOST_PRICE)
        return charged

    def correct(self, found: float, budget: Budget, progress: float) -> None:
        """Aim lower where the validation part read more than wanted, higher where it read less; `found` is what it read. What was measured
        on the way down says nothing, nor does the first measurement at its end."""
        wanted = self.wanted(budget, progress)
        if self.fallen and self.first is not None and self.first > wanted:
            self.shift = min(max(self.shift + (wanted - found) / 2, -MOST_SHIFT), MOST_SHIFT)
        self.fallen = wanted == budget.density


def choice(worth: float, found: float | None, wanted: float | None) -> float:
    """What a checkpoint is worth, higher is better: its metric; one that reads too much stands behind all that do not, the densest last."""
    if found is None or wanted is None or found <= wanted + TOLERANCE:
        return worth
    return TOO_DENSE - found
