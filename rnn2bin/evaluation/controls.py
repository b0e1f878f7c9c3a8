"""Controls: what binarization would cost without distillation, and what the bits' values are worth beyond their rate."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn2bin import student as students
from rnn2bin.cells.network import STEPS, CellState, Lookup, Network, Trace
from rnn2bin.cells.weights import Cell, select
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.measure import Candidate
from rnn2bin.recipe import Gates

SHARP = 0.2  # temperature of the sharpened sigmoid, the control value of public work


def controls(teacher: Network, student: Network, gates: Gates, open_rates: dict[str, list[float]], *, seed: int) -> dict[str, Candidate]:
    """threshold_only: the teacher's weights, gates cut at 0, strict levels. sharpened_sigmoid: its gates σ(pre/0.2).
    random_gates: the student with bits drawn at its own open rates."""
    cut = students.student(teacher, gates.model_copy(update={"levels": "strict", "copies": 1})).eval()
    return {
        "threshold_only": Candidate(cut, BINARY),
        "sharpened_sigmoid": Candidate(cut, Discretize("sigmoid", temperature=SHARP)),
        "random_gates": Candidate(student, BINARY, random_walk(student, open_rates, seed=seed)),
    }


def random_walk(student: Network, open_rates: dict[str, list[float]], *, seed: int):
    """The oracle's loop with every binary gate's bit drawn at its open rate, whatever the pre-activation says."""
    generator = torch.Generator().manual_seed(seed)
    names = {id(cell): name for name, cell in student.cells().items()}

    def walk(cell: Cell, x: Tensor | Lookup, state: CellState, mode: Discretize) -> Trace:
        rates = torch.tensor(open_rates[names[id(cell)]])[:, None]
        (lo, hi), soft = cell.level_values(), cell.gate(FLOAT)
        binary = torch.tensor(cell.binary)[:, None]

        def gate(pre: Tensor, *, first: int = 0) -> Tensor:
            here = slice(first, first + pre.shape[1])
            bits = (torch.rand(pre.shape, generator=generator) < rates[here]).to(pre.dtype)
            return torch.where(binary[here], select(bits, lo[here], hi[here]), soft(pre, first=first))

        states, pres = [], []
        for x_t in x.rows(cell.weights().gates_ih.dtype) if isinstance(x, Lookup) else x:
            state, pre = STEPS[cell.layer.cell](x_t, state, cell.weights(), gate)
            states.append(state)
            pres.append(pre)
        return Trace(tuple(torch.stack(s) for s in zip(*states, strict=True)), torch.stack(pres))

    return walk
