"""Before training: each unit's threshold and levels, fitted to the values its gate takes in the teacher.

A two-level quantizer for every unit (Lloyd 1982), with the levels that a skip depends on held fixed: given the levels, the best
threshold is their middle; given the threshold, the best level is the weighted mean of the values on its side. A value counts by the
square of what it multiplies (the candidate for i, less the old cell where f = 1 − i; the old cell for f, φ(c) for o, h − n for z): its
share of the error in the state.
The threshold is folded into the gate's bias, so that a bit stays 1[pre > 0].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rnn2bin import tasks
from rnn2bin.cells.network import EQUATIONS, Lookup, Network, valid_steps
from rnn2bin.cells.weights import PHI, Cell
from rnn2bin.data import Batch
from rnn2bin.distill.window import run_cell
from rnn2bin.gates.estimators import FLOAT, sample

BINS = 64
ROUNDS = 20
_EDGE = 0.02  # thresholds stay within [edge, 1 − edge]: beyond, a unit's bit would never change again


@torch.no_grad()
def calibrate(student: Network, teacher: Network, task: tasks.Task, batches: Iterable[Batch]) -> None:
    """Set levels and gate biases of `student` in place from the teacher's gates on `batches`."""
    mass = {name: torch.zeros(len(cell.binary), cell.layer.hidden_size, BINS) for name, cell in teacher.cells().items()}
    state = None
    for batch in batches:
        prepared = tasks.prepare(task, batch, teacher, walk=run_cell)
        traces: list[tuple[Tensor, Tensor]] = []

        def walk(cell: Cell, x: Tensor | Lookup, start: tuple[Tensor, ...], mode, traces=traces):
            trace = run_cell(cell, x, start, mode)
            values = sample(cell.modes(FLOAT)[0], trace.pre)
            traces.append((values, importance(cell, values, start, trace.states)))
            return trace

        out = prepared.forward(teacher, mode=FLOAT, walk=walk, state=None if batch.first else state)
        state = out.state
        for name, (values, weight), lengths in zip(teacher.cells(), traces, out.lengths, strict=True):
            if lengths is not None:
                weight = weight * valid_steps(lengths, len(values))[..., None]
            mass[name] += histogram(values, weight).cpu()
    for name, cell in student.cells().items():
        fit(cell, mass[name].to(next(cell.parameters()).device))


def importance(cell: Cell, values: Tensor, start: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Tensor:
    """Square of what each gate multiplies, (T,B,G,H); 1 where the trace does not tell it."""
    kind = cell.layer.kind
    before = tuple(torch.cat([s[None], all_[:-1]]) for s, all_ in zip(start, states, strict=True))
    if kind.name in EQUATIONS:
        parts = EQUATIONS[kind.name].multiplied(values, before, states, PHI[cell.layer.activation].value)
    elif kind.is_lstm:
        (i, *forget, _), c_before, c = values.unbind(2), before[1], states[1]
        out = PHI[cell.layer.activation].value(c)
        if forget:
            parts = [(c - forget[0] * c_before) / i.clamp_min(1e-3), c_before, out]
        else:  # i = 1 overwrites: it multiplies candidate − c
            parts = [(c - c_before) / i.clamp_min(1e-3), out]
    else:
        z = values[:, :, 1]
        parts = [torch.ones_like(z), (before[0] - states[0]) / (1 - z).clamp_min(1e-3)]
    if not parts:
        return torch.ones_like(values)
    return torch.stack([p.square().clamp_max(4.0) for p in parts], 2) + 1e-6


def histogram(values: Tensor, weight: Tensor) -> Tensor:
    """values, weight (T,B,G,H) -> weighted counts (G,H,BINS) over [0, 1]."""
    gates, hidden = values.shape[2:]
    bins = (values * BINS).long().clamp_(0, BINS - 1).flatten(0, 1)  # (TB,G,H)
    unit = torch.arange(gates * hidden, device=values.device).view(gates, hidden)
    counts = torch.zeros(gates * hidden * BINS, device=values.device)
    counts.index_add_(0, (unit * BINS + bins).flatten(), weight.flatten())
    return counts.view(gates, hidden, BINS)


def fit(cell: Cell, mass: Tensor) -> None:
    """mass (G,H,BINS) of the teacher's units and gates -> levels and shifted gate biases of a cell with n ≥ 1 copies of each.

    The mean of n copies takes n + 1 values; copy k opens between the k-th and the next. What a level may not be stays as it is: strict
    gates are fitted by their thresholds alone.
    """
    copies = cell.layer.copies
    shift = torch.zeros(len(cell.binary), cell.layer.width, device=mass.device)
    for k, gate in enumerate(cell.layer.kind.gates):
        if not cell.binary[k] or k >= len(mass):  # an output gate that it has not stays open
            continue
        learns = gate.learns if cell.learned else ()
        here = mass[k].mean(0).expand_as(mass[k]) if gate.shared else mass[k]
        count = 1 if gate.shared else copies
        values, thresholds = quantizer(here, count + 1, free_lowest="lo" in learns, free_highest="hi" in learns)
        values, thresholds = values.repeat(1, copies // count), thresholds.repeat(1, copies // count)
        steps = count * values.diff(dim=0)  # (copies, H): what opening a copy adds, of its own value
        if "hi" in learns:
            lo = (values[:1] if "lo" in learns else torch.zeros_like(values[:1])).expand_as(steps)
            hi = lo + steps
        elif "lo" in learns:
            hi = torch.ones_like(steps)
            lo = hi - steps
        else:
            lo, hi = torch.zeros_like(steps), torch.ones_like(steps)
        if cell.learned:
            cell.levels.lo[k], cell.levels.hi[k] = lo.flatten(), hi.flatten()
        shift[k] = pre_of(cell, thresholds).flatten()
    cell.shift(shift)
    cell.project_levels()


def pre_of(cell: Cell, values: Tensor) -> Tensor:
    """Gate values -> the pre-activations at which the float gate takes them."""
    slope = cell.layer.hard_sigmoid
    return (2 * values - 1) / slope if slope else torch.logit(values)


def quantizer(mass: Tensor, levels: int, *, free_lowest: bool, free_highest: bool) -> tuple[Tensor, Tensor]:
    """mass (H,BINS) over [0, 1] -> the values (levels, H) and thresholds (levels − 1, H) that lose least; the lowest value stays 0 and the
    highest 1 where they are not free, and with neither free all values are evenly spaced."""
    centres = (torch.arange(BINS, device=mass.device) + 0.5) / BINS
    values = torch.linspace(0, 1, levels, device=mass.device)[:, None].repeat(1, mass.shape[0])
    middle = lambda v: ((v[1:] + v[:-1]) / 2).clamp(_EDGE, 1 - _EDGE)
    for _ in range(ROUNDS if free_lowest or free_highest else 0):
        bounds = torch.cat([values.new_full((1, mass.shape[0]), -1.0), middle(values), values.new_full((1, mass.shape[0]), 2.0)])
        for at in range(levels):
            if (at > 0 or free_lowest) and (at < levels - 1 or free_highest):
                inside = (centres > bounds[at][:, None]) & (centres <= bounds[at + 1][:, None])
                values[at] = _mean(mass, centres, inside, values[at])
    return values, middle(values)


def _mean(mass: Tensor, centres: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
    """Weighted mean of the bins in `where` (H,BINS) for each unit; `otherwise` where there are none."""
    chosen = mass * where
    total = chosen.sum(-1)
    return torch.where(total > 0, (chosen * centres).sum(-1) / total.clamp_min(1e-12), otherwise)
