"""A whole network from its spec: embedding, recurrent layers, readout, linear layers; encoder–decoder included.

How a cell walks over time is an argument (`walk`): the oracle's loop here, or the training kernels of `distill/windows/`. Everything
around it (directions, lengths, states, heads) is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin.cells import feedback, gru, highway, lstm, lstm_coupled, lstm_peephole, memory, rnn
from rnn2bin.cells.family import Equations
from rnn2bin.cells.ops import MISFITS, OPS
from rnn2bin.cells.weights import Cell, Tensors, fold
from rnn2bin.errors import UnsupportedError
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.spec import DIRECTIONS, LayerSpec, Node, RnnSpec, SectionSpec

EQUATIONS: dict[str, Equations] = {**rnn.CELLS, **memory.CELLS, **highway.CELLS, **feedback.CELLS}
STEPS = {
    **{name: equations.step for name, equations in EQUATIONS.items()},
    "lstm": lstm.step,
    "lstm_peephole": lstm_peephole.step,
    "lstm_peephole_full": lstm_peephole.step,
    "lstm_coupled": lstm_coupled.step,
    "lstm_coupled_peephole": lstm_coupled.step_peephole,
    "gru": gru.step_reset_after,
    "gru_output": gru.step_output,
    "gru_reset_before": gru.step_reset_before,
}

CellState = tuple[Tensor, ...]  # (h,) or (h, c), each (B, ·)
State = list[list[CellState]]  # [layer][direction]


@dataclass(frozen=True)
class Trace:
    """One cell over a window: states (T,B,·) in the cell's order, h first; what its gates decide by, whole (T,B,G,n·H), or the products
    (T,B,G,H) with the biases (G,n·H) that are still to be added: with many copies the whole is the largest tensor there is. `noise`
    (T,B,G,n·H): what its bits were drawn with, kept where the estimator asks what was drawn (`estimators.SCORE`)."""

    states: tuple[Tensor, ...]
    products: Tensor
    biases: Tensor | None = None
    noise: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Trace]) -> Trace:
        """Windows that follow one another, as one."""
        states = tuple(torch.cat(s) for s in zip(*(part.states for part in parts), strict=True))
        return cls(states, torch.cat([part.products for part in parts]), parts[0].biases)

    @property
    def pre(self) -> Tensor:
        """Gate pre-activations (T,B,G,n·H)."""
        if self.biases is None:
            return self.products
        gates, hidden = self.products.shape[2:]
        return (self.products.unsqueeze(3) + self.biases.view(gates, -1, hidden)).flatten(3)

    def highest(self, gate: int, copies: int) -> Tensor:
        """The largest pre-activation (T,B,H) of a unit's copies: the largest bias says whose it is, as all share their product."""
        if self.biases is None:
            return self.products[:, :, gate].unflatten(-1, (copies, -1)).amax(-2)
        return self.products[:, :, gate] + self.biases[gate].view(copies, -1).amax(0)

    def lowest(self, gate: int, copies: int) -> Tensor:
        """The smallest, as `highest`."""
        if self.biases is None:
            return self.products[:, :, gate].unflatten(-1, (copies, -1)).amin(-2)
        return self.products[:, :, gate] + self.biases[gate].view(copies, -1).amin(0)

    def of_copy(self, gate: int, copies: int, copy: int | Tensor) -> Tensor:
        """The pre-activation (T,B,H) of one copy: the same of every unit, or that which an index (T,B,H) names."""
        if self.biases is None:
            every = self.products[:, :, gate].unflatten(-1, (copies, -1))
            return every[:, :, copy] if isinstance(copy, int) else every.gather(2, copy.unsqueeze(2)).squeeze(2)
        bias = self.biases[gate].view(copies, -1)
        return self.products[:, :, gate] + (bias[copy] if isinstance(copy, int) else bias.gather(0, copy.flatten(0, 1)).view_as(copy))


@dataclass(frozen=True)
class Output:
    """`y`: the section's output, (T,B,O) or (B,O) by its readout, before the last activation where `logits` was asked;
    `inputs`: what every layer read; `hidden`: every layer's h (T,B,D·R), zero at pads; `traces`: every cell's, in the section's order;
    `lengths`: the real steps (B,) of each cell's sequences, None where all are real. A graph's layers may have their own T and lengths."""

    y: Tensor
    state: State
    inputs: list[Tensor | Lookup]
    hidden: list[Tensor]
    traces: list[Trace]
    lengths: list[Tensor | None]

    @property
    def pre(self) -> list[Tensor]:
        """Every cell's gate pre-activations (T,B,G,n·H), made on each call."""
        return [trace.pre for trace in self.traces]


@dataclass(frozen=True)
class Lookup:
    """Token input before it is looked up: index (T,B) into `table` (V,E), or into one-hot vectors of width `size` where there is no table.
    Kernels may multiply the table instead of its rows."""

    index: Tensor
    table: Tensor | None
    size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.index.shape, self.size if self.table is None else self.table.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if self.table is None else self.table.dtype

    def rows(self, dtype: torch.dtype) -> Tensor:
        """(T,B,E)."""
        if self.table is None:
            return functional.one_hot(self.index.long(), self.size).to(dtype)
        return functional.embedding(self.index, self.table)

    def reversed(self, lengths: Tensor | None) -> Lookup:
        return replace(self, index=reverse(self.index, lengths))


def joined(parts: Sequence[Any]) -> Tensor | Lookup:
    """Inputs or outputs (T,B,·), one behind the other."""
    if isinstance(parts[0], Lookup):
        return replace(parts[0], index=torch.cat([part.index for part in parts]))
    return torch.cat(list(parts))


Walk = Callable[[Cell, Tensor | Lookup, CellState, Discretize], Trace]


def walk(cell: Cell, x: Tensor | Lookup, state: CellState, mode: Discretize) -> Trace:
    """The oracle: the cell's equations, step by step. x (T,B,I) or tokens.

    What a product reads is copied first: the sums of a matrix product depend on where in memory its operands begin, and a stream,
    a window and a whole sequence must agree bit for bit.
    """
    step, weights, gate = STEPS[cell.layer.cell], cell.weights(), cell.gate(mode)
    states, pres = [], []
    state = tuple(s.clone() for s in state)
    for x_t in x.rows(weights.gates_ih.dtype) if isinstance(x, Lookup) else x:
        state, pre = step(x_t.clone(), state, weights, gate)
        states.append(state)
        pres.append(pre)
    return Trace(tuple(torch.stack(s) for s in zip(*states, strict=True)), torch.stack(pres))


_oracle = walk  # `walk` is also an argument's name below


def zero_state(layer: LayerSpec, batch: int, like: Tensor) -> CellState:
    return tuple(like.new_zeros(batch, size) for size in layer.state_sizes)


def output_of(layer: LayerSpec, h: Tensor) -> Tensor:
    """The state h (…,·) of a layer -> what others read of it (…,R)."""
    if layer.kind.deep == "stack":  # of its last layer
        h = h[..., -(h.shape[-1] // layer.depth) :]
    return h if layer.kind.has_cell else fold(h, layer.copies)


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """lengths (B,) -> mask (T,B,1), true on real steps."""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths[None]).unsqueeze(-1)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T,B,…) reversed in time, each sequence within its own length, so that pads stay behind."""
    if lengths is None:
        return x.flip(0)
    at = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(at < lengths[None], lengths[None] - 1 - at, at)
    return x.gather(0, index.view(*index.shape, *[1] * (x.ndim - 2)).expand_as(x))


def _reversed(x: Tensor | Lookup, lengths: Tensor | None) -> Tensor | Lookup:
    return x.reversed(lengths) if isinstance(x, Lookup) else reverse(x, lengths)


def state_after(trace: Trace, start: CellState, lengths: Tensor | None) -> CellState:
    """Each state after the last real step, `start` where there is none. Sequences start at 0, so no pad has come before it."""
    if lengths is None:
        return tuple(s[-1] for s in trace.states)
    last, any_step = (lengths - 1).clamp_min(0)[None, :, None], (lengths > 0)[:, None]
    ends = (s.gather(0, last.expand(1, -1, s.shape[2]))[0] for s in trace.states)
    return tuple(torch.where(any_step, end, before) for end, before in zip(ends, start, strict=True))


Recurrent = Callable[..., tuple[Tensor, ...]]  # (operands, layer=…): what runs a graph's layers, the oracle's is `Run.recurrent`


def ends_of(nodes: Sequence[Node], output: str) -> list[list[str]]:
    """For each node the values that nobody reads behind it: kept until the end, they would add up."""
    last = {name: at for at, node in enumerate(nodes) for name in (*node.inputs, *node.outputs)}
    names = [{*node.inputs, *node.outputs} - {output} for node in nodes]
    return [[name for name in found if last[name] == at] for at, found in enumerate(names)]


def run_nodes(nodes: Sequence[Node], ends: Sequence[Sequence[str]], values: dict[str, Tensor], recurrent: Recurrent) -> None:
    """Runs nodes in order; `values` gets what they make and loses what `ends` says. UnsupportedError names one that does not fit."""
    for node, done in zip(nodes, ends, strict=True):
        operands = [value_of(values, name) if name else None for name in node.inputs]
        try:
            made = recurrent(operands, **node.attributes) if node.op == "Recurrent" else OPS[node.op](operands, node.attributes)
        except MISFITS as error:
            shapes = ", ".join("-" if v is None else str(tuple(v.shape)) for v in operands)
            raise UnsupportedError(f"{node.op} ({', '.join(node.outputs)}) does not run on ({shapes}): {error}") from None
        values |= zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False)
        for name in done:
            values.pop(name, None)


def value_of(values: dict[str, Tensor], name: str) -> Tensor:
    """A value of a graph. UnsupportedError where the node that names it does not make it."""
    if name not in values:
        raise UnsupportedError(f"the value {name!r} is read, but its operation gives fewer outputs than it names")
    return values[name]


def given_states(layer: LayerSpec, batch: int, h0: Tensor | None, c0: Tensor | None) -> list[CellState] | None:
    """What a graph starts a layer over a batch from, h0 (D,B,R) and c0 (D,B,H), for each direction; None where it says nothing."""
    like = c0 if h0 is None else h0
    if like is None:
        return None
    if layer.kind.deep == "stack" or "r" in layer.kind.states:
        raise UnsupportedError(f"{layer.cell}: its states are more than the h and c that a graph hands over")
    zeros = [like.new_zeros(layer.directions, batch, size) for size in (layer.recurrent_size, layer.hidden_size)]
    given = [zero if s is None else s.expand_as(zero) for s, zero in zip((h0, c0), zeros, strict=True)]
    return [
        tuple(s[at].repeat(1, size // s.shape[2]) for s, size in zip(given, layer.state_sizes, strict=False))
        for at in range(layer.directions)
    ]


def last_states(layer: LayerSpec, ends: list[CellState]) -> tuple[Tensor, ...]:
    """States of each direction -> what a graph reads of them: h (D,B,R), and of an LSTM c (D,B,H)."""
    h = torch.stack([output_of(layer, end[0]) for end in ends])
    return (h,) if len(ends[0]) == 1 else (h, torch.stack([fold(end[1], layer.copies) for end in ends]))


class Section(nn.Module):
    """embedding? -> layers -> readout -> head?."""

    def __init__(self, spec: SectionSpec, binary: Sequence[tuple[bool, ...]] | None, levels: str) -> None:
        super().__init__()
        self.spec = spec
        self.ends = ends_of(spec.graph.nodes, spec.graph.output) if spec.graph else []
        self.reads_rows = spec.graph is not None and any("input" in (*node.inputs, spec.graph.output) for node in spec.graph.nodes)
        if spec.embedding and not spec.embedding.one_hot:
            self.embedding = Tensors()
            self.embedding.weight = nn.Parameter(torch.zeros(spec.embedding.num_embeddings, spec.embedding.embedding_dim))
        plan = iter(binary or [()] * sum(layer.directions for layer in spec.layers))
        self.layers = nn.ModuleList(
            nn.ModuleDict({d: Cell(layer, next(plan), levels=levels) for d in DIRECTIONS[: layer.directions]}) for layer in spec.layers
        )
        self.head = nn.ModuleList(nn.Linear(linear.in_features, linear.out_features, bias=linear.bias) for linear in spec.head)
        if spec.graph and (unknown := sorted({node.op for node in spec.graph.nodes} - OPS.keys() - {"Recurrent"})):
            raise UnsupportedError(f"operations that this version does not run: {', '.join(unknown)}")
        if spec.graph and spec.graph.tensors:
            self.graph = Tensors()
            for name, shape in spec.graph.tensors.items():
                self.graph.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def cell(self, index: int, direction: str) -> Cell:
        return self.get_submodule(f"layers.{index}.{direction}")  # type: ignore[return-value]

    def embed(self, x: Tensor) -> Tensor | Lookup:
        """Tokens (T,B) -> what looks them up; float input (T,B,I) as it is."""
        if self.spec.embedding is None:
            return x
        return Lookup(x, None if self.spec.embedding.one_hot else self.embedding.weight, self.spec.embedding.num_embeddings)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        mode: Discretize = BINARY,
        walk: Walk = walk,
        logits: bool = False,
    ) -> Output:
        """x (T,B) tokens or (T,B,I) float; lengths (B,). No pad reaches a state or an output."""
        if self.spec.graph and self.spec.windowed and walk is _oracle and len(x) > 1:
            return self._by_steps(x, state, lengths, mode=mode, logits=logits)
        run = Run(self, state, lengths, mode, walk)
        if self.spec.graph:
            return run.output(self.run_graph(x, run.recurrent, lengths=lengths, logits=logits))
        inputs = self._inputs(x, lengths)
        for index in range(len(self.spec.layers)):
            inputs = run.layer(index, inputs)
        y = self.read(run.hidden[-1], run.state[-1], lengths)
        if walk is _oracle and y.ndim == 3:
            # One product a step on memory of its own, as a stream does it: other shapes and alignments may round differently.
            y = torch.stack([self.apply_head(y_t.clone(), logits=logits) for y_t in y])
        else:
            y = self.apply_head(y, logits=logits)
        return run.output(y)

    def _inputs(self, x: Tensor, lengths: Tensor | None) -> Tensor | Lookup:
        """What the section reads behind its embedding, floats zero at pads."""
        inputs = self.embed(x)
        if lengths is None or isinstance(inputs, Lookup):
            return inputs
        mask = valid_steps(lengths, len(x)).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        return torch.where(mask, inputs, inputs.new_zeros(()))

    def _by_steps(self, x: Tensor, state: State | None, lengths: Tensor | None, *, mode: Discretize, logits: bool) -> Output:
        """A graph that may be cut anywhere, cut at every step, as a stream does it: products of other shapes may round differently."""
        steps = []
        for t, x_t in enumerate(x):
            left = None if lengths is None else (lengths - t).clamp(0, 1)
            steps.append(self(x_t[None].clone(), state, lengths=left, mode=mode, logits=logits))
            state = steps[-1].state
        join: Callable[[str], list[Any]] = lambda name: [
            joined(parts) for parts in zip(*(getattr(one, name) for one in steps), strict=True)
        ]
        traces = [Trace.joined(parts) for parts in zip(*(one.traces for one in steps), strict=True)]
        real = [lengths] * len(traces)
        return Output(torch.cat([one.y for one in steps]), steps[-1].state, join("inputs"), join("hidden"), traces, real)

    def run_graph(self, x: Tensor, recurrent: Recurrent, *, lengths: Tensor | None = None, logits: bool = False) -> Tensor:
        """x (T,B,…) or tokens (T,B) through the graph, its layers run by `recurrent` -> (T',B,O) or (B,O)."""
        graph = self.spec.graph
        assert graph is not None
        values = self.weights_around() | self.graph_inputs(x, lengths)
        run_nodes(graph.nodes, self.ends, values, recurrent)
        return self.graph_output(value_of(values, graph.output), logits=logits)

    def weights_around(self) -> dict[str, Tensor]:
        """The graph's own weights by name."""
        return dict(self.graph.named_parameters()) if self.spec.graph and self.spec.graph.tensors else {}

    def graph_inputs(self, x: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """What a graph calls `input`, `tokens` and `lengths`."""
        assert self.spec.graph is not None
        swap = lambda v: v.transpose(0, 1) if self.spec.graph.batch_first else v
        real = lengths if lengths is not None else torch.full((x.shape[1],), len(x), device=x.device)
        values = {"tokens": swap(x), "lengths": real}
        if self.reads_rows:
            values["input"] = swap(self.rows(x, lengths))
        return values

    def rows(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens (T,B) -> their embedding (T,B,E); float input as it is, zeros at pads."""
        inputs = self._inputs(x, lengths)
        return inputs.rows(inputs.dtype) if isinstance(inputs, Lookup) else inputs

    def graph_output(self, y: Tensor, *, logits: bool) -> Tensor:
        """The graph's output value as the section's: (T',B,O) or (B,O), its activation applied."""
        graph = self.spec.graph
        assert graph is not None
        y = y.transpose(0, 1) if graph.per_step and graph.batch_first else y
        return y if logits and graph.activation in LOGITS else activate(y, graph.activation)

    def read(self, x: Tensor, last: list[CellState], lengths: Tensor | None) -> Tensor:
        """What the head sees of the last layer's output x (T,B,D·R): all steps, or (B,D·R)."""
        match self.spec.readout:
            case "all":
                return x
            case "last":
                if lengths is None:
                    return x[-1].clone()
                return x.gather(0, (lengths - 1).clamp_min(0)[None, :, None].expand(1, -1, x.shape[2]))[0]
            case "final":
                return torch.cat([output_of(self.spec.layers[-1], s[0]) for s in last], -1)
            case "mean":
                return x.mean(0) if lengths is None else x.sum(0) / lengths.clamp_min(1)[:, None].to(x.dtype)
            case _:
                mask = None if lengths is None else valid_steps(lengths, x.shape[0])
                return (x if mask is None else x.masked_fill(~mask, float("-inf"))).amax(0)

    def apply_head(self, y: Tensor, *, logits: bool) -> Tensor:
        for index, (linear, spec) in enumerate(zip(self.head, self.spec.head, strict=True)):
            y = linear(y)
            last = index + 1 == len(self.head)
            if not (logits and last and spec.activation in LOGITS):
                y = activate(y, spec.activation)
        return y


@dataclass
class Run:
    """One call of a section: what its layers share, and what they leave."""

    section: Section
    start: State | None
    lengths: Tensor | None
    mode: Discretize
    walk: Walk
    state: State = field(default_factory=list)
    inputs: list[Tensor | Lookup] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    real: list[Tensor | None] = field(default_factory=list)

    def output(self, y: Tensor) -> Output:
        return Output(y, self.state, self.inputs, self.hidden, self.traces, self.real)

    def layer(self, index: int, x: Tensor | Lookup, *, start: list[CellState] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Layer `index` over x (T,B,I) or tokens -> its outputs (T,B,D·R), zero at pads. `start`: the states it begins with where the
        call does not carry any; `lengths`: its own, where the network makes them."""
        layer, lengths = self.section.spec.layers[index], self.lengths if lengths is None else lengths
        outs, states = [], []
        for at, direction in enumerate(DIRECTIONS[: layer.directions]):
            cell, backward = self.section.cell(index, direction), direction == "bwd"
            carried = self.start[index] if self.start is not None else start
            before = carried[at] if carried else zero_state(layer, x.shape[1], cell.part("candidate").bias)
            trace = self.walk(cell, _reversed(x, lengths) if backward else x, before, self.mode)
            out = output_of(layer, trace.states[0])
            outs.append(reverse(out, lengths) if backward else out)
            states.append(state_after(trace, before, lengths))
            self.traces.append(trace)
            self.real.append(lengths)
        out = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        if lengths is not None:
            out = torch.where(valid_steps(lengths, len(out)), out, out.new_zeros(()))
        self.inputs.append(x)
        self.hidden.append(out)
        self.state.append(states)
        return out

    def recurrent(self, operands: list[Tensor | None], *, layer: int) -> tuple[Tensor, ...]:
        """A graph's layer: x (T,B,I) or tokens (T,B), h0 (D,B,R)?, c0 (D,B,H)?, lengths (B,)? -> outputs (T,B,D·R), the last h
        (D,B,R), and an LSTM's c."""
        spec = self.section.spec.layers[layer]
        x, h0, c0, lengths = [*operands, None, None, None][:4]
        assert x is not None
        looked_up = self.section.embed(x) if layer in self.section.spec.token_layers else x
        y = self.layer(layer, looked_up, start=given_states(spec, x.shape[1], h0, c0), lengths=lengths)
        return (y, *last_states(spec, self.state[-1]))


LOGITS = ("sigmoid", "softmax", "log_softmax")  # activations whose losses are computed before them


def activate(y: Tensor, name: str) -> Tensor:
    match name:
        case "relu":
            return torch.relu(y)
        case "tanh":
            return torch.tanh(y)
        case "sigmoid":
            return torch.sigmoid(y)
        case "softmax":
            return torch.softmax(y, -1)
        case "log_softmax":
            return torch.log_softmax(y, -1)
        case "l2":
            return functional.normalize(y, dim=-1)
        case "relu_l2":
            return functional.normalize(torch.relu(y), dim=-1)
        case _:
            return y


class Network(nn.Module):
    """A float teacher (`binary` None) or a student with binary gates; weights under the canonical names of `RnnSpec.tensors`.

    `binary` says for each cell, in the order of `RnnSpec.cell_names`, which gates are decisions.
    """

    def __init__(self, spec: RnnSpec, binary: dict[str, tuple[bool, ...]] | None = None, *, levels: str = "strict") -> None:
        super().__init__()
        self.spec = spec
        self.levels = levels
        self.weights = "fp16"  # int8: the layers' matrices stand on eight-bit grids
        self._output_steps: dict[int, int] = {}  # T -> T'
        for name, section in spec.sections.items():
            cells = [prefix for prefix, _ in spec.cell_names() if prefix.startswith(f"{name}.")]
            self.add_module(name, Section(section, [binary[c] for c in cells] if binary else None, levels))

    @property
    def entry(self) -> Section:
        return self.get_submodule("encoder" if self.spec.decode else "main")  # type: ignore[return-value]

    def cells(self) -> dict[str, Cell]:
        """Canonical prefix -> cell."""
        return {name: self.get_submodule(name) for name, _ in self.spec.cell_names()}  # type: ignore[misc]

    def output_steps(self, x: Tensor) -> int:
        """T' of the outputs for x (T,B,…): a graph may shorten a sequence. A network with one output a sequence has none; T is returned."""
        section = self.entry
        if section.spec.graph is None or not section.spec.per_step:
            return len(x)
        if len(x) not in self._output_steps:
            with torch.no_grad():
                self._output_steps[len(x)] = len(section(torch.zeros_like(x[:, :1]), mode=self.natural_mode).y)
        return self._output_steps[len(x)]

    @property
    def is_binary(self) -> bool:
        return any(any(cell.binary) for cell in self.cells().values())

    @property
    def natural_mode(self) -> Discretize:
        """How this network runs outside training: bits, or σ for a teacher."""
        return BINARY if self.is_binary else FLOAT

    def round_weights(self) -> None:
        """Every layer's matrices on eight-bit grids from now on; but where tokens are read: their product is a table."""
        self.weights = "int8"
        for name, cell in self.cells().items():
            section = self.spec.sections[name.split(".")[0]]
            cell.grid = "recurrent" if int(name.split(".")[2]) in section.token_layers else "all"

    def shipped(self) -> dict[str, Tensor]:
        """The state with every matrix as it is computed with."""
        rounded = {f"{prefix}.{name}": w for prefix, cell in self.cells().items() for name, w in cell.matrices().items()}
        return {**self.state_dict(), **rounded}

    def project_levels(self) -> None:
        for cell in self.cells().values():
            cell.project_levels()

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        decoder_input: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
        mode: Discretize | None = None,
        walk: Walk = walk,
        logits: bool = False,
    ) -> Output:
        """x (T,B) tokens or (T,B,I). An encoder–decoder also takes `decoder_input` (U,B): teacher forcing; `hidden` and `traces` are
        then the encoder's followed by the decoder's."""
        mode = mode or self.natural_mode
        first = self.entry(x, state, lengths=lengths, mode=mode, walk=walk, logits=logits)
        if self.spec.decode is None:
            return first
        if decoder_input is None:
            raise ValueError("an encoder–decoder needs decoder_input; use generate() to run it free")
        decoder = self.get_submodule("decoder")
        second = decoder(decoder_input, first.state, lengths=decoder_lengths, mode=mode, walk=walk, logits=logits)
        both = (getattr(first, name) + getattr(second, name) for name in ("inputs", "hidden", "traces", "lengths"))
        return Output(second.y, second.state, *both)

    @torch.no_grad()
    def generate(self, x: Tensor, *, lengths: Tensor | None = None, mode: Discretize | None = None, walk: Walk = walk) -> Tensor:
        """Greedy free-running decoding: x (T,B) -> tokens (U,B), the end token and what follows it set to `decode.end`."""
        decode, mode = self.spec.decode, mode or self.natural_mode
        if decode is None:
            raise ValueError("generate() is for encoder–decoders")
        decoder = self.get_submodule("decoder")
        state = self.entry(x, lengths=lengths, mode=mode, walk=walk).state
        token = x.new_full((1, x.shape[1]), decode.start)
        done = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        tokens = []
        for _ in range(decode.max_length):
            out = decoder(token, state, mode=mode, walk=walk, logits=True)
            state, token = out.state, out.y.argmax(-1)
            token = token.masked_fill(done, decode.end)
            done |= token[0] == decode.end
            tokens.append(token[0])
            if bool(done.all()):
                break
        return torch.stack(tokens)


def teacher_network(spec: RnnSpec, weights: dict[str, Tensor]) -> Network:
    """The float network in eval mode, without gradients."""
    network = Network(spec)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
