"""What a file of cells says of each of its cells: the step, and what a step reads and multiplies, counted from its trace.

LSTM and GRU, which `cost.py` counts by hand, need their step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rnn2bin.cells.weights import CellWeights, Gate

Step = Callable[[Tensor, tuple[Tensor, ...], CellWeights, Gate], tuple[tuple[Tensor, ...], Tensor]]
Phi = Callable[[Tensor], Tensor]


class Look(Protocol):
    """A cell's trace, as counts over units (T,B) that have a gradient where the bits have one."""

    @property
    def hidden(self) -> int:
        """H."""

    @property
    def input_size(self) -> int:
        """I."""

    @property
    def depth(self) -> int:
        """L."""

    def every(self, units: int) -> Tensor:
        """So many units at every step."""

    def opens(self, gate: int) -> Tensor:
        """1 (T,B,H) where any copy of a unit opens this gate; 1 everywhere where it is soft."""

    def closes(self, gate: int) -> Tensor:
        """1 (T,B,H) where any copy of a unit closes this gate; 1 everywhere where it is soft."""

    def closes_and_opens(self, gate: int, other: int) -> Tensor:
        """1 (T,B,H) where any copy of a unit closes `gate` and opens `other`, soft ones doing both."""

    def reads(self, gate: int, state: int) -> Tensor:
        """1 (T,B,H) where any copy of a unit opens this gate and its own state is not zero before the step."""

    def layers(self, units: Tensor) -> Tensor:
        """What is (T,B,L·H) of a stack, for each layer (T,B,L,H)."""

    def before(self, state: int) -> Tensor:
        """1 (T,B,·) where a state is not zero in any copy before the step."""

    def after(self, state: int) -> Tensor:
        """The same after it."""


@dataclass(frozen=True)
class Product:
    """One matrix of a step: `rows` (T,B) that it asks for, of `of` (rows, columns). `columns`: those that are not zero in what it reads,
    None for the step's input. `candidate`: the report tells what share of these rows is asked for; once for each candidate."""

    rows: Tensor
    columns: Tensor | None
    of: tuple[int, int]
    candidate: bool = False


@dataclass(frozen=True)
class Equations:
    """`step`: the oracle. `reads`: all matrices of a step. `multiplied` (values (T,B,G,H), states before and after, φ): what each gate
    multiplies, (T,B,H) each; none where the trace does not tell it."""

    step: Step
    reads: Callable[[Look], Sequence[Product]]
    multiplied: Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Phi], Sequence[Tensor]] = lambda values, before, after, phi: ()
