"""What a step reads: the weights that a skipping runtime must touch, counted from the bits of real steps.

What is exact is counted: columns of zeros in h, candidate rows of closed gates, recurrent rows of closed reset gates. Token inputs touch no
input matrix (W·embedding is a table), in the dense count neither. For GRUs `incremental` is what updating the gates' pre-activations by
changed units alone would read; `touched` does not assume it.

The same count serves the report, with bits, and the density budget of training, with bits that have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rnn2bin import graph_paths
from rnn2bin.cells.network import EQUATIONS, Lookup, Network, Output, Trace, reverse, valid_steps
from rnn2bin.cells.weights import Cell
from rnn2bin.spec import DIRECTIONS, LayerSpec, SectionSpec
from rnn2bin.tasks import Prepared

Bits = Callable[[Tensor], Tensor]  # pre-activations -> 1[pre > 0]
Pairs = Callable[[Trace, int, int, int], Tensor | None]  # trace, copies, two gates -> units (T,B) of `Read.closed_and_open`; None: cannot
_NEVER = -1e9  # a pre-activation that opens nothing
_LEAST = torch.finfo(torch.float32).tiny


def bits(pre: Tensor) -> Tensor:
    """1[pre > 0] in the dtype of `pre`."""
    return (pre > 0).to(pre.dtype)


@dataclass(frozen=True)
class Count:
    """Sums over real steps, in weights; `columns` and `rows` in columns of h and candidate rows."""

    touched: Tensor
    incremental: Tensor
    dense: Tensor
    recurrent: Tensor
    recurrent_dense: Tensor
    columns: Tensor
    columns_dense: Tensor
    rows: Tensor
    rows_dense: Tensor

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Count)))


@dataclass(frozen=True)
class Read:
    """One cell over one batch, its trace and `inputs` in the cell's own order of time; `inputs` (T,B) counts non-zero values of x,
    None for tokens. `rested`: the state before the first step is zero. `pairs`: a quicker way to count
    `closed_and_open`, with the bits of who asks."""

    name: str
    cell: Cell
    trace: Trace
    inputs: Tensor | None
    lengths: Tensor | None
    rested: bool
    start: int = 0  # steps before it are not counted
    pairs: Pairs | None = None

    @property
    def mask(self) -> Tensor:
        """(T,B) float64, 1 on real steps."""
        steps, rows = self.trace.products.shape[:2]
        if self.lengths is None:
            mask = self.trace.products.new_ones(steps, rows, dtype=torch.float64)
        else:
            mask = valid_steps(self.lengths, steps)[..., 0].double()
        mask[: self.start] = 0
        return mask

    def units(self, bit: Bits, *, closed: int | None = None, opened: int | None = None) -> Tensor:
        """Units (T,B) of which any copy closes the one gate, opens the other, or does both: their row or column is read, once for all
        copies. Float64: sums over a whole part stay exact."""
        copies = self.cell.layer.copies
        if closed is None:
            assert opened is not None
            return bit(self.trace.highest(opened, copies)).sum(-1).double()
        if opened is None:
            return self.closed(closed, bit).sum(-1).double()
        found = self.pairs(self.trace, copies, closed, opened) if self.pairs else None
        return (self.closed_and_open(closed, opened, bit).sum(-1) if found is None else found).double()

    def closed(self, gate: int, bit: Bits) -> Tensor:
        """1 (T,B,H) where any copy of a unit closes this gate: for z, the units that are updated."""
        return 1 - bit(self.trace.lowest(gate, self.cell.layer.copies))

    def closed_and_open(self, gate: int, other: int, bit: Bits) -> Tensor:
        """1 (T,B,H) where any copy of a unit closes `gate` and opens `other`. The gradient goes to the copy that does so most clearly, or
        comes nearest to it."""
        copies = self.cell.layer.copies
        pre = lambda k, copy: self.trace.of_copy(k, copies, copy)
        with torch.no_grad():
            # ≤ 0 where a copy does both: an open gate is > 0, and what is subtracted tells 0 from it and changes no other number.
            both = [torch.maximum(pre(gate, copy), _LEAST - pre(other, copy)) for copy in range(copies)]
            best = torch.stack(both).min(0).indices
        return (1 - bit(pre(gate, best))) * bit(pre(other, best))


def cells(network: Network, prepared: Prepared, output: Output, *, bit: Bits = bits, pairs: Pairs | None = None) -> Iterator[Read]:
    """Every cell of the network on this batch."""
    traces, reads, real = iter(output.traces), iter(output.inputs), iter(output.lengths)
    for section, spec in network.spec.sections.items():
        below = graph_paths.layers_below(spec.graph) if spec.graph else {k: k - 1 for k in range(1, len(spec.layers))}
        emitted: dict[int, Tensor] = {}  # by layer, where its bits say it
        for index, layer in enumerate(spec.layers):
            rested = prepared.batch.first and section != "decoder" and index not in _started(spec)
            x, opened = next(reads), []
            for direction in DIRECTIONS[: layer.directions]:
                name, backward, lengths = f"{section}.layers.{index}.{direction}", direction == "bwd", next(real)
                cell, seen = network.cells()[name], _inputs(x, emitted.get(below.get(index, -1)), lengths, backward)
                read = Read(name, cell, next(traces), seen, lengths, rested, pairs=pairs)
                opened.append(_emitted(read, bit, backward=backward) if index in below.values() else None)
                yield read
            if all(o is not None for o in opened):
                emitted[index] = torch.stack([o for o in opened if o is not None]).sum(0)


def _started(spec: SectionSpec) -> set[int]:
    """Layers whose first state the graph makes."""
    nodes = spec.graph.nodes if spec.graph else ()
    return {node.attributes["layer"] for node in nodes if node.op == "Recurrent" and any(node.inputs[1:3])}


def _inputs(x: Tensor | Lookup, below: Tensor | None, lengths: Tensor | None, backward: bool) -> Tensor | None:
    """Non-zero values (T,B) of what a cell reads; the gradient is that of the layer below's bits. While gates are soft no value is 0: what
    counts is what their bits would let through."""
    if isinstance(x, Lookup):
        return None
    count = (x != 0).sum(-1).double()
    count = count if below is None else below + (count - below.detach()).clamp_max(0)
    return reverse(count, lengths) if backward else count


def _emitted(read: Read, bit: Bits, *, backward: bool) -> Tensor | None:
    """Units (T,B) whose output the layer above reads, in natural order; None where the bits do not say it."""
    layer = read.cell.layer
    if not layer.kind.closes or layer.proj_size or not read.cell.binary[-1]:
        return None
    count = read.units(bit, opened=len(layer.kind.gates) - 1)
    return reverse(count, read.lengths) if backward else count


def head(spec: SectionSpec, below: Tensor, lengths: Tensor | None) -> Count:
    """The linear layers behind every step's h (T,B,D·R): the first reads its non-zero columns."""
    mask = (
        below.new_ones(below.shape[:2], dtype=torch.float64) if lengths is None else valid_steps(lengths, below.shape[0])[..., 0].double()
    )
    steps = mask.sum()
    rest = sum(linear.in_features * linear.out_features for linear in spec.head[1:]) * steps
    touched = ((below != 0).sum(-1).double() * mask).sum() * spec.head[0].out_features + rest
    dense = steps * spec.head[0].in_features * spec.head[0].out_features + rest
    zero = torch.zeros_like(steps)
    return Count(touched, touched, dense, zero, zero, zero, zero, zero, zero)


def count(read: Read, *, bit: Bits = bits) -> Count:
    """What a cell reads over a batch. Where the state before the first step is not zero (a decoder, a later window of a text) that step
    counts as dense, since what the step before left open is not in this batch."""
    kind = read.cell.layer.kind
    if kind.name in EQUATIONS:
        return _declared(read, bit)
    return _COUNTS.get(kind.name, _lstm)(read, bit)


def _before(values: Tensor, start: float) -> Tensor:
    """values (T,B) one step later, `start` before the first."""
    return torch.cat([torch.full_like(values[:1], start), values[:-1]])


def _gate_rows(layer: LayerSpec) -> tuple[int, int]:
    """Rows of all gates' weights: of the state, of the input. What a step would read without any skipping counts a row for every unit."""
    gates = len(layer.kind.gates)
    return gates * layer.gate_rows(layer.shared), gates * layer.gate_rows(layer.shared_inputs)


def _lstm(read: Read, bit: Bits) -> Count:
    """Per step: all gate rows over the non-zero columns; a candidate row for each open input gate; the projection's columns for open o.
    Diagonal peepholes are vectors: as biases, they are not counted. Full ones are matrices over the cells that are not zero."""
    layer, mask = read.cell.layer, read.mask
    hidden, steps = layer.hidden_size, mask.sum()
    full, blocks = torch.full_like(mask, hidden), len(layer.kind.gates) * hidden
    own, asked = _gate_rows(layer)
    reads = read.units(bit, opened=len(layer.kind.gates) - 1) if read.cell.binary[-1] else full
    rows = read.units(bit, opened=0) if read.cell.binary[0] else full
    recurrent_size = layer.recurrent_size
    columns = _before(torch.full_like(mask, recurrent_size) if layer.proj_size else reads, 0 if read.rested else recurrent_size)
    recurrent = ((own + rows) * columns * mask).sum()
    recurrent_dense = (blocks + hidden) * recurrent_size * steps
    touched, dense = recurrent, recurrent_dense
    if read.inputs is not None:
        touched = touched + ((asked + rows) * read.inputs * mask).sum()
        dense = dense + (blocks + hidden) * layer.input_size * steps
    if layer.proj_size:
        touched = touched + (reads * layer.proj_size * mask).sum()
        dense = dense + hidden * layer.proj_size * steps
    if layer.kind.peepholes == "full":
        cells = _Look.of(read, bit)
        seen_cells = (blocks - hidden) * cells.before(1).sum(-1) + hidden * cells.after(1).sum(-1)
        more, more_dense = (seen_cells * mask).sum(), blocks * hidden * steps
        touched, dense, recurrent, recurrent_dense = touched + more, dense + more_dense, recurrent + more, recurrent_dense + more_dense
    seen, width = (columns * mask).sum(), recurrent_size * steps
    return Count(touched, touched, dense, recurrent, recurrent_dense, seen, width, (rows * mask).sum(), hidden * steps)


def _gru(read: Read, bit: Bits) -> Count:
    """Per step: 2H gate rows over all of h; candidate rows of units that are updated (z = 0), their recurrent half only where r = 1."""
    layer, mask = read.cell.layer, read.mask
    hidden, steps = layer.hidden_size, mask.sum()
    binary_r, binary_z = read.cell.binary
    own, asked = _gate_rows(layer)
    full = torch.full_like(mask, hidden)
    rows = read.units(bit, closed=1) if binary_z else full
    reads = read.units(bit, opened=0) if binary_r else full
    state = _before(torch.ones_like(mask), 0 if read.rested else 1)  # 0 where the state before the step is zero
    if layer.cell == "gru":
        both = read.units(bit, closed=1, opened=0) if binary_r and binary_z else rows if binary_z else reads
        candidate = both * hidden * state
    else:
        candidate = rows * reads * state
    before = _before(rows, 0 if read.rested else hidden)  # units that changed in the step before
    recurrent = ((own * hidden * state + candidate) * mask).sum()
    incremental = ((own * before + candidate) * mask).sum()
    recurrent_dense = 3 * hidden * hidden * steps
    touched, dense = recurrent, recurrent_dense
    if read.inputs is not None:
        extra = ((asked + rows) * read.inputs * mask).sum()
        touched, incremental, dense = touched + extra, incremental + extra, dense + 3 * hidden * layer.input_size * steps
    columns = (before * mask).sum()
    return Count(touched, incremental, dense, recurrent, recurrent_dense, columns, hidden * steps, (rows * mask).sum(), hidden * steps)


def _gru_output(read: Read, bit: Bits) -> Count:
    """Per step: 3H gate rows over the non-zero columns; candidate rows of units that are updated (z = 0), their recurrent half only where
    r = 1. `dense` is the GRU as it came, without an output gate."""
    layer, mask = read.cell.layer, read.mask
    hidden, steps = layer.hidden_size, mask.sum()
    binary_r, binary_z, binary_o = read.cell.binary
    own, asked = _gate_rows(layer)
    full = torch.full_like(mask, hidden)
    rows = read.units(bit, closed=1) if binary_z else full
    both = read.units(bit, closed=1 if binary_z else None, opened=0) if binary_r else rows
    columns = _before(read.units(bit, opened=2) if binary_o else full, 0 if read.rested else hidden)
    recurrent = ((own + both) * columns * mask).sum()
    recurrent_dense = 3 * hidden * hidden * steps
    touched, dense = recurrent, recurrent_dense
    if read.inputs is not None:
        touched = touched + ((asked + rows) * read.inputs * mask).sum()
        dense = dense + 3 * hidden * layer.input_size * steps
    seen = (columns * mask).sum()
    return Count(touched, touched, dense, recurrent, recurrent_dense, seen, hidden * steps, (rows * mask).sum(), hidden * steps)


_COUNTS = {"gru": _gru, "gru_reset_before": _gru, "gru_output": _gru_output}


@dataclass(frozen=True)
class _Look:
    """What `cells.family.Look` asks, of a trace."""

    read: Read
    bit: Bits
    hidden: int
    input_size: int
    depth: int

    @classmethod
    def of(cls, read: Read, bit: Bits) -> _Look:
        layer = read.cell.layer
        return cls(read, bit, layer.hidden_size, layer.input_size, layer.depth)

    def every(self, units: int) -> Tensor:
        return torch.full_like(self.read.mask, units)

    def _all_units(self) -> Tensor:
        return self.every(1).unsqueeze(-1).expand(-1, -1, self.hidden)

    def opens(self, gate: int) -> Tensor:
        if not self.read.cell.binary[gate]:
            return self._all_units()
        return self.bit(self.read.trace.highest(gate, self.read.cell.layer.copies)).double()

    def closes(self, gate: int) -> Tensor:
        return self.read.closed(gate, self.bit).double() if self.read.cell.binary[gate] else self._all_units()

    def closes_and_opens(self, gate: int, other: int) -> Tensor:
        first, second = self.read.cell.binary[gate], self.read.cell.binary[other]
        if first and second:
            return self.read.closed_and_open(gate, other, self.bit).double()
        return self.closes(gate) if first else self.opens(other)

    def _copies(self, state: int) -> Tensor:
        """Whether a state is not zero, (T,B,layers,copies,H)."""
        layer = self.read.cell.layer
        copies = layer.copies if layer.kind.states[state] == "c" or not layer.kind.has_cell else 1
        return (self.read.trace.states[state] != 0).unflatten(-1, (-1, copies, self.hidden))

    def after(self, state: int) -> Tensor:
        return self._copies(state).any(-2).flatten(2).double()

    def layers(self, units: Tensor) -> Tensor:
        return units.unflatten(-1, (-1, self.hidden))

    def before(self, state: int) -> Tensor:
        return _before(self.after(state), 0 if self.read.rested else 1)

    def reads(self, gate: int, state: int) -> Tensor:
        if not self.read.cell.binary[gate]:
            return self.before(state)
        there = _before(self._copies(state).double(), 0 if self.read.rested else 1)[:, :, 0] > 0
        pre = self.read.trace.pre[:, :, gate].unflatten(-1, (-1, self.hidden))
        return self.bit(pre.masked_fill(~there, _NEVER).amax(-2)).double()


def _declared(read: Read, bit: Bits) -> Count:
    """The matrices that the cell's equations name. What a step reads of the state before it is whole at first, as in `count`."""
    layer, mask = read.cell.layer, read.mask
    steps, zero = mask.sum(), mask.new_zeros(())
    sums = {f.name: zero for f in fields(Count)}
    seen = False
    for product in EQUATIONS[layer.cell].reads(_Look.of(read, bit)):
        height, width = product.of
        if product.candidate:
            sums["rows"], sums["rows_dense"] = sums["rows"] + (product.rows * mask).sum(), sums["rows_dense"] + height * steps
        columns = read.inputs if product.columns is None else product.columns
        if columns is None:  # tokens: a table stands for the input's columns
            continue
        touched, dense = (product.rows * columns * mask).sum(), height * width * steps
        recurrent = product.columns is not None
        for name, more in (("touched", touched), ("incremental", touched), ("dense", dense)):
            sums[name] = sums[name] + more
        if recurrent:
            sums["recurrent"], sums["recurrent_dense"] = sums["recurrent"] + touched, sums["recurrent_dense"] + dense
        if recurrent and not seen:
            sums["columns"], sums["columns_dense"], seen = (columns * mask).sum(), width * steps, True
    return Count(**sums)
