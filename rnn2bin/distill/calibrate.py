"""Before training: each unit's threshold and levels, fitted to the values its gate takes in the teacher.

A two-level quantizer for every unit (Lloyd 1982), with the levels that a skip depends on held fixed: given the levels, the best
threshold is their middle; given the threshold, the best level is the weighted mean of the values on its side. A value counts by the
square of what it multiplies (the candidate for i, the old cell for f, φ(c) for o, h − n for z): its share of the error in the state.
The threshold is folded into the gate's bias, so that a bit stays 1[pre > 0].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rnn2bin import tasks
from rnn2bin.cells.network import Network, valid_steps
from rnn2bin.cells.weights import Cell
from rnn2bin.data import Batch
from rnn2bin.distill.window import run_cell
from rnn2bin.gates.estimators import FLOAT

BINS = 64
ROUNDS = 20
_EDGE = 0.02  # thresholds stay within [edge, 1 − edge]: beyond, a unit's bit would never change again


@torch.no_grad()
def calibrate(student: Network, teacher: Network, task: tasks.Task, batches: Iterable[Batch]) -> None:
    """Set levels and gate biases of `student` in place from the teacher's gates on `batches`. Strict students are left as they are: between
    levels 0 and 1 the teacher's own threshold is the best one."""
    if student.levels == "strict":
        return
    mass = {name: torch.zeros(len(cell.binary), cell.layer.hidden_size, BINS) for name, cell in teacher.cells().items()}
    state = None
    for batch in batches:
        prepared = tasks.prepare(task, batch, teacher, walk=run_cell)
        traces: list[tuple[Tensor, Tensor]] = []

        def walk(cell: Cell, x: Tensor, start: tuple[Tensor, ...], mode, traces=traces):
            trace = run_cell(cell, x, start, mode)
            values = torch.sigmoid(trace.pre)
            traces.append((values, importance(cell, values, start, trace.states)))
            return trace

        out = prepared.forward(teacher, mode=FLOAT, walk=walk, state=None if batch.first else state)
        state = out.state
        for (name, _), (values, weight) in zip(teacher.cells().items(), traces, strict=True):
            lengths = prepared.decoder_lengths if name.startswith("decoder.") else prepared.lengths
            if lengths is not None:
                weight = weight * valid_steps(lengths, len(values))[..., None]
            mass[name] += histogram(values, weight).cpu()
    for name, cell in student.cells().items():
        fit(cell, mass[name].to(next(cell.parameters()).device))


def importance(cell: Cell, values: Tensor, start: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> Tensor:
    """Square of what each gate multiplies, (T,B,G,H); 1 where the trace does not tell it."""
    before = [torch.cat([s[None], all_[:-1]]) for s, all_ in zip(start, states, strict=True)]
    if cell.layer.cell == "lstm":
        i, f, _ = values.unbind(2)
        c_before, c = before[1], states[1]
        parts = [(c - f * c_before) / i.clamp_min(1e-3), c_before, torch.tanh(c)]
    else:
        z = values[:, :, 1]
        parts = [torch.ones_like(z), (before[0] - states[0]) / (1 - z).clamp_min(1e-3)]
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
    """mass (G,H,BINS) -> the cell's levels and shifted gate biases."""
    centres = (torch.arange(BINS, device=mass.device) + 0.5) / BINS
    shift = torch.zeros(mass.shape[:2], device=mass.device)
    for k, gate in enumerate(cell.layer.kind.gates):
        if not cell.binary[k]:
            continue
        lo, hi = torch.zeros_like(shift[k]), torch.ones_like(shift[k])
        for _ in range(ROUNDS):
            threshold = ((lo + hi) / 2).clamp(_EDGE, 1 - _EDGE)
            above = centres > threshold[:, None]
            if "lo" in gate.learns:
                lo = _mean(mass[k], centres, ~above, lo)
            if "hi" in gate.learns:
                hi = _mean(mass[k], centres, above, hi)
        cell.levels.lo[k], cell.levels.hi[k] = lo, hi
        shift[k] = torch.logit(((lo + hi) / 2).clamp(_EDGE, 1 - _EDGE))
    cell.part("gates").bias.sub_(shift.flatten())


def _mean(mass: Tensor, centres: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
    """Weighted mean of the bins in `where` (H,BINS) for each unit; `otherwise` where there are none."""
    chosen = mass * where
    total = chosen.sum(-1)
    return torch.where(total > 0, (chosen * centres).sum(-1) / total.clamp_min(1e-12), otherwise)
