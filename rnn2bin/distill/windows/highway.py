"""Highway layers: no step reads another, so the oracle's one step over all of them at once is a window. Recurrent ones are in `rnn.py`."""

from __future__ import annotations

from torch import Tensor

from rnn2bin.cells import highway
from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import Cell, select
from rnn2bin.distill.windows import rnn
from rnn2bin.distill.windows.parts import Drawn, Modes
from rnn2bin.gates.estimators import Sample


def run(cell: Cell, x: Tensor | Lookup, state: CellState, *, modes: Modes, noise: Drawn) -> Trace:
    """x (T,B,I) or tokens, state h (B,n·H), which a layer that is not recurrent does not read."""
    if cell.layer.kind.recurrent:
        return rnn.run(cell, x, state, modes=modes, noise=noise)
    w, (lo, hi) = cell.weights(), cell.level_values()
    rows = x.rows(w.gates_ih.dtype) if isinstance(x, Lookup) else x

    def gate(pre: Tensor, *, first: int = 0) -> Tensor:
        drawn = None if noise.units is None else noise.units.flatten(0, 1)
        return select(Sample.apply(pre, drawn, modes[0]), lo, hi)

    (h,), pre = highway.step(rows.flatten(0, 1), (rows.new_empty(0, cell.layer.width),), w, gate)
    return Trace((h.unflatten(0, rows.shape[:2]),), pre.unflatten(0, rows.shape[:2]))
