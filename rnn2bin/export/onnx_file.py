"""A binary-gated network as an ONNX graph: a gate is `Greater`, what it selects `Where`, a layer's walk over time a `Scan`.

Weights stand as fp16, as they are packed, each behind a `Cast`. Everything is computed in float32 in the oracle's order, so that
onnxruntime takes the same decisions but for pre-activations within a rounding of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rnn2bin.cells.network import Network, Section
from rnn2bin.cells.weights import Cell
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.spec import DIRECTIONS, LayerSpec, Node

if TYPE_CHECKING:
    from torch import Tensor

OPSET, GRAPH_OPSET = 17, 21  # operations that a graph file brought along may be newer
IR_VERSION = 8
ALL = 2**31 - 1  # a length that is given as this is the input's
PHI = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid", "softsign": "Softsign", "elu": "Elu", "identity": "Identity"}
# Operands that cells.ops also takes as attributes, as older opsets do: their place among a node's inputs.
OPERANDS = {
    "Reshape": ["shape"], "Expand": ["shape"], "Squeeze": ["axes"], "Unsqueeze": ["axes"], "Split": ["split"], "Tile": ["repeats"],
    "Slice": ["starts", "ends", "axes", "steps"], "Pad": ["pads", "value"], "Clip": ["min", "max"],
}  # fmt: skip
CASTS = {"float32": 1, "int64": 7, "bool": 9}


def write(network: Network, *, suffix: str) -> tuple[bytes, list[str]]:
    """The file's bytes, and lines that say what its inputs and outputs are. Raises UnsupportedError for encoder–decoders."""
    try:
        from onnx import checker, helper
    except ImportError:
        raise UsageError("writing .onnx files needs the onnx package: pip install rnn2bin[onnx]") from None
    if network.spec.decode is not None:
        raise UnsupportedError("an encoder–decoder, whose decoder feeds on what it writes, is not exported to ONNX")
    section = network.get_submodule("main")
    assert isinstance(section, Section)
    if others := sorted({layer.cell for layer in section.spec.layers if layer.kind.family not in ("lstm", "gru")}):
        raise UnsupportedError(f"{', '.join(others)}: such cells are not exported to ONNX; they run on both backends of this package")
    opset = GRAPH_OPSET if section.spec.graph else OPSET
    graph = _Graph(section)
    graph.build()
    proto = helper.make_graph(graph.nodes, "rnn2bin", graph.inputs, graph.outputs, graph.tensors)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION, producer_name="rnn2bin")
    try:
        checker.check_model(model, full_check=False)
    except checker.ValidationError as error:
        raise UnsupportedError(f"the network holds something that ONNX opset {opset} does not ({str(error).splitlines()[0]})") from None
    return model.SerializeToString(), graph.meaning()


@dataclass
class _Block:
    """Nodes in the making; values are names."""

    prefix: str
    nodes: list[Any] = field(default_factory=list)

    def op(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(op, *inputs, **attributes)[0]

    def ops(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        from onnx import helper

        names = [f"{self.prefix}{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=names[0], **attributes))
        return names


class _Graph(_Block):
    """The whole file."""

    def __init__(self, section: Section) -> None:
        super().__init__("v")
        self.section, self.spec = section, section.spec
        self.tensors: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._known: dict[tuple[Any, ...], str] = {}

    # --- tensors ---

    def weight(self, name: str, values: Tensor) -> str:
        """fp16 in the file, float32 for who reads it. What is packed is fp16, so nothing is rounded here; a row that units share, times the
        scale of each, is written in float32."""
        from onnx import numpy_helper

        key = ("weight", name)
        if key not in self._known:
            half = values.detach().half()
            exact = bool((half.float() == values).all())
            self.tensors.append(numpy_helper.from_array((half if exact else values.detach()).contiguous().numpy(), name))
            self._known[key] = self.op("Cast", name, to=1) if exact else name
        return self._known[key]

    def constant(self, values: Any, dtype: str = "int64") -> str:
        import numpy as np
        from onnx import numpy_helper

        array = np.asarray(values, dtype)
        key = (dtype, array.tobytes(), array.shape)
        if key not in self._known:
            self._known[key] = f"c{len(self._known)}"
            self.tensors.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def number(self, value: float) -> str:
        return self.constant(value, "float32")

    # --- the network ---

    def build(self) -> None:
        from onnx import helper

        spec, width = self.spec, list(self.spec.input_shape)
        self.inputs.append(helper.make_tensor_value_info("x", 7 if spec.embedding else 1, ["T", "B", *width]))
        self.inputs.append(helper.make_tensor_value_info("lengths", 7, ["lengths"]))  # has a default: not required
        self.steps, self.batch = (self.op("Shape", "x", start=k, end=k + 1) for k in (0, 1))
        self._default("lengths", [ALL], "int64")
        self.lengths = self.op("Min", self.op("Expand", "lengths", self.batch), self.steps)
        at = self.op(
            "Unsqueeze", self.op("Range", self.number_of(0), self.op("Squeeze", self.steps), self.number_of(1)), self.constant([1])
        )
        self.at = at  # (T,1)
        self.real = self.op("Unsqueeze", self.op("Less", at, self.lengths), self.constant([2]))  # (T,B,1)
        y = self._graph() if spec.graph else self._chain()
        self.op_named("Identity", "y", y)
        shape: list[Any] = [*(["T_out" if spec.graph else "T"] if spec.per_step else []), "B", spec.output_size]
        self.outputs.insert(0, helper.make_tensor_value_info("y", 1, shape))

    def number_of(self, value: int) -> str:
        return self.constant(value)

    def op_named(self, op: str, output: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def _default(self, name: str, values: Any, dtype: str) -> None:
        """A tensor under an input's name: its value where a call gives none."""
        import numpy as np
        from onnx import numpy_helper

        self.tensors.append(numpy_helper.from_array(np.asarray(values, dtype), name))

    def embedded(self, tokens: str = "x") -> str:
        """What the first layer reads, or one of a graph that is handed `tokens`: (T,B,I)."""
        embedding = self.spec.embedding
        if embedding is None:
            mask = self.op("Reshape", self.real, self.constant([0, 0, *[1] * len(self.spec.input_shape)]))
            return self.op("Where", mask, "x", self.number(0))
        if embedding.one_hot:
            return self.op("OneHot", tokens, self.constant([embedding.num_embeddings]), self.constant([0, 1], "float32"))
        return self.op("Gather", self.weight("embedding.weight", self.section.embedding.weight), tokens)

    def _chain(self) -> str:
        x = self.embedded()
        ends: list[list[str]] = []
        for index in range(len(self.spec.layers)):
            x, ends = self.layer(index, x)
        y = self._read(x, ends)
        for index, linear in enumerate(self.spec.head):
            module: Any = self.section.head[index]
            y = self.op("MatMul", y, self.weight(f"head.{index}.weight", module.weight.t()))
            if linear.bias:
                y = self.op("Add", y, self.weight(f"head.{index}.bias", module.bias))
            y = self.activation(y, linear.activation)
        return y

    def _read(self, x: str, ends: Sequence[Sequence[str]]) -> str:
        """What the head sees of the last layer's output x (T,B,D·R)."""
        layer, zero = self.spec.layers[-1], self.number(0)
        match self.spec.readout:
            case "all":
                return x
            case "last":
                last = self.op("Equal", self.at, self.op("Max", self.op("Sub", self.lengths, self.number_of(1)), self.number_of(0)))
                chosen = self.op("Where", self.op("Unsqueeze", last, self.constant([2])), x, zero)  # one step and zeros: the sum is exact
                return self.op("ReduceSum", chosen, self.constant([0]), keepdims=0)
            case "final":
                return self.op("Concat", *(self.output_of(self, layer, end[0]) for end in ends), axis=-1)
            case "mean":
                count = self.op("Cast", self.op("Max", self.lengths, self.number_of(1)), to=1)
                total = self.op("ReduceSum", x, self.constant([0]), keepdims=0)
                return self.op("Div", total, self.op("Unsqueeze", count, self.constant([1])))
            case _:
                masked = self.op("Where", self.real, x, self.number(float("-inf")))
                return self.op("ReduceMax", masked, axes=[0], keepdims=0)

    def activation(self, y: str, name: str) -> str:
        match name:
            case "relu" | "tanh" | "sigmoid":
                return self.op(name.capitalize(), y)
            case "softmax":
                return self.op("Softmax", y, axis=-1)
            case "log_softmax":
                return self.op("LogSoftmax", y, axis=-1)
            case "l2" | "relu_l2":
                y = self.op("Relu", y) if name == "relu_l2" else y
                square = self.op("ReduceSum", self.op("Mul", y, y), self.constant([-1]))
                return self.op("Div", y, self.op("Max", self.op("Sqrt", square), self.number(1e-12)))  # as functional.normalize
        return y

    # --- recurrent layers ---

    @staticmethod
    def output_of(block: _Block, layer: LayerSpec, h: str) -> str:
        """A state h -> what others read of it."""
        return _fold(block, layer, h) if len(layer.kind.states) == 1 else h

    def layer(self, index: int, x: str, starts: Sequence[Sequence[str]] | None = None, lengths: str = "") -> tuple[str, list[list[str]]]:
        """x (T,B,I) -> outputs (T,B,D·R), zero at pads; the last states of each direction. `starts`: first states, where the network
        makes them; `lengths`: its own."""
        layer, outs, ends = self.spec.layers[index], [], []
        real = self.real
        if lengths:
            real = self.op("Unsqueeze", self.op("Less", self.at, lengths), self.constant([2]))
        for way, direction in enumerate(DIRECTIONS[: layer.directions]):
            name = f"layers.{index}.{direction}"
            turn = lambda v: self.op("ReverseSequence", v, lengths or self.lengths, time_axis=0, batch_axis=1)
            read = turn(x) if way else x
            began = starts[way] if starts else [self._start(name, layer, k) for k in range(len(layer.kind.states))]
            out, *last = self._scan(name, self.section.cell(index, direction), read, began, real)
            outs.append(turn(out) if way else out)
            ends.append(last)
        return (self.op("Concat", *outs, axis=-1) if len(outs) > 1 else outs[0]), ends

    def _start(self, name: str, layer: LayerSpec, which: int) -> str:
        """First states: an input of its own with zeros as default where a sequence may be cut, else zeros."""
        from onnx import helper

        state, size = layer.kind.states[which], layer.state_sizes[which]
        shape = self.op("Concat", self.batch, self.constant([size]), axis=0)
        if not self.spec.windowed:
            return self.op("Expand", self.number(0), shape)
        given = f"{name}.{state}"
        self.inputs.append(helper.make_tensor_value_info(given, 1, [given, size]))
        self._default(given, [[0.0] * size], "float32")
        return self.op("Expand", given, shape)

    def _scan(self, name: str, cell: Cell, x: str, states: Sequence[str], real: str) -> list[str]:
        """One direction: outputs (T,B,R), then the last states."""
        from onnx import helper

        layer, w = cell.layer, cell.weights()
        products = [
            self.op("MatMul", x, self.weight(f"{name}.{part}.weight_ih", t.t()))
            for part, t in (("gates", w.gates_ih), ("candidate", w.candidate_ih))
        ]
        body = _Step(f"{name}.", self, cell, name)
        befores = [f"{name}.in.{state}" for state in layer.kind.states]
        reads = [f"{name}.in.gates", f"{name}.in.candidate", f"{name}.in.real"]
        made = body.step(reads[0], reads[1], befores)
        kept = [body.op("Where", reads[2], new, old) for new, old in zip(made, befores, strict=True)]
        out = body.op("Where", reads[2], self.output_of(body, layer, made[0]), self.number(0))
        sizes = [*layer.state_sizes, len(layer.kind.gates) * layer.hidden_size, layer.hidden_size]
        values = [helper.make_tensor_value_info(n, 1, ["B", size]) for n, size in zip([*befores, *reads[:2]], sizes, strict=True)]
        values.append(helper.make_tensor_value_info(reads[2], 9, ["B", 1]))
        results = [
            helper.make_tensor_value_info(n, 1, ["B", size])
            for n, size in zip([*kept, out], [*layer.state_sizes, layer.recurrent_size], strict=True)
        ]
        graph = helper.make_graph(body.nodes, name, values, results)
        *ends, outs = self.ops("Scan", *states, *products, real, outputs=len(states) + 1, body=graph, num_scan_inputs=3)
        if self.spec.windowed:
            for state, size, end in zip(layer.kind.states, layer.state_sizes, ends, strict=True):
                self.outputs.append(helper.make_tensor_value_info(self.op_named("Identity", f"{name}.{state}.out", end), 1, ["B", size]))
        return [outs, *ends]

    # --- what stands around layers that are no plain chain ---

    def _graph(self) -> str:
        graph = self.spec.graph
        assert graph is not None
        refused = sorted({node.op for node in graph.nodes} & {"Compact", "Spread"})
        if refused:
            raise UnsupportedError(f"masked steps ({', '.join(refused)}), which ONNX has no operation for")
        swap = lambda v, rank: self.op("Transpose", v, perm=[1, 0, *range(2, rank)]) if graph.batch_first else v
        rank = 2 + len(graph.input_shape)
        values = {"": "", "lengths": self.lengths}
        if self.section.reads_rows:
            values["input"] = swap(self.embedded(), 3 if self.spec.embedding else rank)
        values["tokens"] = swap("x", 2 if self.spec.embedding else rank)
        for name in graph.tensors:
            values[name] = self.weight(f"graph.{name}", getattr(self.section.graph, name))
        for node in graph.nodes:
            inputs = [values[name] for name in node.inputs]
            values |= zip(node.outputs, self._node(node, inputs), strict=False)
        y = values[graph.output]
        return self.activation(swap(y, 3) if graph.per_step else y, graph.activation)

    def _node(self, node: Node, inputs: list[str]) -> list[str]:
        attributes = dict(node.attributes)
        match node.op:
            case "Constant":
                return [self._literal(attributes)]
            case "Recurrent":
                return self._recurrent(attributes["layer"], inputs)
            case "PlainRnn":
                return self._plain_rnn(attributes, inputs)
            case "Cast":
                attributes["to"] = CASTS[attributes["to"]]
            case "ConstantOfShape":
                from onnx import numpy_helper

                array = self._array(attributes.pop("value", 0.0), attributes.pop("dtype", "float32"), [1])
                attributes["value"] = numpy_helper.from_array(array)
        places = OPERANDS.get(node.op) or (["axes"] if node.op.startswith("Reduce") else [])
        for place, name in enumerate(places, 1):
            if name in attributes:
                inputs += [""] * (place + 1 - len(inputs))
                value = attributes.pop(name)
                inputs[place] = self.number(value) if node.op in ("Pad", "Clip") and name != "pads" else self.constant(value)
        return self.ops(node.op, *inputs, outputs=len(node.outputs), **attributes)

    def _array(self, value: Any, dtype: str, shape: Sequence[int] | None = None) -> Any:
        import numpy as np

        array = np.asarray(value, dtype)
        return array.reshape(shape) if shape is not None else array

    def _literal(self, attributes: dict[str, Any]) -> str:
        return self.constant(self._array(attributes["value"], attributes["dtype"], attributes.get("shape")), attributes["dtype"])

    def _recurrent(self, index: int, inputs: list[str]) -> list[str]:
        """x (T,B,I), h0 (D,B,R)?, c0 (D,B,H)?, lengths? -> outputs (T,B,D·R), last h (D,B,R), an LSTM's last c (D,B,H)."""
        layer = self.spec.layers[index]
        x, h0, c0, lengths = [*inputs, "", "", ""][:4]
        x = self.embedded(x) if index in self.spec.token_layers else x
        starts = None
        if h0 or c0:
            starts = [
                [self._given(layer, which, way, s) for which, s in enumerate((h0, c0)[: len(layer.kind.states)])]
                for way in range(layer.directions)
            ]
        y, ends = self.layer(index, x, starts, lengths)
        stack = lambda parts: self.op("Concat", *(self.op("Unsqueeze", one, self.constant([0])) for one in parts), axis=0)
        made = [y, stack([self.output_of(self, layer, end[0]) for end in ends])]
        return made if len(ends[0]) == 1 else [*made, stack([_fold(self, layer, end[1]) for end in ends])]

    def _given(self, layer: LayerSpec, which: int, way: int, value: str) -> str:
        """A first state that the network makes (D,B or 1,·) -> (B, state) of one direction, the same for every copy."""
        size, shape = layer.state_sizes[which], self.op("Concat", self.batch, self.constant([layer.state_sizes[which]]), axis=0)
        if not value:
            return self.op("Expand", self.number(0), shape)
        one = self.op("Gather", value, self.constant(way), axis=0)
        width = layer.recurrent_size if which == 0 else layer.hidden_size
        copied = self.op("Tile", one, self.constant([1, size // width])) if size != width else one
        return self.op("Expand", copied, shape)

    def _plain_rnn(self, attributes: dict[str, Any], inputs: list[str]) -> list[str]:
        x, w, u, b, h, lengths = [*inputs, "", ""][:6]
        wide = lambda v: self.op("Unsqueeze", v, self.constant([0]))
        both = self.op("Concat", b, self.op("Mul", b, self.number(0)), axis=0)  # ONNX has two biases
        start = wide(self.op("Expand", h, self.op("Concat", self.batch, self.op("Shape", u, end=1), axis=0))) if h else ""
        counted = self.op("Cast", lengths, to=6) if lengths else ""
        width, way = self._width(inputs[2]), "reverse" if attributes.get("reverse") else "forward"
        y, last = self.ops(
            "RNN", x, wide(w), wide(u), wide(both), counted, start, outputs=2, hidden_size=width,
            activations=[attributes.get("activation", "tanh").capitalize()], direction=way,
        )  # fmt: skip
        return [self.op("Squeeze", y, self.constant([1])), self.op("Squeeze", last, self.constant([0]))]

    def _width(self, name: str) -> int:
        """The size of a constant square matrix by its value's name."""
        for node in self.nodes:
            if name in node.output and node.op_type == "Cast":
                name = node.input[0]
        return next(int(t.dims[0]) for t in self.tensors if t.name == name)

    def meaning(self) -> list[str]:
        lines = ["x (T,B) tokens" if self.spec.embedding else "x (T,B,…) floats", "lengths (B,), not required: real steps of each sequence"]
        lines.append("y (T,B,O)" if self.spec.per_step else "y (B,O)")
        if self.spec.windowed:
            lines.append("layers.K.fwd.h and .c, not required: states before the first step; ….out after the last")
        return lines


def _fold(block: _Block, layer: LayerSpec, x: str) -> str:
    """(B,n·H) over copies -> their mean (B,H)."""
    if layer.copies == 1:
        return x
    assert isinstance(block, _Graph | _Step)
    parted = block.op("Reshape", x, block.constant([-1, layer.copies, layer.hidden_size]))
    total = block.op("ReduceSum", parted, block.constant([1]), keepdims=0)
    return block.op("Div", total, block.number(layer.copies))


class _Step(_Block):
    """One step of a cell, the body of its `Scan`; constants and weights are the whole graph's."""

    def __init__(self, prefix: str, whole: _Graph, cell: Cell, name: str) -> None:
        super().__init__(prefix)
        self.whole, self.cell, self.name = whole, cell, name

    def constant(self, values: Any, dtype: str = "int64") -> str:
        return self.whole.constant(values, dtype)

    def number(self, value: float) -> str:
        return self.whole.number(value)

    def weight(self, name: str, values: Tensor) -> str:
        return self.whole.weight(f"{self.name}.{name}", values)

    def step(self, gates: str, candidate: str, states: Sequence[str]) -> list[str]:
        """Products of the input (B,G·H) and (B,H), states -> new states."""
        if self.cell.layer.cell == "gru_output":
            return self._gru_output(gates, candidate, *states)
        if self.cell.layer.kind.has_cell:
            return self._lstm(gates, candidate, *states)
        return self._gru(gates, candidate, states[0], reset_after=self.cell.layer.cell == "gru")

    def _pre(self, product: str, h: str) -> str:
        """Pre-activations (B,G,n·H), but for what peepholes add."""
        layer, w = self.cell.layer, self.cell.weights()
        count, hidden, copies = len(layer.kind.gates), layer.hidden_size, layer.copies
        whole = self.op("Add", product, self.op("MatMul", h, self.weight("gates.weight_hh", w.gates_hh.t())))
        bias = self.weight("gates.bias", w.gates_bias.view(count, copies, hidden))
        pre = self.op("Add", self.op("Reshape", whole, self.constant([-1, count, 1, hidden])), bias)
        return self.op("Reshape", pre, self.constant([-1, count, layer.width]))

    def _peek(self, k: int, gate: str, c: str) -> str:
        """What gate `k` sees of the cells c (B,n·H)."""
        layer, w = self.cell.layer, self.cell.weights()
        assert w.peephole is not None
        rows = w.peephole.unflatten(0, (-1, layer.hidden_size))[k]
        if layer.kind.peepholes == "diagonal":
            return self.op("Mul", self.weight(f"gates.peephole.{gate}", rows.repeat(layer.copies)), c)
        each_copy = rows.repeat(layer.copies, layer.copies) / layer.copies
        return self.op("MatMul", c, self.weight(f"gates.peephole.{gate}", each_copy.t()))

    def _gate(self, pre: str, k: int, c: str = "") -> str:
        """The multipliers (B,n·H) of gate `k`. `c`: the cell that it sees, where it has a peephole."""
        layer, cell, gate = self.cell.layer, self.cell, self.cell.layer.kind.gate_names[k]
        one = self.op("Gather", pre, self.constant(k), axis=1)
        if layer.kind.peepholes:
            one = self.op("Add", one, self._peek(k, gate, c))
        if cell.binary[k]:
            lo, hi = cell.level_values()
            levels = [self.weight(f"levels.{gate}.{side}", t[k]) for side, t in (("hi", hi), ("lo", lo))]
            return self.op("Where", self.op("Greater", one, self.number(0)), *levels)
        one = self._clipped(one, layer.clip)
        if layer.hard_sigmoid:
            return self.op("HardSigmoid", one, alpha=layer.hard_sigmoid / 2, beta=0.5)
        return self.op("Sigmoid", one)

    def _clipped(self, x: str, bound: float) -> str:
        return self.op("Clip", x, self.number(-bound), self.number(bound)) if bound else x

    def _squash(self, x: str) -> str:
        return self._phi(self._clipped(x, self.cell.layer.clip))

    def _phi(self, x: str) -> str:
        return self.op(PHI[self.cell.layer.activation], x)

    def _wide(self, x: str) -> str:
        """(B,H) -> (B,n·H), the same for every copy."""
        copies = self.cell.layer.copies
        return x if copies == 1 else self.op("Tile", x, self.constant([1, copies]))

    def _lstm(self, gates: str, candidate: str, h: str, c: str) -> list[str]:
        w, layer = self.cell.weights(), self.cell.layer
        pre, last = self._pre(gates, h), len(layer.kind.gates) - 1
        i = self._gate(pre, 0, c)
        f = self._gate(pre, 1, c) if last == 2 else self.op("Sub", self.number(1), i)
        recurrent = self.op("MatMul", h, self.weight("candidate.weight_hh", w.candidate_hh.t()))
        g = self._squash(self.op("Add", self.op("Add", candidate, recurrent), self.weight("candidate.bias", w.candidate_bias)))
        c = self._clipped(self.op("Add", self.op("Mul", f, c), self.op("Mul", i, self._wide(g))), layer.cell_clip)
        h = _fold(self, layer, self.op("Mul", self._gate(pre, last, c), self._phi(c)))
        if w.projection is not None:
            h = self._clipped(self.op("MatMul", h, self.weight("projection.weight", w.projection.t())), layer.proj_clip)
        return [h, c]

    def _gru(self, gates: str, candidate: str, h: str, *, reset_after: bool) -> list[str]:
        read = _fold(self, self.cell.layer, h)
        pre = self._pre(gates, read)
        return [self._updated(candidate, pre, read, h, reset_after=reset_after)]

    def _gru_output(self, gates: str, candidate: str, h: str, c: str) -> list[str]:
        pre = self._pre(gates, h)
        c = self._updated(candidate, pre, h, c, reset_after=True)
        return [_fold(self, self.cell.layer, self.op("Mul", self._gate(pre, 2), c)), c]

    def _updated(self, candidate: str, pre: str, read: str, h: str, *, reset_after: bool) -> str:
        """A GRU's new memory of the old one `h` (B,n·H) and of what is `read` (B,H)."""
        w = self.cell.weights()
        r, z = (self._gate(pre, k) for k in range(2))
        matrix, bias = self.weight("candidate.weight_hh", w.candidate_hh.t()), self.weight("candidate.bias", w.candidate_bias)
        if reset_after:
            assert w.candidate_bias_hh is not None
            recurrent = self.op("Add", self.op("MatMul", read, matrix), self.weight("candidate.bias_hh", w.candidate_bias_hh))
            reset = self.op("Mul", r, self._wide(recurrent))
            n = self._squash(self.op("Add", self._wide(self.op("Add", candidate, bias)), reset))
        else:
            recurrent = self.op("MatMul", _fold(self, self.cell.layer, self.op("Mul", r, h)), matrix)
            n = self._wide(self._squash(self.op("Add", self.op("Add", candidate, recurrent), bias)))
        rest = self.op("Sub", self.number(1), z)
        return self.op("Add", self.op("Mul", z, h), self.op("Mul", rest, n))
