"""Which cells there are, as frozen data: gates in their canonical order, which levels of them may be learned, states. A cell is a row of
`CELLS`; its equations are in `cells/`, a file a family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True)
class GateSpec:
    """One gate. `closed` and `open` are the strict values of bit 0 and bit 1; `learns` names the levels that may be learned.

    A level on which a skip depends is never learned: `lo` of i, o and r (exactly 0), `hi` of z (exactly 1: keep).
    """

    name: str
    learns: tuple[Literal["lo", "hi"], ...]
    maximum: float | None = None  # learned levels stay within [0, maximum]: a forget gate above 1 would let the cell grow
    shared: bool = False  # one decision for all units, with weights of its own: a global gate

    @property
    def letter(self) -> str:
        """Its name without the numbers of layers that a deep cell adds: a recipe means all of them by it."""
        return self.name.rstrip("0123456789")

    @property
    def keeps(self) -> bool:
        """Whether a bit of 1 leaves the state as it is: units ask for their rows where they do not keep."""
        return self.learns == ("lo",)


@dataclass(frozen=True)
class CellKind:
    """A kind of cell: its gates in canonical order, its states, and which tensors it has.

    `family`: the file of cells/ that has its equations, and of the native runtime's kernels/ that has them in C.
    States: h, of which others read; c, a unit's memory; r, what its own candidate reads at the next step.
    `candidate_bias_hh`: a recurrent bias of the candidate. `peepholes`: gates see c, diagonal (each unit its own) or full (a matrix).
    `recurrent`: whether a step reads the one before it.
    `deep`: a step goes through `LayerSpec.depth` layers, "inner" ones that hand one state on, or a "stack" of which each has its own and
    reads all others'; gates and tensors are then those of each layer, and of a stack `links` are gates from every layer to every layer.
    `came_from`: the float cell, where that is another.
    """

    name: str
    family: str
    gates: tuple[GateSpec, ...]
    states: tuple[str, ...]
    candidate_bias_hh: bool = False
    peepholes: Literal["", "diagonal", "full"] = ""
    recurrent: bool = True
    deep: Literal["", "inner", "stack"] = ""
    links: tuple[GateSpec, ...] = ()
    came_from: str = ""

    @property
    def gate_names(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.gates)

    @property
    def unit_gates(self) -> int:
        """Gates that decide for each unit; they stand before those that decide for all."""
        return sum(not g.shared for g in self.gates)

    @property
    def may_share(self) -> bool:
        """Whether units can read one row of a gate's weights together: gates have a matrix of their own, and nothing but it and vectors."""
        return self.family in ("lstm", "gru") and self.peepholes != "full"

    @property
    def has_cell(self) -> bool:
        """Whether h is what is shown of c, a memory of its own."""
        return "c" in self.states

    @property
    def is_lstm(self) -> bool:
        """An LSTM of any kind: its candidate rows wait for i, the first gate, its columns of h for o, the last."""
        return self.family == "lstm"

    @property
    def closes(self) -> bool:
        """Whether its last gate is an output gate: where that is 0, so is h."""
        return self.is_lstm or self.name == "gru_output"

    def at(self, depth: int) -> CellKind:
        """This kind with its gates at a depth: t of two layers is t1, t2; g23 goes from layer 2 to layer 3."""
        return _at(self, depth) if self.deep else self


@lru_cache
def _at(kind: CellKind, depth: int) -> CellKind:
    layers = range(1, depth + 1)
    gates = [replace(g, name=f"{g.name}{k}") for k in layers for g in kind.gates]
    links = [replace(g, name=f"{g.name}{source}{target}") for target in layers for source in layers for g in kind.links]
    return replace(kind, gates=(*gates, *links), links=())


_LSTM_GATES = (GateSpec("i", ("hi",)), GateSpec("f", ("lo", "hi"), maximum=1.0), GateSpec("o", ("hi",)))
# f = 1 − i: one decision, 0 keeps the cell exactly, 1 overwrites it, wholly or in part.
_COUPLED_GATES = (GateSpec("i", ("hi",), maximum=1.0), GateSpec("o", ("hi",)))

_GLOBAL = (GateSpec("g", (), shared=True),)
_GRU_GATES = (GateSpec("r", ("hi",)), GateSpec("z", ("lo",), maximum=1.0))

CELLS: dict[str, CellKind] = {
    kind.name: kind
    for kind in (
        CellKind("lstm", "lstm", _LSTM_GATES, ("h", "c")),
        # i and f see P c before the step, o sees P c after it (Gers & Schmidhuber 2000, Graves 2013, the ONNX input P).
        CellKind("lstm_peephole", "lstm", _LSTM_GATES, ("h", "c"), peepholes="diagonal"),
        # The same with a matrix: every gate sees every cell.
        CellKind("lstm_peephole_full", "lstm", _LSTM_GATES, ("h", "c"), peepholes="full"),
        # CIFG (Greff et al. 2015), the ONNX attribute input_forget.
        CellKind("lstm_coupled", "lstm", _COUPLED_GATES, ("h", "c")),
        CellKind("lstm_coupled_peephole", "lstm", _COUPLED_GATES, ("h", "c"), peepholes="diagonal"),
        # r multiplies U_n h + b_hn (PyTorch, cuDNN). z = 1 keeps h.
        CellKind("gru", "gru", _GRU_GATES, ("h",), candidate_bias_hh=True),
        # The same with an output gate: c is its memory, h = o⊙c what its own gates and all others read. No file has it; a GRU becomes one
        # where density is wanted (docs/decisions/027-output-gate.md).
        CellKind("gru_output", "gru", (*_GRU_GATES, GateSpec("o", ("hi",))), ("h", "c"), candidate_bias_hh=True, came_from="gru"),
        # r multiplies h before U_n (Cho 2014, the ONNX default, TensorFlow 1).
        CellKind("gru_reset_before", "gru", _GRU_GATES, ("h",)),
        # No gate: carried through beside layers that have some.
        CellKind("rnn", "rnn", (), ("h",)),
        # h = f h + (1 − f) φ(…): f = 1 keeps h.
        CellKind("rnn_minimal", "rnn", (GateSpec("f", ("lo",), maximum=1.0),), ("h",)),
        # h = h + f φ(…): f = 0 keeps h.
        CellKind("rnn_residual", "rnn", (GateSpec("f", ("hi",)),), ("h",)),
        # y = t φ(…) + (1 − t) x: t = 0 carries. No step reads another.
        CellKind("highway", "highway", (GateSpec("t", ("hi",), maximum=1.0),), ("h",), recurrent=False),
        # The same over the state, through `depth` layers a step, of which the first reads the input.
        CellKind("recurrent_highway", "highway", (GateSpec("t", ("hi",), maximum=1.0),), ("h",), deep="inner"),
        # On the way from an RNN to the LSTM (R2RT 2016): differences 1, 2, 3 of cells/memory.py, all of which make the LSTM.
        CellKind("prototype", "memory", _LSTM_GATES, ("h",)),
        CellKind("prototype_normalized", "memory", _LSTM_GATES, ("h",)),
        *(CellKind(f"pseudo{which}", "memory", _LSTM_GATES, ("h", "c")) for which in ("", "_2", "_3", "_13", "_23", "_123")),
        *(CellKind(f"pseudo{which}", "memory", _LSTM_GATES, ("h", "c", "r")) for which in ("_1", "_12")),
        # A stack whose layers all read all layers of the step before, through global gates (Chung et al. 2015).
        CellKind("gf_tanh", "feedback", (), ("h",), deep="stack", links=_GLOBAL),
        CellKind("gf_gru", "feedback", _GRU_GATES, ("h",), deep="stack", links=_GLOBAL),
        CellKind("gf_lstm", "feedback", _LSTM_GATES, ("h", "c"), deep="stack", links=_GLOBAL),
    )
}
MOST_DEPTH = 9  # layers within a step: their numbers in gates' names have one digit
