"""The recipe's `source: {main: {graph: …}}` + tensors -> Assembly: a bare tensor file's network, told as graph files tell theirs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders.assemble import Assembly, Work, leftovers
from rnn2bin.loaders.graph import GraphBuilder
from rnn2bin.recipe import LinearSource, NodeSource, SectionSource, Source
from rnn2bin.spec import DIRECTIONS, Node

if TYPE_CHECKING:
    import torch

GIVEN = ("input", "tokens", "lengths")
ACTIVATIONS = {
    "none": (),
    "relu": ("Relu",),
    "tanh": ("Tanh",),
    "sigmoid": ("Sigmoid",),
    "softmax": ("Softmax",),
    "log_softmax": ("LogSoftmax",),
    "l2": ("LpNormalization",),
    "relu_l2": ("Relu", "LpNormalization"),
}


class _Watched(dict[str, Any]):
    """A node's attributes, which remember the names that the operation asked for: others would be ignored in silence."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def build(source: Source, tensors: Mapping[str, torch.Tensor]) -> Assembly:
    """Like `assemble.build`: what does not fit comes back as reasons, all at once."""
    assert source.main is not None
    work = _GraphWork(source.main, tensors)
    output = work.nodes()
    work.reasons += leftovers(tensors, work.uses, source.ignore)
    if work.reasons:
        return Assembly(reasons=list(dict.fromkeys(work.reasons)))
    try:
        shape = work.input_shape(source.input_shape)
        built = work.builder.network(output, input_shape=shape, embedding=work.table)
    except UnsupportedError as error:
        return Assembly(reasons=list(error.reasons))
    built.reasons += work.ignored()
    return built


class _GraphWork(Work):
    """Feeds a GraphBuilder from a section of the recipe."""

    def __init__(self, source: SectionSource, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.source = source
        self.builder = GraphBuilder()
        self.values = {name: name for name in (*GIVEN, "")}  # the recipe's name -> the builder's
        self.constants: dict[tuple[str, bool], str] = {}
        self.watched: list[tuple[str, _Watched]] = []
        self.placed: list[int] = []
        self.table = self._table()
        for index, layer in enumerate(source.layers):
            spec = self.layer(f"layers.{index}", source.cell, layer)
            if spec is None:
                continue
            self.builder.layers.append(spec)
            ways = [f"layers.{index}.{way}." for way in DIRECTIONS]
            own = {name: values for name, values in self.weights.items() if name.startswith(tuple(ways))}
            self.builder.weights.append({name.removeprefix(f"layers.{index}."): values for name, values in own.items()})

    def _table(self) -> torch.Tensor | int | None:
        source = self.source
        embedding = self.embedding("main", source)
        if embedding is not None:
            return self.weights["main.embedding.weight"]
        layer = source.layers[0]
        first = self.tensors.get(layer.weight_ih or f"{layer.prefix}candidate.weight_ih")
        return first.shape[1] if source.one_hot and first is not None and first.ndim == 2 else None

    def input_shape(self, given: list[int] | None) -> tuple[int, ...]:
        """Of one step: () for tokens, what the recipe says, or the width of the first layer that reads `input` itself."""
        if self.table is not None:
            if given is not None:
                raise UnsupportedError("source.input_shape: the network reads tokens; a step of them has no sizes")
            return ()
        return tuple(given) if given is not None else (self.builder.layers[0].input_size,)

    def nodes(self) -> str:
        """The builder's name of what the nodes and the head give."""
        nodes = self.source.graph or []
        read = {name for node in nodes for name in node.inputs} | {nodes[-1].outputs[0]}
        for index, node in enumerate(nodes):
            place = f"source.main.graph.{index} ({node.op})"
            operands = [self.value(name, place) for name in node.inputs[: 1 if node.op == "Linear" else None]]
            outputs = [self.output(name, place) for name in node.outputs]
            if not read & set(node.outputs):
                self.reasons.append(f"{place}: nothing reads what it gives ({', '.join(node.outputs)})")
            if node.op == "Recurrent":
                self.recurrent(node, operands, outputs, place)
            elif node.op == "Linear":
                self.linear_node(node, operands, outputs, place)
            else:
                attributes = _Watched(node.attributes)
                self.watched.append((place, attributes))
                self.builder.nodes.append(Node(node.op, tuple(operands), tuple(outputs), attributes))
        if sorted(self.placed) != list(range(len(self.source.layers))):
            self.reasons.append(f"source.main.graph: runs the layers {self.placed}; wanted each of {len(self.source.layers)} once")
        at = self.values[nodes[-1].outputs[0]]
        for index, linear in enumerate(self.source.head):
            at = self.head_linear(at, linear, f"main.head.{index}")
        return at

    def value(self, name: str, place: str) -> str:
        """A value made before, or a tensor of the file as a constant."""
        if name in self.values:
            return self.values[name]
        tensor = self.tensors.get(name)
        if tensor is None:
            self.reasons.append(
                f"{place}: reads {name!r}, which no node before it gives and which is no tensor of the file{self.near(name)}"
            )
            return ""
        return self.constant(name, tensor)

    def near(self, name: str) -> str:
        found = difflib.get_close_matches(name, [*self.values, *self.tensors], n=1)
        return f"; did you mean {found[0]}?" if found else ""

    def constant(self, name: str, tensor: torch.Tensor, *, turned: bool = False) -> str:
        self.uses[name] = "graph"
        key = (name, turned)
        if key not in self.constants:
            try:
                self.constants[key] = self.builder.constant(tensor.t() if turned else tensor, name)
            except UnsupportedError as error:
                self.reasons += error.reasons
                return ""
        return self.constants[key]

    def output(self, name: str, place: str) -> str:
        if name in self.tensors or (name and name in self.values):
            what = "a tensor of the file" if name in self.tensors else "a value before it"
            self.reasons.append(f"{place}: gives {name!r}, which is the name of {what}; choose another")
        self.values[name] = self.builder.name(name) if name else ""
        return self.values[name]

    def recurrent(self, node: NodeSource, operands: list[str], outputs: list[str], place: str) -> None:
        """Layers one after another; the recipe's values are (B,T,·), the layers' (T,B,·)."""
        layers = node.attributes.get("layers", list(range(len(self.source.layers))))
        others = sorted(node.attributes.keys() - {"layers"})
        self.reasons += [f"{place}: takes the attribute layers only, not {name}" for name in others]
        if not isinstance(layers, list) or not layers or any(type(n) is not int or not 0 <= n < len(self.source.layers) for n in layers):
            self.reasons.append(f"{place}: layers {layers}: wanted positions in the section's {len(self.source.layers)} layers, from 0")
            return
        if not 1 <= len(operands) <= 3 or len(outputs) > 3 or (len(layers) > 1 and (len(operands) > 1 or len(outputs) > 1)):
            self.reasons.append(f"{place}: reads x, h0 and c0, gives y, h and c; of several layers together only x and y are known")
            return
        self.placed += layers
        x, *states = operands
        at = self.builder.add("Transpose", x, perm=[1, 0, 2])
        ends: list[str] = []
        for layer in layers:
            names = [self.builder.name(f"layer_{part}") for part in ("y", "h", "c")]
            self.builder.add_many("Recurrent", (at, *[*states, "", ""][:2], ""), names, layer=layer)
            at, *ends = names
        self.builder.add_many("Transpose", (at,), outputs[:1], perm=[1, 0, 2])
        for end, name in zip(ends, outputs[1:], strict=False):
            self.builder.add_many("Identity", (end,), [name])

    def linear_node(self, node: NodeSource, operands: list[str], outputs: list[str], place: str) -> None:
        if node.attributes or len(outputs) != 1 or len(node.inputs) not in (2, 3):
            self.reasons.append(f"{place}: reads a value, a tensor (out, in) and perhaps one (out,), gives one value, has no attributes")
            return
        self.product(operands[0], node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None, outputs[0], place)

    def head_linear(self, at: str, linear: LinearSource, role: str) -> str:
        at = self.product(at, linear.weight, linear.bias, self.builder.name(role), role)
        for op in ACTIVATIONS[linear.activation]:
            at = self.builder.add(op, at, axis=-1) if op in ("Softmax", "LogSoftmax", "LpNormalization") else self.builder.add(op, at)
        return at

    def product(self, at: str, weight: str, bias: str | None, output: str, place: str) -> str:
        """x Wᵀ + b as ONNX has it."""
        names = [weight, *([bias] if bias is not None else [])]
        shapes = [tuple(self.tensors[name].shape) for name in names if name in self.tensors]
        missing = [name for name in names if name not in self.tensors]
        self.reasons += [f"{place}: {name}: no such tensor in the file{self.near(name)}" for name in missing]
        if missing or len(shapes[0]) != 2 or (bias is not None and shapes[1] != shapes[0][:1]):
            self.reasons += [] if missing else [f"{place}: shapes {shapes}; wanted (out, in), and (out,) for a bias"]
            return ""
        matrix = self.constant(weight, self.tensors[weight], turned=True)
        if bias is None:
            return self.builder.add_many("MatMul", (at, matrix), [output])[0]
        shift = self.constant(bias, self.tensors[bias])
        return self.builder.add_many("Add", (self.builder.add("MatMul", at, matrix), shift), [output])[0]

    def ignored(self) -> list[str]:
        """Attributes that no operation asked for while the network was run."""
        found = [(place, name) for place, attributes in self.watched for name in attributes if name not in attributes.asked]
        return [f"{place}: the attribute {name} has no effect there" for place, name in found]
