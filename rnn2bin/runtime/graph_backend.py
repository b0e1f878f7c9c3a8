"""The native backend of networks whose layers stand in a graph: the layers run in C and skip, the nodes around them are torch's operations
(`cells.ops`), each sequence whole or in windows. docs/decisions/016-native-graphs.md says how, and what a call promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn2bin import pack
from rnn2bin.cells.network import CellState, State, ends_of, given_states, last_states, run_nodes, value_of
from rnn2bin.errors import UsageError
from rnn2bin.runtime.native_backend import Array, Handle, Opened, check_lengths
from rnn2bin.runtime.torch_backend import check_input, check_streams
from rnn2bin.spec import GraphSpec, Node

WINDOW = 512  # steps of sequences that go through a graph that may be cut: what nodes make of them stays in the caches
MOST_SETTLED = 2**20  # numbers of constants that are kept


class Model(Opened):
    """A graph around binary-gated layers. One model may serve many threads; each stream and each call has its own state."""

    def __init__(self, path: Path, *, compute: str = "auto", threads: int = 1) -> None:
        super().__init__(path, compute=compute, threads=threads)
        self.section = pack.read_around(path, self.config).entry
        self.nodes, self.constants = settled(self.graph, self.section.weights_around())
        self.ends = ends_of(self.nodes, self.graph.output)
        read = {name for node in self.nodes for name in node.inputs} | {self.graph.output}
        recurrent = [node for node in self.nodes if node.op == "Recurrent"]
        self.reads_states = [any(name in read for name in node.outputs[1:]) for node in recurrent]

    @property
    def graph(self) -> GraphSpec:
        graph = self.spec.main.graph
        assert graph is not None
        return graph

    def __call__(
        self, x: Array, state: State | None = None, *, lengths: Array | None = None, decoder_input: Array | None = None
    ) -> tuple[Array, State]:
        """x (T,B,…) floats or (T,B) tokens -> y and the state after it; see `torch_backend.Model`."""
        return self.call(x, state, lengths=lengths)

    @torch.no_grad()
    def call(
        self, x: Array, state: State | None = None, *, lengths: Array | None = None, logits: bool = False, **_: Any
    ) -> tuple[Array, State]:
        """A call with all that evaluation asks for: `logits` leaves out a last sigmoid or softmax. Arrays come back of the kind of x."""
        kind, values = _tensor(x)
        check_input(values, self.spec)
        real = None if lengths is None else torch.from_numpy(check_lengths(lengths, values.shape[1]))
        if state is not None and len(state) != len(self.spec.main.layers):
            raise UsageError("state: not one of this network")
        layers = Layers(self, state and [[tuple(_tensor(s)[1] for s in both) for both in layer] for layer in state])
        y = torch.cat([self.once(part, layers, n, logits=logits) for part, n in self._windows(values, real)])
        return kind(y), [[tuple(map(kind, both)) for both in layer] for layer in layers.states()]

    def once(self, x: Tensor, layers: Layers, lengths: Tensor | None = None, *, logits: bool = False) -> Tensor:
        """All nodes on x (T,B,…) as it is: (T',B,O) or (B,O). Layers go on from where `layers` has them."""
        layers.lengths = lengths
        values = self.constants | self.section.graph_inputs(x, lengths)
        run_nodes(self.nodes, self.ends, values, layers.recurrent)
        return self.section.graph_output(value_of(values, self.graph.output), logits=logits)

    def _windows(self, x: Tensor, lengths: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """x (T,B,…) and lengths (B,), in windows where the graph may be cut anywhere."""
        if not self.spec.main.windowed:
            return [(x, lengths)]
        size = max(1, WINDOW // max(1, x.shape[1]))
        return [(part, None if lengths is None else (lengths - k * size).clamp(0, len(part))) for k, part in enumerate(x.split(size))]

    def stream(self) -> Stream:
        """One sequence, step by step. Raises UnsupportedError for networks that must see the whole sequence first."""
        check_streams(self.spec)
        return Stream(self)


class Stream:
    """State of one sequence; `step` agrees with a call on the whole within rounding: nodes on one step may round otherwise than on many."""

    def __init__(self, model: Model) -> None:
        self.model, self.layers = model, Layers(model, None)

    @torch.no_grad()
    def step(self, x_t: Array | int) -> Array:
        """One step: an input's floats or a token -> (O,), numpy where x_t is, else a torch tensor."""
        kind, values = _tensor(x_t)
        x = values.reshape(1, 1, *values.shape)
        check_input(x, self.model.spec)
        return kind(self.model.once(x, self.layers).reshape(-1))

    def reset(self) -> None:
        """Back to the state a sequence starts from."""
        self.layers = Layers(self.model, None)


@dataclass
class Layers:
    """The layers in one stream or call: their C states, made when a layer is first reached. `start`: carried from an earlier call, else
    the graph says where a layer starts, or it starts at zero."""

    model: Model
    start: State | None
    lengths: Tensor | None = None
    parts: dict[int, list[Handle]] = field(default_factory=dict)  # of a layer, a handle for each thread's slice of the batch

    def recurrent(self, operands: list[Tensor | None], *, layer: int) -> tuple[Tensor, ...]:
        """As the oracle's `Run.recurrent`: x (T,B,I) or tokens (T,B), h0, c0, lengths -> y (T,B,D·R), and the states where the graph
        reads them."""
        spec = self.model.spec.main.layers[layer]
        x, h0, c0, lengths = [*operands, None, None, None][:4]
        x = self._checked(layer, x)
        if layer not in self.parts:
            self.parts[layer] = self._begin(layer, x, given_states(spec, x.shape[1], h0, c0))
        if sum(handle.batch for handle in self.parts[layer]) != x.shape[1]:
            raise ValueError(f"the batch of its windows changes to {x.shape[1]}")
        y = self._run(layer, x, _real(self.lengths if lengths is None else lengths, x))
        return (y, *last_states(spec, self.state(layer))) if self.model.reads_states[layer] else (y,)

    def _checked(self, layer: int, x: Tensor | None) -> Tensor:
        """x (T,B,I) of a layer, or tokens (T,B): C trusts the shape of what it is handed."""
        section = self.model.spec.main
        size = section.layers[layer].input_size
        if layer in section.token_layers:
            if x is None or x.ndim != 2 or 0 in x.shape or x.is_floating_point():
                raise ValueError("wanted tokens of shape (T,B)")
            return x.long()
        if x is None or x.ndim != 3 or x.shape[2] != size or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"wanted floats of shape (T,B,{size})")
        return x.float()

    def _begin(self, layer: int, x: Tensor, given: list[CellState] | None) -> list[Handle]:
        """States of a layer for the batch of x (T,B,I)."""
        slices = self.model.slices(x.shape[1])
        handles = [Handle(self.model, rows.stop - rows.start, len(x), layer=layer) for rows in slices]
        start: Any = self.start[layer] if self.start is not None else given
        if start is not None:
            for handle, rows in zip(handles, slices, strict=True):
                handle.write([[tuple(s[rows].numpy() for s in both) for both in start]])
        return handles

    def _run(self, layer: int, x: Tensor, lengths: Tensor | None) -> Tensor:
        handles, width = self.parts[layer], self.model.spec.main.layers[layer].output_size
        slices = self.model.slices(x.shape[1])

        def work(rows: slice) -> Tensor:
            part = x[:, rows].contiguous()
            y = torch.empty(*part.shape[:2], width)
            handles[slices.index(rows)].run(part.numpy(), None if lengths is None else lengths[rows].numpy(), y.numpy())
            return y

        pieces = self.model.share(x.shape[1], work)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def state(self, layer: int) -> list[CellState]:
        """Of each direction (h,) or (h, c), each (B,·)."""
        pieces = [handle.read()[0] for handle in self.parts[layer]]
        return [tuple(torch.from_numpy(np.concatenate(s)) for s in zip(*both, strict=True)) for both in zip(*pieces, strict=True)]

    def states(self) -> State:
        return [self.state(layer) for layer in sorted(self.parts)]


def settled(graph: GraphSpec, weights: dict[str, Tensor]) -> tuple[list[Node], dict[str, Tensor]]:
    """The nodes that depend on a call, and the values of all others, run once; what would be large is left to each call, and everything
    where a name stands for one value after another."""
    nodes, known, room = [], dict(weights), MOST_SETTLED
    made_here = ["input", "tokens", "lengths", *weights, *(name for node in graph.nodes for name in node.outputs if name)]
    if len(set(made_here)) < len(made_here):
        return list(graph.nodes), known
    for node in graph.nodes:
        made: dict[str, Tensor] = {name: known[name] for name in node.inputs if name in known}
        if node.op == "Recurrent" or any(name not in known for name in node.inputs if name):
            nodes.append(node)
            continue
        run_nodes([node], [()], made, _no_layers)
        room -= sum(made[name].numel() for name in node.outputs if name in made)
        if room < 0:
            nodes.append(node)
        else:
            known |= {name: made[name] for name in node.outputs if name in made}
    return nodes, known


def _no_layers(*_: Any, **__: Any) -> tuple[Tensor, ...]:
    raise AssertionError("a constant has no layer")


def _tensor(x: Array | int) -> tuple[Callable[[Tensor], Array], Tensor]:
    """What turns an output into the kind of x, and x as float32, int64 or what `check_input` refuses; memory is shared where it fits."""
    if isinstance(x, Tensor):
        return torch.Tensor.contiguous, x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu()
    array = np.asarray(x)
    wide = {"f": np.float32, "i": np.int64, "u": np.int64}.get(array.dtype.kind, array.dtype)
    values = torch.from_numpy(np.require(array, wide, ["C", "W"]))
    return torch.Tensor.contiguous if type(x) is int else torch.Tensor.numpy, values


def _real(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """lengths (B,) of a layer over x (T,B,I), int64."""
    if lengths is None:
        return None
    if lengths.shape != x.shape[1:2] or lengths.is_floating_point():
        raise ValueError(f"wanted {x.shape[1]} lengths, not {lengths.dtype} {tuple(lengths.shape)}")
    return lengths.long().contiguous()


def load(path: Path, *, compute: str = "auto", threads: int = 1) -> Model:
    """Raises UnsupportedError where the directory is not a whole packed model, UsageError for an unknown `compute`."""
    return Model(path, compute=compute, threads=threads)
