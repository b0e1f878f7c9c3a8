"""One direction's tensors by name, and what a gate is: a function from pre-activations to multipliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin.cells.grid import rounded
from rnn2bin.gates.estimators import FLOAT, Discretize, Sample, logistic_noise, sample
from rnn2bin.spec import LayerSpec


class Gate(Protocol):
    """Pre-activations (B,·,n·H) of the gates from `first` on -> multipliers of the same shape."""

    def __call__(self, pre: Tensor, *, first: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Phi:
    """A candidate's activation, and its derivative as a function of its value."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


PHI = {
    "tanh": Phi(torch.tanh, lambda y: 1 - y * y),
    "relu": Phi(torch.relu, lambda y: (y > 0).to(y.dtype)),
    "sigmoid": Phi(torch.sigmoid, lambda y: y * (1 - y)),
    "softsign": Phi(functional.softsign, lambda y: (1 - y.abs()).square()),
    "elu": Phi(functional.elu, lambda y: torch.where(y > 0, torch.ones_like(y), y + 1)),
    "identity": Phi(lambda x: x, torch.ones_like),
}


@dataclass(frozen=True)
class SharedRows:
    """Which of all gates' rows (G·R) each unit reads (G·H), and what its product is multiplied by (G·H)."""

    index: Tensor
    scale: Tensor

    def every(self, rows: Tensor) -> Tensor:
        """(G·R,·) -> a row for every unit (G·H,·)."""
        return rows.index_select(0, self.index) * self.scale[:, None]


@dataclass(frozen=True)
class CellWeights:
    """Plain tensors of one cell; shapes in `LayerSpec.tensors`. One that its kind does not have is empty; `all` has every one by name."""

    gates_ih: Tensor
    gates_hh: Tensor
    gates_bias: Tensor
    candidate_ih: Tensor
    candidate_hh: Tensor
    candidate_bias: Tensor
    candidate_bias_hh: Tensor | None = None
    projection: Tensor | None = None
    peephole: Tensor | None = None
    phi: Callable[[Tensor], Tensor] = torch.tanh
    clip: float = 0.0
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    all: Mapping[str, Tensor] = field(default_factory=dict)
    depth: int = 1

    @property
    def hidden(self) -> int:
        return self.candidate_bias.shape[0] // self.depth

    def gate_pre(self, x: Tensor, h: Tensor, *, first: int = 0, last: int | None = None) -> Tensor:
        """x (B,I), h (B,R) -> pre-activations (B,G,n·H) of the gates from `first` to before `last`, all if not given: one product a unit,
        one threshold a copy."""
        rows = slice(first * self.hidden, None if last is None else last * self.hidden)
        return self.thresholds(x @ self.gates_ih[rows].t() + h @ self.gates_hh[rows].t(), first=first)

    def thresholds(self, product: Tensor, *, first: int = 0) -> Tensor:
        """Products (B,g·H) of the gates from `first` on -> their pre-activations (B,g,n·H)."""
        gates = product.shape[1] // self.hidden
        bias = self.gates_bias.view(self.gates_hh.shape[0] // self.hidden if self.gates_hh.numel() else gates, -1, self.hidden)
        return (product.view(-1, gates, 1, self.hidden) + bias[first : first + gates]).flatten(2)

    def squash(self, pre: Tensor) -> Tensor:
        """The candidate's pre-activation -> its value."""
        return self.phi(clipped(pre, self.clip))

    def peek(self, c: Tensor) -> Tensor:
        """c (B,n·H) -> what each gate sees of it (B,G,n·H). Diagonal: every copy of a unit its own cell, through the unit's one weight;
        full: the mean over copies of every cell."""
        assert self.peephole is not None  # kinds.CellKind.peepholes
        if self.peephole.ndim == 2:
            copies = c.shape[1] // self.hidden
            return (fold(c, copies) @ self.peephole.t()).unflatten(1, (-1, self.hidden)).repeat(1, 1, copies)
        return (self.peephole.view(-1, 1, self.hidden) * c.view(len(c), 1, -1, self.hidden)).flatten(2)

    def emit(self, h: Tensor) -> Tensor:
        """An LSTM's o·φ(c), folded (B,H) -> what others read (B,R)."""
        return h if self.projection is None else clipped(h @ self.projection.t(), self.proj_clip)


def clipped(x: Tensor, bound: float) -> Tensor:
    """x within [−bound, bound]; as it is where the bound is 0."""
    return x.clamp(-bound, bound) if bound else x


def fold(x: Tensor, copies: int) -> Tensor:
    """(…,n·H) over copies -> their mean (…,H): what others read."""
    return x if copies == 1 else x.unflatten(-1, (copies, -1)).mean(-2)


class Tensors(nn.Module):
    """Parameters by name: one part of a cell (`gates`, `candidate`, `projection`, `levels`)."""

    def __getattr__(self, name: str) -> Tensor:
        return super().__getattr__(name)  # type: ignore[return-value]


class Cell(nn.Module):
    """One direction of one layer: its weights under canonical names, which gates are binary, and the levels they select.

    A float cell (the teacher) has no binary gate; its levels are the strict ones and stay unused.
    """

    def __init__(self, layer: LayerSpec, binary: tuple[bool, ...] | None = None, *, levels: str = "strict") -> None:
        super().__init__()
        self.layer = layer
        self.grid: Literal["none", "recurrent", "all"] = "none"  # which matrices stand on an eight-bit grid; recurrent: not the input's
        gates = layer.kind.gates
        self.binary = binary or (False,) * len(gates)
        for name, shape in layer.tensors().items():
            part, leaf = name.split(".")
            if part not in self._modules:
                self.add_module(part, Tensors())
            if name == "gates.row":  # chosen once, never trained
                self.part(part).register_buffer(leaf, torch.zeros(shape))
            else:
                self.part(part).register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
        if any(self.binary):
            self._add_levels(learned=levels == "learned")

    _lo_free: Tensor
    _hi_free: Tensor
    _ceiling: Tensor

    def part(self, name: str) -> Tensors:
        """`gates`, `candidate` or `projection`."""
        return self.get_submodule(name)  # type: ignore[return-value]

    def tensor(self, name: str) -> Tensor:
        """A weight by its name of `LayerSpec.tensors`."""
        part, leaf = name.split(".")
        return getattr(self.part(part), leaf)

    def _add_levels(self, *, learned: bool) -> None:
        gates, hidden = self.layer.kind.gates, self.layer.width
        self.levels = Tensors()
        self.learned = learned
        for side, start in (("lo", 0.0), ("hi", 1.0)):
            self.levels.register_parameter(side, nn.Parameter(torch.full((len(gates), hidden), start), requires_grad=learned))
            free = [learned and binary and side in g.learns for g, binary in zip(gates, self.binary, strict=True)]
            self.register_buffer(f"_{side}_free", torch.tensor(free).unsqueeze(1), persistent=False)
        ceiling = torch.tensor([g.maximum or float("inf") for g in gates]).unsqueeze(1)
        self.register_buffer("_ceiling", ceiling, persistent=False)

    def matrices(self) -> dict[str, Tensor]:
        """The cell's matrices by name, on their grids where they have any."""
        found = {name: self.tensor(name) for name, shape in self.layer.tensors().items() if len(shape) == 2}
        if self.grid == "none":
            return found
        for names in self._rows(found):
            together = [n for n in names if not n.endswith("_ih")] if self.grid == "recurrent" else names
            if together:
                found |= zip(together, rounded(*(found[name] for name in together)), strict=True)
        return found

    def _rows(self, found: Mapping[str, Tensor]) -> list[list[str]]:
        """Matrices that share their rows' grids: those of the input and of the state, where each row has both."""
        rest, rows = list(found), []
        for part in ("gates", "candidate"):
            both = [f"{part}.weight_ih", f"{part}.weight_hh"]
            if all(name in found for name in both) and len({found[name].shape[0] for name in both}) == 1:
                rows.append(both)
                rest = [name for name in rest if name not in both]
        return rows + [[name] for name in rest]

    def weights(self, *, every_row: bool = True) -> CellWeights:
        """With `every_row` gates have a row for every unit, also where units share them (`shared_rows`)."""
        tensors = {name: self.tensor(name) for name in self.layer.tensors()} | self.matrices()
        if every_row and (shared := self.shared_rows()):
            names = ["gates.weight_hh", *(["gates.weight_ih"] if self.layer.shared_inputs > 1 else [])]
            tensors |= {name: shared.every(tensors[name]) for name in names}
        none = tensors["candidate.bias"].new_zeros(0)
        return CellWeights(
            tensors.get("gates.weight_ih", none),
            tensors.get("gates.weight_hh", none),
            tensors.get("gates.bias", none),
            tensors["candidate.weight_ih"],
            tensors.get("candidate.weight_hh", none),
            tensors["candidate.bias"],
            tensors.get("candidate.bias_hh"),
            tensors.get("projection.weight"),
            tensors.get("gates.peephole"),
            PHI[self.layer.activation].value,
            self.layer.clip,
            self.layer.cell_clip,
            self.layer.proj_clip,
            tensors,
            self.layer.depth,
        )

    def shared_rows(self) -> SharedRows | None:
        """None where every unit has rows of its own."""
        layer = self.layer
        if layer.shared == 1:
            return None
        row = self.tensor("gates.row")
        first = torch.arange(len(self.binary), device=row.device).repeat_interleave(layer.hidden_size)
        return SharedRows(row.long() + layer.gate_rows(layer.shared) * first, self.tensor("gates.scale"))

    def level_values(self) -> tuple[Tensor, Tensor]:
        """(lo, hi), each (G,n·H); what is not learned is exactly 0 and exactly 1."""
        if not any(self.binary):
            shape = (len(self.binary), self.layer.width)
            like = self.part("candidate").bias
            return like.new_zeros(shape), like.new_ones(shape)
        lo = torch.where(self._lo_free, self.levels.lo, torch.zeros_like(self.levels.lo))
        hi = torch.where(self._hi_free, self.levels.hi, torch.ones_like(self.levels.hi))
        return lo, hi

    @torch.no_grad()
    def shift(self, by: Tensor) -> None:
        """Raise every gate's threshold by (G,n·H); a gate that decides for all units has one."""
        units = self.layer.kind.unit_gates
        if units:
            self.part("gates").bias.sub_(by[:units].flatten())
        if units < len(by):
            self.part("global").bias.sub_(by[units:, 0])

    @torch.no_grad()
    def project_levels(self) -> None:
        """Bring learned levels back into their bounds; called after each optimizer step."""
        if any(self.binary) and self.learned:
            for levels in (self.levels.lo, self.levels.hi):
                levels.copy_(torch.minimum(levels.clamp_min(0), self._ceiling))

    def modes(self, mode: Discretize) -> tuple[Discretize, ...]:
        """One mode for each gate: gates left soft are the float network's whatever the call asks."""
        soft = Discretize("hard-sigmoid", slope=self.layer.hard_sigmoid) if self.layer.hard_sigmoid else FLOAT
        soft = replace(soft, clip=self.layer.clip)
        return tuple(mode if binary and mode.estimator != "float" else soft for binary in self.binary)

    def gate(self, mode: Discretize) -> Gate:
        """The function the oracle's equations call."""
        lo, hi = self.level_values()
        modes = self.modes(mode)

        def apply(pre: Tensor, *, first: int = 0) -> Tensor:
            here = slice(first, first + pre.shape[1])
            noise = logistic_noise(pre.shape, mode, pre) if mode.draws and any(self.binary) else None
            if torch.is_grad_enabled():
                bits = [Sample.apply(pre[:, k], None if noise is None else noise[:, k], m) for k, m in enumerate(modes[here])]
            else:
                bits = [sample(m, pre[:, k], None if noise is None else noise[:, k]) for k, m in enumerate(modes[here])]
            return select(torch.stack(bits, 1), lo[here], hi[here])

        return apply


def select(bits: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Bits or soft samples (...,G,H) -> levels: exactly lo where 0, exactly hi where 1, linear between.

    `lo + (hi - lo) * 1` may miss hi by a rounding, and a kept GRU unit would creep; lerp is exact at both ends.
    """
    return torch.lerp(lo, hi, bits)
