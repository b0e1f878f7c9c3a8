"""Graph files -> Assembly: readers of ONNX, Keras and TensorFlow hand over nodes, constants and recurrent layers; here these are settled.

What a file does not say plainly (does the batch come first, is there an output a step, may sequences be cut or padded) is found by running
the float network on random input: a property that holds there to rounding is what the rest of the project relies on. A graph that computes
what a plain chain of layers, readout and linear layers computes becomes that chain, which runs everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders.assemble import BLOCKS, Assembly, split_direction
from rnn2bin.loaders.token_layers import needed, with_token_layers
from rnn2bin.spec import EmbeddingSpec, GraphSpec, LayerSpec, LinearSpec, Node, RnnSpec, SectionSpec

if TYPE_CHECKING:
    from torch import Tensor

INLINE = 16  # numbers: constants up to here are written out exactly; larger float ones are weights
MOST_LITERALS = 65536
MOST_ELEMENTS = 2**24  # of a value while a file is read, and as many as the file's tensors have
STEPS = (29, 17, 64, 128, 400)  # tried in turn: convolutions and pools need some length
BATCH = 3
TOLERANCE = 1e-6  # of outputs against their own scale; float64 sums in another order stay far below
SINGLE = 1e-4  # the same for what runs in float32
# A mean over an axis of one moves too; whether an activation may be taken from before these is tried.
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Gather", "Slice", "ReduceMean")
PEELED = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid", "Relu": "relu", "Tanh": "tanh"}


@dataclass(frozen=True)
class Direction:
    """One direction's tensors in PyTorch's gate order (LSTM i,f,g,o, or i,g,o where f = 1 − i; GRU r,z,n): weight_ih (G·H,I),
    weight_hh (G·H,R), biases (G·H,)."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    projection: Tensor | None = None  # (R,H)
    peephole: Tensor | None = None  # of the gates alone, in their order: i,f,o or i,o, one behind the other


@dataclass
class GraphBuilder:
    """Collects what a file holds. Values are named; every method that makes one returns its name."""

    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerSpec] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # of each layer: "fwd.gates.weight_ih" …
    _names: set[str] = field(default_factory=lambda: {"", "input", "tokens", "lengths"})

    def name(self, hint: str) -> str:
        """A value name that is free, made of `hint`."""
        base = "".join(c if c.isalnum() else "_" for c in hint).strip("_") or "value"
        found = next(name for name in itertools.chain([base], (f"{base}_{k}" for k in itertools.count(1))) if name not in self._names)
        self._names.add(found)
        return found

    def constant(self, values: Any, hint: str = "constant") -> str:
        """A tensor or array: large float ones are weights (trained, rounded to fp16 in the packed file), all others exact literals."""
        import torch

        values = torch.as_tensor(values)
        if values.is_floating_point():
            values = values.float()
            if not bool(torch.isfinite(values).all()):
                raise UnsupportedError(f"{hint}: holds values that are not finite in float32 (nan, inf or too large)")
        if values.is_floating_point() and values.numel() > INLINE:
            name = self.name(hint)
            self.tensors[name] = values.detach().clone(memory_format=torch.contiguous_format)
            return name
        return self.literal(values, hint)

    def literal(self, values: Any, hint: str = "literal") -> str:
        """Numbers that are kept exactly."""
        import torch

        values = torch.as_tensor(values)
        kind = "float32" if values.is_floating_point() else "bool" if values.dtype == torch.bool else "int64"
        if values.numel() > MOST_LITERALS:
            raise UnsupportedError(f"{hint}: {values.numel()} whole numbers in one constant; up to {MOST_LITERALS} are carried")
        if values.numel() == 0:  # a list of lists, of (2^40, 0) numbers say, would take memory for each
            return self.add("Constant", hint=hint, value=[], dtype=kind, shape=list(values.shape))
        return self.add("Constant", hint=hint, value=values.tolist(), dtype=kind)

    def add(self, op: str, *inputs: str, hint: str = "", **attributes: Any) -> str:
        """A node with one output."""
        return self.add_many(op, inputs, [self.name(hint or op)], **attributes)[0]

    def add_many(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Sequence[str]:
        """A node with the outputs named ("" for one that nobody reads)."""
        self._names |= set(outputs)
        self.nodes.append(Node(op, tuple(inputs), tuple(outputs), attributes))
        return outputs

    def recurrent(
        self,
        cell: str,
        x: str,
        directions: Sequence[Direction],
        *,
        h0: str = "",
        c0: str = "",
        lengths: str = "",
        hint: str = "layer",
        **options: Any,
    ) -> tuple[str, str, str]:
        """A layer over x (T,B,I): names of outputs (T,B,D·R), last h (D,B,R) and an LSTM's last c (D,B,H). h0, c0, lengths: values;
        `options`: the LayerSpec's activations and clips."""
        first = directions[0]
        hidden = first.weight_hh.shape[0] // len(BLOCKS[cell])
        proj = first.projection.shape[0] if first.projection is not None else 0
        layer = LayerSpec(cell, first.weight_ih.shape[1], hidden, len(directions), proj, **options)
        tensors: dict[str, Tensor] = {}
        for way, one in zip(("fwd", "bwd"), directions, strict=False):
            found = split_direction(cell, one.weight_ih, one.weight_hh, one.bias_ih, one.bias_hh)
            if one.projection is not None:
                found["projection.weight"] = one.projection
            if one.peephole is not None:
                found["gates.peephole"] = one.peephole
            for name, shape in layer.tensors().items():
                if tuple(found[name].shape) != shape:
                    raise UnsupportedError(f"{hint}: {name} has shape {tuple(found[name].shape)}, wanted {shape}")
                tensors[f"{way}.{name}"] = _weight(found[name], hint)
        names = [self.name(f"{hint}_{part}") for part in ("y", "h", "c")]
        self.add_many("Recurrent", (x, h0, c0, lengths), names, layer=len(self.layers))
        self.layers.append(layer)
        self.weights.append(tensors)
        return names[0], names[1], names[2]

    def network(
        self,
        output: str,
        *,
        input_shape: Sequence[int],
        batch_first: bool | None = True,
        embedding: Tensor | int | None = None,
        steps: int | None = None,
    ) -> Assembly:
        """What was collected, as a network.

        `input_shape`: of one step, behind the batch and time axes; `batch_first` None: to be found out. `embedding`: the table (V,E) whose
        rows `input` holds, or the vocabulary of one-hot tokens; None for float input. `steps`: the T that the file was made for.
        Raises UnsupportedError where the graph does not run, or mixes the sequences of a batch.
        """
        import torch

        kept, layers = self._needed(output)
        if not layers:
            raise UnsupportedError("no LSTM or GRU layer leads to the output; there is no gate to make binary")
        table = embedding if isinstance(embedding, torch.Tensor) else None
        tokens = EmbeddingSpec(*table.shape) if table is not None else None
        if isinstance(embedding, int):
            tokens = EmbeddingSpec(embedding, embedding, one_hot=True)
        read = {name for node in kept for name in node.inputs} | {output}
        weights = {f"main.graph.{name}": values for name, values in self.tensors.items() if name in read}
        if table is not None:
            weights["main.embedding.weight"] = _weight(table, "embedding")
        for new, old in enumerate(layers):
            weights |= {f"main.layers.{new}.{name}": values for name, values in self.weights[old].items()}
        shapes = {name.removeprefix("main.graph."): tuple(v.shape) for name, v in weights.items() if name.startswith("main.graph.")}
        graph = GraphSpec(kept, output, tuple(input_shape), 0, True, bool(batch_first), tensors=shapes)
        section = SectionSpec(tuple(self.layers[i] for i in layers), tokens, readout="all", graph=graph)
        return settle(section, weights, layouts=(True, False) if batch_first is None else (batch_first,), steps=steps)

    def _needed(self, output: str) -> tuple[tuple[Node, ...], list[int]]:
        """The nodes that lead to the output, layers renumbered, and which layers they are."""
        kept = needed(self.nodes, output)
        layers = [node.attributes["layer"] for node in kept if node.op == "Recurrent"]
        renumbered = [replace(n, attributes={"layer": layers.index(n.attributes["layer"])}) if n.op == "Recurrent" else n for n in kept]
        return tuple(renumbered), layers


def _weight(values: Tensor, hint: str) -> Tensor:
    import torch

    values = values.detach().float()
    if not bool(torch.isfinite(values).all()):
        raise UnsupportedError(f"{hint}: holds weights that are not finite in float32 (nan, inf or too large)")
    return values.clone(memory_format=torch.contiguous_format)


# --- what the network is, found by running it ------------------------------------------------------------------------------------


def settle(section: SectionSpec, weights: dict[str, Tensor], *, layouts: Sequence[bool], steps: int | None) -> Assembly:
    """The section with everything that running it tells; as a plain chain where it is one."""
    from rnn2bin.cells import ops

    limit = ops.MOST_ELEMENTS.set(MOST_ELEMENTS + sum(values.numel() for values in weights.values()))
    try:
        return _first_settled(section, weights, layouts, steps)
    finally:
        ops.MOST_ELEMENTS.reset(limit)


def _first_settled(section: SectionSpec, weights: dict[str, Tensor], layouts: Sequence[bool], steps: int | None) -> Assembly:
    problems: list[str] = []
    for batch_first in layouts:
        graph = section.graph
        assert graph is not None
        probe = _Probe(replace(section, graph=replace(graph, batch_first=batch_first)), weights)
        try:
            found = _settled(probe, steps)
        except UnsupportedError as error:
            problems += error.reasons
            continue
        chain = _chain(found)
        done = chain or found
        return Assembly(RnnSpec({"main": with_token_layers(done.section)}), done.weights)
    raise UnsupportedError(*dict.fromkeys(problems))


@dataclass(frozen=True)
class _Probe:
    """A section with its weights, to be run on random input."""

    section: SectionSpec
    weights: dict[str, Tensor]

    @property
    def graph(self) -> GraphSpec:
        assert self.section.graph is not None
        return self.section.graph

    def with_graph(self, **changes: Any) -> _Probe:
        return replace(self, section=replace(self.section, graph=replace(self.graph, **changes)))

    def input(self, steps: int, batch: int = BATCH) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(0)
        table = self.section.embedding
        if table is not None:
            return torch.randint(table.num_embeddings, (steps, batch), generator=generator)
        return torch.randn(steps, batch, *self.section.input_shape, generator=generator)

    def run(self, x: Tensor, state: Any = None, **options: Any) -> Any:
        """The section's Output on x (T,B,…), float gates. In float64: some networks are chaotic on random input, and what float32 rounds
        differently in another batch grows with every step."""
        import torch

        from rnn2bin.cells.network import Section
        from rnn2bin.gates.estimators import FLOAT

        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            module = Section(self.section, None, "strict")
            module.load_state_dict({name.removeprefix("main."): values for name, values in self.weights.items()})
            with torch.no_grad():
                return module.eval()(x.double() if x.is_floating_point() else x, state, mode=FLOAT, **options)
        finally:
            torch.set_default_dtype(before)

    def holds(self, test: Callable[[_Probe], bool]) -> bool:
        """Whether a property holds; one whose run fails does not."""
        try:
            return test(self)
        except (UnsupportedError, RuntimeError, IndexError, ValueError):
            return False

    def lengths(self, tried: Sequence[int] = STEPS) -> Iterator[int]:
        """The T among `tried` that run."""
        return (steps for steps in tried if self.holds(lambda p, steps=steps: p.batch_axes(steps) is not None))  # type: ignore[misc]

    def batch_axes(self, steps: int) -> list[int]:
        """The axes of the output, as the graph leaves it, that grow as the batch does. Raises UnsupportedError where it does not run."""
        raw = self.with_graph(per_step=False)
        few, more = (raw.run(raw.input(steps, batch)).y.shape for batch in (BATCH, BATCH + 2))
        axes = [i for i, (a, b) in enumerate(zip(few, more, strict=False)) if a != b]
        if len(few) != len(more) or len(axes) != 1 or (few[axes[0]], more[axes[0]]) != (BATCH, BATCH + 2):
            raise UnsupportedError(
                f"the output has shape {tuple(few)} for {BATCH} sequences of {steps} steps; wanted (batch, time, features)"
            )
        return axes

    def same(self, other: _Probe, x: Tensor) -> bool:
        return self.holds(lambda p: close(p.run(x).y, other.run(x).y))


def close(a: Tensor, b: Tensor, *, tolerance: float = TOLERANCE) -> bool:
    """Same shape, and equal but for rounding."""
    if a.shape != b.shape:
        return False
    scale = max(float(b.abs().max()) if b.numel() else 0.0, 1e-3)
    return float((a - b).abs().max()) <= tolerance * scale if a.numel() else True


def _settled(probe: _Probe, steps: int | None) -> _Probe:
    length, free = _length(probe, steps)
    probe = _with_features(probe, length, free)
    x = probe.input(length)
    y = probe.run(x).y
    # Sequences of a batch must not touch each other, else batch and time are the other way round, or the network mixes them on purpose.
    # One in the middle tells: a layer that walks over the batch changes all but the first, or backwards all but the last.
    alone = probe.run(x[:, 1:2]).y
    if not close(alone, y[:, 1:2] if probe.graph.per_step else y[1:2]):
        raise UnsupportedError("the sequences of a batch change each other's outputs; export the network with a dynamic batch axis")
    probe = probe.with_graph(output_size=y.shape[-1], steps=None if free else length)
    probe = _peeled(probe, x)
    if free and probe.graph.per_step and len(y) == length:
        probe = probe.with_graph(stepwise=probe.holds(lambda p: _is_stepwise(p, length)))
    return probe.with_graph(padded=free and probe.holds(lambda p: _is_padded(p, length)))


def _length(probe: _Probe, steps: int | None) -> tuple[int, bool]:
    """A T that runs, and whether others do."""
    error: UnsupportedError | None = None
    works: list[int] = []
    for length in dict.fromkeys((*([steps] if steps else []), *STEPS)):
        try:
            probe.batch_axes(length)
        except UnsupportedError as problem:
            error = error or problem
            continue
        works.append(length)
        if len(works) == 2:
            break
    if not works:
        raise error or UnsupportedError("the network does not run")
    return works[0], len(works) > 1


def _with_features(probe: _Probe, length: int, free: bool) -> _Probe:
    """The output as (T',B,O) or (B,O): its axes are found, and put in order by nodes at the end."""
    other = next(probe.lengths([n for n in STEPS if free and n != length]), None)
    raw = probe.with_graph(per_step=False)
    shape = tuple(raw.run(raw.input(length)).y.shape)
    moved = tuple(raw.run(raw.input(other)).y.shape) if other else shape
    (at,) = probe.batch_axes(length)
    time_axes = [i for i, (a, b) in enumerate(zip(shape, moved, strict=True)) if a != b]
    if len(time_axes) > 1 or len(shape) > 3:
        raise UnsupportedError(f"the output has shape {shape} for {BATCH} sequences of {length} steps; wanted (batch, time, features)")
    per_step = bool(time_axes) or len(shape) == 3
    if len(shape) == 3 and not time_axes:
        time_axes = [1 - at] if at < 2 else [0]  # of fixed length
    nodes, output = list(probe.graph.nodes), probe.graph.output
    features = [i for i in range(len(shape)) if i not in (at, *time_axes)]
    order = ([at, *time_axes] if probe.graph.batch_first else [*time_axes, at]) + features
    if order != list(range(len(shape))):
        nodes, output = [*nodes, Node("Transpose", (output,), ("ordered_output",), {"perm": order})], "ordered_output"
    if not features:
        nodes, output = [*nodes, Node("Unsqueeze", (output,), ("wide_output",), {"axes": [-1]})], "wide_output"
    return probe.with_graph(nodes=tuple(nodes), output=output, per_step=per_step)


def _peeled(probe: _Probe, x: Tensor) -> _Probe:
    """The last activation is kept apart: losses are computed before it. What follows it may only move numbers about."""
    graph, at = probe.graph, probe.graph.output
    while True:
        producer = next((node for node in graph.nodes if at in node.outputs), None)
        if producer is None or sum(at in node.inputs for node in graph.nodes) > (at != graph.output):
            return probe
        if producer.op in PEELED:
            break
        if producer.op not in MOVES:
            return probe
        at = producer.inputs[0]
    before = producer.inputs[0]
    shorter = tuple(
        replace(node, inputs=tuple(before if name == at else name for name in node.inputs)) for node in graph.nodes if node is not producer
    )
    output = before if at == graph.output else graph.output
    peeled = probe.with_graph(nodes=shorter, output=output, activation=PEELED[producer.op])
    return peeled if peeled.same(probe, x) else probe


def _masks(probe: _Probe) -> bool:
    """Whether some input values stand for steps to skip: random input may never hold one, so running it says nothing of them."""
    return any(node.op == "Compact" for node in probe.graph.nodes)


def _is_stepwise(probe: _Probe, length: int) -> bool:
    if _masks(probe) or any(layer.directions == 2 for layer in probe.section.layers):
        return False
    import torch

    x, cut = probe.input(length), length // 3
    first = probe.run(x[:cut])
    second = probe.run(x[cut : cut + 1], first.state)
    third = probe.run(x[cut + 1 :], second.state)
    return close(torch.cat([first.y, second.y, third.y]), probe.run(x).y)


def _is_padded(probe: _Probe, length: int) -> bool:
    """A padded batch with lengths gives what each sequence gives alone."""
    import torch

    x = probe.input(length)
    lengths = torch.tensor([length, length // 2 + 1, length - 3][:BATCH])
    y = probe.run(x, lengths=lengths).y
    for row, n in enumerate(lengths.tolist()):
        alone = probe.run(x[:n, row : row + 1]).y
        ours = y[:n, row : row + 1] if probe.graph.per_step else y[row : row + 1]
        if not close(ours, alone) or (probe.graph.per_step and len(y) != length):
            return False
    return True


# --- plain chains ---------------------------------------------------------------------------------------------------------------


def _chain(probe: _Probe) -> _Probe | None:
    """The same network without a graph, where one of the plain forms gives the same outputs."""
    layers, graph = probe.section.layers, probe.graph
    width = probe.section.embedding.embedding_dim if probe.section.embedding else layers[0].input_size
    fits = all(layer.input_size == before for layer, before in zip(layers, [width, *(one.output_size for one in layers)], strict=False))
    if (
        not fits
        or graph.steps is not None
        or _masks(probe)
        or (not probe.section.embedding and graph.input_shape != (layers[0].input_size,))
    ):
        return None
    found = list(_linears(probe))
    # The shortest sequences too: after some steps a network has forgotten the states that it began with.
    inputs = [probe.input(length) for length in (1, 2, *itertools.islice(probe.lengths(), 2))]
    for readout in ("all",) if graph.per_step else ("last", "final", "mean", "max"):
        for head in _heads(found, layers[-1].output_size, graph):
            section = SectionSpec(layers, probe.section.embedding, tuple(spec for spec, _, _ in head), readout)
            weights = {name: values for name, values in probe.weights.items() if not name.startswith("main.graph.")}
            for index, (_, matrix, bias) in enumerate(head):
                weights[f"main.head.{index}.weight"] = matrix
                if bias is not None:
                    weights[f"main.head.{index}.bias"] = bias
            plain = _Probe(section, weights)
            if inputs and all(plain.same(probe, x) for x in inputs):
                return plain
    return None


@dataclass(frozen=True)
class _Linear:
    matrix: Tensor  # (out, in)
    bias: Tensor | None
    activation: str


def _linears(probe: _Probe) -> Iterator[_Linear]:
    """Products with a constant matrix behind the first layer, in order, each with the bias and activation that follow it."""
    constants = {name: probe.weights[f"main.graph.{name}"] for name in probe.graph.tensors}
    for node in probe.graph.nodes:
        if node.op == "Constant" and node.attributes["dtype"] == "float32":
            import torch

            constants[node.outputs[0]] = torch.tensor(node.attributes["value"])
    readers: dict[str, list[Node]] = {}
    for node in probe.graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    for node in probe.graph.nodes:
        if node.op not in ("MatMul", "Gemm") or len(node.inputs) < 2 or node.inputs[1] not in constants:
            continue
        matrix = constants[node.inputs[1]]
        if matrix.ndim != 2:
            continue
        matrix = matrix if node.attributes.get("transB") else matrix.t().contiguous()
        bias = constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        after, at = _follow(readers, node.outputs[0])
        if bias is None and after is not None and after.op == "Add":
            bias = constants.get(next((name for name in after.inputs if name != at), ""))
            after, _ = _follow(readers, after.outputs[0])
        yield _Linear(matrix, bias, PEELED.get(after.op, "none") if after is not None else "none")


def _follow(readers: dict[str, list[Node]], name: str) -> tuple[Node | None, str]:
    """The one node that does something with a value, changes of shape apart, and the name that it reads the value by."""
    while len(found := readers.get(name, [])) == 1:
        if found[0].op not in ("Identity", "Dropout", "Transpose", "Squeeze", "Unsqueeze", "Reshape") or found[0].inputs[0] != name:
            return found[0], name
        name = found[0].outputs[0]
    return None, name


def _heads(linears: Sequence[_Linear], width: int, graph: GraphSpec) -> Iterator[list[tuple[LinearSpec, Tensor, Tensor | None]]]:
    """The linear layers as a head on `width` features; its last activation is the graph's."""
    head = []
    for linear in linears:
        out, wide = linear.matrix.shape
        bias = linear.bias.flatten() if linear.bias is not None else None
        if wide != width or (bias is not None and bias.numel() not in (1, out)):
            return
        bias = bias.expand(out).contiguous() if bias is not None else None
        head.append((LinearSpec(wide, out, bias is not None, linear.activation), linear.matrix, bias))
        width = out
    if width != graph.output_size:
        return
    if head:
        last = head[-1]
        head[-1] = (replace(last[0], activation=graph.activation), *last[1:])
        yield head
    elif graph.activation == "none":
        yield head
