"""How a cell walks over a window in training: by the native kernels, by a window of its family, or else as the oracle does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.network import walk as oracle_walk
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import native
from rnn2bin.distill.windows import feedback, gru, highway, lstm, memory, rnn
from rnn2bin.distill.windows.inputs import input_product, is_native
from rnn2bin.distill.windows.parts import Drawn
from rnn2bin.gates.estimators import SCORE, Discretize, logistic_noise
from rnn2bin.kinds import CELLS

# By family. A cell without a window walks step by step through autograd: exact, and slower (docs/adding-a-cell.md).
_RUN: dict[str, Callable[..., Trace]] = {
    "lstm": lstm.run,
    "gru": gru.run,
    "memory": memory.run,
    "rnn": rnn.run,
    "highway": highway.run,
    "feedback": feedback.run,
}
WINDOWS = frozenset(name for name, kind in CELLS.items() if kind.family in _RUN and kind.peepholes != "full")


def _noise(mode: Discretize, like: Tensor, *shape: int) -> Tensor:
    """What the native kernels would draw, where they are there; noise (T,B,G,n·H)."""
    alike = mode.estimator != "gumbel-softmax"  # which has a draw of its own
    return native.Noise.of(mode).fill(*shape) if alike and is_native(like) else logistic_noise(shape, mode, like)


def _drawn(cell: Cell, mode: Discretize, like: Tensor, steps: int, batch: int) -> Drawn:
    """Noise for the gates of a window."""
    if not (mode.draws and any(cell.binary)):
        return Drawn()
    units = cell.layer.kind.unit_gates
    shared = len(cell.binary) - units
    return Drawn(
        _noise(mode, like, steps, batch, units, cell.layer.width) if units else None,
        _noise(mode, like, steps, batch, shared, 1).squeeze(3) if shared else None,
    )


def _kept(noise: Drawn, width: int) -> Tensor | None:
    """All noise of a window (T,B,G,n·H). A gate that decides for all units drew once: the first of them has it, so that credit counts
    once."""
    parts = [] if noise.units is None else [noise.units]
    if noise.shared is not None:
        parts.append(functional.pad(noise.shared.unsqueeze(3), (0, width - 1)))
    return torch.cat(parts, 2) if parts else None


def run_cell(cell: Cell, x: Tensor | Lookup, state: CellState, mode: Discretize, *, precision: str = "float32") -> Trace:
    """x (T,B,I) or tokens, and the state before it -> the trace of the window. Differentiable in x, state, weights and levels.

    `precision`: "bfloat16" rounds the operands of products where the native kernels run (`native.takes`); elsewhere it changes nothing.
    """
    kind = cell.layer.kind
    if kind.name not in WINDOWS:
        return oracle_walk(cell, x, state, mode)
    modes, like = cell.modes(mode), cell.part("candidate").bias
    if native.takes(cell, like, modes):
        return _run_in_c(cell, x, state, mode, precision=precision)
    noise = _drawn(cell, mode, like, *x.shape[:2])
    trace = _RUN[kind.family](cell, x, state, modes=modes, noise=noise)
    return replace(trace, noise=_kept(noise, cell.layer.width)) if mode.estimator in SCORE else trace


def _run_in_c(cell: Cell, x: Tensor | Lookup, state: CellState, mode: Discretize, *, precision: str) -> Trace:
    """The same by the native kernels."""
    w, (lo, hi), kind = cell.weights(every_row=False), cell.level_values(), cell.layer.kind
    precision = precision if native.has_bfloat16() else "float32"
    c0 = state[1] if kind.has_cell else None
    drawn = native.Noise.of(mode) if mode.draws and any(cell.binary) else None
    gates_bias = w.gates_bias.view(len(kind.gates), -1)
    x_pre = input_product(x, torch.cat([w.gates_ih, w.candidate_ih]), precision=precision)
    shared = cell.shared_rows()
    rows = (shared.index, shared.scale) if shared else (None, None)
    weights = (torch.cat([w.gates_hh, w.candidate_hh]), gates_bias, w.candidate_bias, w.candidate_bias_hh)
    how = (native.equal_to(kind.name), cell.modes(mode), precision)
    h, c, products = native.NativeWindow.apply(x_pre, *weights, *rows, state[0], c0, lo, hi, drawn, *how)
    return Trace((h,) if c0 is None else (h, c), products, gates_bias)
