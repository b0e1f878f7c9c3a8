"""ONNX operations, run on probes while a GraphBuilder is fed: what is the same at every probed size becomes a constant, `If` takes the
branch that its constant condition names, recurrent operations become layers, everything else a node.

A probe is one choice of batch and length. Values that only sizes decide (`Shape` and what follows from it) are known at each; one that is
equal at all of them folds, so that the batch and the length stay free exactly where the file leaves them so.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders.graph import MOST_ELEMENTS, GraphBuilder
from rnn2bin.loaders.onnx_proto import STANDARD, Graph, Operation

if TYPE_CHECKING:
    from torch import Tensor

MOST_HELD = 2**27  # bytes of all values that are still to be read, and twice the file's tensors
# What only moves numbers about: a state input stays one behind these.
MOVES = ("Identity", "Cast", "Gather", "Slice", "Split", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Flatten")
CASTS = {1: "float32", 10: "float32", 11: "float32", 16: "float32", 9: "bool", **dict.fromkeys((2, 3, 4, 5, 6, 7, 12, 13), "int64")}


@dataclass(frozen=True)
class Value:
    """A value of the file: what it is at each probe, and its `name` in the builder: "" for a constant, None where none can be given."""

    data: tuple[Tensor, ...]
    name: str | None = ""
    deps: frozenset[str] = frozenset()  # the inputs on whose numbers it depends
    origin: str = ""  # the input that it only rearranges
    embedded: str = ""  # of tokens: the name of their table's rows
    recurrent: bool = False  # a gated layer leads to it
    last: bool = False  # it only rearranges last states of layers
    problems: tuple[str, ...] = ()
    label: str = ""  # of a tensor in the file

    @property
    def constant(self) -> bool:
        return self.name == "" and not self.problems


@dataclass
class Tracer:
    """Runs a graph at several probes at once. `rows`: (T, B) are one axis of the file's input, N = T·B long; the names of T and B then
    come from the builder's value `counted`. `fixed_batch`: the batch that the file was made for, where it names one."""

    builder: GraphBuilder
    rows: tuple[int, ...] = ()  # N at each probe
    counted: str = "input"
    fixed_batch: int | None = None
    embedding: Tensor | int | None = None
    states: list[str] = field(default_factory=list)  # inputs that are carried states
    lengths: list[str] = field(default_factory=list)  # inputs that layers' lengths are made of
    unknown: list[str] = field(default_factory=list)  # operations that are not run
    read: list[frozenset[str]] = field(default_factory=list)  # what the layers' inputs depend on
    steps: list[tuple[int, int]] = field(default_factory=list)  # (T, B) of every layer at the first probe
    _most: int = MOST_ELEMENTS
    _most_held: int = MOST_HELD
    _held: int = 0
    _kept: int = 0  # bytes of constants that the builder has
    _emitted: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def run(self, graph: Graph, feeds: Mapping[str, Value]) -> list[Value]:
        """The graph's outputs."""
        from rnn2bin.cells import ops

        self._most = MOST_ELEMENTS + sum(t.numel() for t in graph.tensors.values())
        self._most_held = MOST_HELD + 2 * sum(t.nbytes for t in graph.tensors.values())
        limit = ops.MOST_ELEMENTS.set(self._most)
        try:
            values = self._graph(graph, ChainMap(dict(feeds)))
            return [self._find(values, name) for name in graph.outputs]
        finally:
            ops.MOST_ELEMENTS.reset(limit)

    def _graph(self, graph: Graph, values: ChainMap[str, Value]) -> MutableMapping[str, Value]:
        inside = values.new_child({name: Value((tensor,), label=name) for name, tensor in graph.tensors.items()})
        made: set[str] = set(inside.maps[0]) | {one.name for one in graph.inputs}
        ends = _ends(graph)
        begun = self._held
        for at, node in enumerate(graph.nodes):
            twice = [name for name in node.outputs if name in made]
            if twice:
                raise UnsupportedError(f"{node.op} makes {twice[0]!r}, which is there already; the file is damaged")
            made |= {name for name in node.outputs if name}
            operands = [self._find(inside, name) if name else None for name in node.inputs]
            found = dict(zip(node.outputs, self._node(node, operands, inside, graph.opset), strict=False))
            self._held += sum(map(_bytes, found.values()))
            inside |= found
            for name in ends.get(at, ()):
                self._held -= _bytes(inside.maps[0].pop(name, None))
            if self._held + self._kept > self._most_held:
                raise UnsupportedError(f"makes more than {self._most_held} bytes from a short input; refused, it would exhaust the memory")
        self._held = begun
        return inside

    def _find(self, values: Mapping[str, Value], name: str) -> Value:
        if name not in values:
            raise UnsupportedError(f"{name!r} is read, but nothing before makes it: the graph has a cycle, or its nodes are out of order")
        return values[name]

    def _node(self, node: Operation, operands: list[Value | None], values: ChainMap[str, Value], opset: int) -> Sequence[Value]:
        label = f"{node.op} ({node.name or next(filter(None, node.outputs), '')})"
        problems = tuple(dict.fromkeys(p for one in operands if one is not None for p in one.problems))
        if not problems:
            try:
                return self._made(node, operands, values, opset)
            except MemoryError:
                raise
            except UnsupportedError as error:
                problems = tuple(f"{label}: {reason}" for reason in error.reasons)
            except Exception as error:  # what torch says of operands that do not fit has many types
                problems = (f"{label} does not run on {_shapes(operands)}: {error}",)
        return [Value((), None, problems=problems)] * len(node.outputs)

    def _made(self, node: Operation, operands: list[Value | None], values: ChainMap[str, Value], opset: int) -> Sequence[Value]:
        from rnn2bin.cells.ops import OPS

        if node.domain in STANDARD and node.op in SPECIAL:
            return SPECIAL[node.op](self, node, operands, values)
        if node.domain not in STANDARD or node.op not in OPS or node.op in ("Compact", "Spread", "PlainRnn"):
            name = node.op if node.domain in STANDARD else f"{node.domain}.{node.op}"
            self.unknown.append(name)
            raise UnsupportedError("rnn2bin does not run this operation")
        if node.op in ("Softmax", "LogSoftmax") and opset < 13:
            return [self._old_softmax(node, operands[0])]
        return self.apply(node.op, operands, len(node.outputs), _plain(node), hint=next(filter(None, node.outputs), ""))

    # --- ordinary operations ---

    def apply(
        self, op: str, operands: Sequence[Value | None], count: int = 1, attributes: Mapping[str, Any] | None = None, *, hint: str = ""
    ) -> list[Value]:
        """An operation's results; a node is made unless they are constant."""
        from rnn2bin.cells.ops import OPS

        attributes = dict(attributes or {})
        constant = all(one is None or one.constant for one in operands) and op != "Shape"
        ran = []
        for probe in range(1 if constant else self.probes(operands)):
            made = OPS[op]([None if one is None else one.data[probe % len(one.data)] for one in operands], attributes)
            ran.append(made if isinstance(made, tuple) else (made,))
        if any(t.numel() > self._most for made in ran for t in made):
            raise UnsupportedError(f"makes more than {self._most} numbers from a short input; refused, it would exhaust the memory")
        results = list(zip(*ran, strict=True))[: max(count, 1)]
        if constant:
            return [Value(data) for data in results]
        sized = op in ("Shape", "Size")
        deps = frozenset() if sized else frozenset().union(*(one.deps for one in operands if one is not None))
        folded = [not deps and all(_equal(data[0], other) for other in data[1:]) for data in results]
        names: Sequence[str | None] = [None] * len(results)
        if all(folded):
            names = [""] * len(results)
        elif all(one is None or one.name is not None for one in operands):
            inputs = [self.use(one) for one in operands]
            names = self.builder.add_many(op, inputs, [self.builder.name(hint or op) for _ in results], **attributes)
        first = operands[0] if operands else None
        others = all(one is None or not one.deps for one in operands[1:])
        origin = first.origin if first is not None and op in MOVES and others else ""
        recurrent = not sized and any(one is not None and one.recurrent for one in operands)
        read = [one for one in operands if one is not None and not one.constant]
        last = recurrent and op in (*MOVES, "Concat") and all(one.last or not one.deps for one in read)
        return [
            Value(data[:1] if fold else data, "" if fold else name, deps, origin, recurrent=recurrent, last=last)
            for data, fold, name in zip(results, folded, names, strict=True)
        ]

    def probes(self, operands: Sequence[Value | None]) -> int:
        return max((len(one.data) for one in operands if one is not None), default=1)

    def one(self, op: str, *operands: Value | None, hint: str = "", **attributes: Any) -> Value:
        return self.apply(op, operands, 1, attributes, hint=hint)[0]

    def use(self, value: Value | None) -> str:
        """The builder's name of a value; a constant is made when it is first read."""
        if value is None:
            return ""
        if value.name is None:
            raise UnsupportedError(f"reads {_inputs(value.deps)}, besides the sequence itself; rnn2bin carries one real input")
        if value.name:
            return value.name
        tensor = value.data[0]
        if id(tensor) not in self._emitted:
            self._kept += 2 * tensor.nbytes
            self._emitted[id(tensor)] = (tensor, self.builder.constant(tensor, value.label or "constant"))
        return self._emitted[id(tensor)][1]

    def literal(self, numbers: Any) -> Value:
        import torch

        return Value((torch.as_tensor(numbers),))

    def _old_softmax(self, node: Operation, x: Value | None) -> Value:
        """Before opset 13 the axes from `axis` on (1 unless said) were one."""
        assert x is not None
        axis, rank = int(node.attributes.get("axis", 1)), x.data[0].ndim
        if axis in (-1, rank - 1):
            return self.one(node.op, x, axis=-1)
        flat = self.one("Flatten", x, axis=axis % rank)
        return self.one("Reshape", self.one(node.op, flat, axis=-1), self.one("Shape", x))


def _equal(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(a, b)


def _shapes(operands: Sequence[Value | None]) -> str:
    return "(" + ", ".join("-" if one is None or not one.data else str(tuple(one.data[0].shape)) for one in operands) + ")"


def _inputs(names: frozenset[str]) -> str:
    return "input " + " and ".join(repr(name) for name in sorted(names))


def _plain(node: Operation) -> dict[str, Any]:
    """A node's attributes as `cells.ops` takes them."""
    attributes = {name: value for name, value in node.attributes.items() if value is not None}
    match node.op:
        case "Cast":
            if attributes["to"] not in CASTS:
                raise UnsupportedError(f"casts to element type {attributes['to']}, which rnn2bin does not have")
            return {"to": CASTS[attributes["to"]]}
        case "ConstantOfShape":
            value = attributes.get("value")
            if value is None:
                return {}
            kind = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
            return {"value": value.flatten()[0].item(), "dtype": kind}
        case "Split" if "split" not in attributes:
            return {**attributes, "num_outputs": len(node.outputs)}
        case "EyeLike" | "CastLike" | "Dropout":
            return {}
    return attributes


# --- operations that need more than their operands' numbers ------------------------------------------------------------------------

Special = Callable[[Tracer, Operation, list[Value | None], ChainMap[str, Value]], Sequence[Value]]
SPECIAL: dict[str, Special] = {}


def special(*names: str) -> Callable[[Special], Special]:
    def enter(function: Special) -> Special:
        SPECIAL.update(dict.fromkeys(names, function))
        return function

    return enter


def must(operands: Sequence[Value | None], index: int) -> Value:
    value = operands[index] if index < len(operands) else None
    if value is None:
        raise UnsupportedError(f"its input {index} is missing")
    return value


def fixed(operands: Sequence[Value | None], index: int) -> Tensor:
    value = must(operands, index)
    if not value.constant:
        raise UnsupportedError(f"its input {index} is not constant; layers are converted whose weights stand in the file")
    return value.data[0]


@special("Constant")
def _constant(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    import torch

    for name, dtype in (
        ("value_float", torch.float32),
        ("value_floats", torch.float32),
        ("value_int", torch.int64),
        ("value_ints", torch.int64),
    ):
        if name in node.attributes:
            return [Value((torch.tensor(node.attributes[name], dtype=dtype),))]
    if not isinstance(node.attributes.get("value"), torch.Tensor):
        raise UnsupportedError("holds neither floats nor whole numbers")
    return [Value((node.attributes["value"],), label=node.outputs[0])]


@special("Dropout")
def _dropout(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    return [must(operands, 0)]


@special("Identity", "Cast")
def _same_tokens(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    x = must(operands, 0)
    (made,) = tracer.apply(node.op, [x], 1, _plain(node), hint=node.outputs[0])
    integer = made.data[0].dtype == x.data[0].dtype
    return [replace(made, embedded=x.embedded if integer else "")]


@special("Transpose")
def _transpose(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    x = must(operands, 0)
    (made,) = tracer.apply("Transpose", [x], 1, node.attributes, hint=node.outputs[0])
    if not x.embedded or made.data[0].ndim != 2:
        return [made]
    turned = list(node.attributes.get("perm", [1, 0])) == [1, 0]
    return [replace(made, embedded=tracer.builder.add("Transpose", x.embedded, perm=[1, 0, 2]) if turned else x.embedded)]


@special("Gather")
def _gather(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    """Rows of a constant table by tokens are the network's embedding."""
    table, index = must(operands, 0), must(operands, 1)
    plain = tracer.apply("Gather", operands, 1, node.attributes, hint=node.outputs[0])
    known = table.data[0] if table.constant else None
    if known is None or not index.embedded or node.attributes.get("axis", 0) or known.ndim != 2 or not known.is_floating_point():
        return plain
    if tracer.embedding is not None and tracer.embedding is not known:
        return plain
    tracer.embedding = known
    return [replace(plain[0], name=index.embedded)]


@special("OneHot")
def _one_hot(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    index, depth, levels = (must(operands, k) for k in range(3))
    plain = tracer.apply("OneHot", operands, 1, node.attributes, hint=node.outputs[0])
    last = node.attributes.get("axis", -1) in (-1, index.data[0].ndim)
    if (
        not (index.embedded and last and depth.constant and levels.constant and levels.data[0].tolist() == [0, 1])
        or tracer.embedding is not None
    ):
        return plain
    tracer.embedding = int(depth.data[0])
    return [replace(plain[0], name=index.embedded)]


@special("Reshape")
def _reshape(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    """In a file made for one batch size the shapes name it: there the batch is put back, and `settle` tells whether that was right."""
    x, shape = must(operands, 0), must(operands, 1) if len(operands) > 1 else tracer.literal(node.attributes["shape"])
    attributes = {k: v for k, v in node.attributes.items() if k != "shape"}
    if tracer.fixed_batch and shape.constant and not x.constant and not tracer.rows:
        shape = tracer.literal(_freed(shape.data[0].tolist(), [tuple(t.shape) for t in x.data], tracer.fixed_batch))
    return tracer.apply("Reshape", [x, shape], 1, attributes, hint=node.outputs[0])


def _freed(shape: list[int], found: Sequence[tuple[int, ...]], batch: int) -> list[int]:
    """`shape` with the axis that names the batch (of the file's own size) left open; `found`: the operand's shape at every probe."""
    moving = [axis for axis, sizes in enumerate(zip(*found, strict=True)) if len(set(sizes)) > 1]
    places = [k for k, n in enumerate(shape) if n == batch]
    put = lambda at, value: [value if k == at else n for k, n in enumerate(shape)]
    kept = next((k for k in places if k in moving), None)
    if kept is not None:
        return put(kept, 0)  # as it is in the operand
    if not moving or 0 in shape or (-1 in shape and not places):
        return shape
    if -1 not in shape:
        return put(places[0] if places else 0, -1)
    # The open axis becomes the size it has, where that is the same at every probe, and the batch the open one.
    sizes = {math.prod(n for axis, n in enumerate(one) if axis != moving[0]) for one in found}
    rest, size = math.prod(n for k, n in enumerate(shape) if n > 0 and k != places[0]), sizes.pop()
    if sizes or not rest or size % rest:
        return shape
    shape = put(shape.index(-1), size // rest)
    return put(places[0], -1)


@special("Expand")
def _expand(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    """In a file made for one batch size, constants (first states of zeros) were made for it: one row of them serves any."""
    x = must(operands, 0)
    if x.constant and (tracer.fixed_batch or 1) > 1:
        tensor = x.data[0]
        for axis in range(tensor.ndim):
            first = tensor.narrow(axis, 0, 1)
            if tensor.shape[axis] == tracer.fixed_batch and bool((tensor == first).all()):
                tensor = first
        x = tracer.literal(tensor)
    return tracer.apply("Expand", [x, must(operands, 1)], hint=node.outputs[0])


@special("BatchNormalization")
def _batch_norm(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    if node.attributes.get("training_mode"):
        raise UnsupportedError("stands in training mode; export the network in eval mode")
    x = must(operands, 0)
    scale, bias, mean, variance = (fixed(operands, k).double() for k in range(1, 5))
    factor = scale / (variance + node.attributes.get("epsilon", 1e-5)).sqrt()
    shape = [-1] + [1] * (x.data[0].ndim - 2)
    first, then = (tracer.literal(t.float().reshape(shape)) for t in (factor, bias - mean * factor))
    return [tracer.one("Add", tracer.one("Mul", x, first), then, hint=node.outputs[0])]


@special("If")
def _if(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    condition = must(operands, 0)
    if not condition.constant:
        if not condition.deps:
            raise UnsupportedError("its condition depends on the size of the input")
        numbers = ", ".join(f"{name}: NUMBER" for name in sorted(condition.deps))
        raise UnsupportedError(
            f"its condition depends on {_inputs(condition.deps)}; fix it in the recipe: source: {{inputs: {{{numbers}}}}}"
        )
    branch = node.attributes.get("then_branch" if bool(condition.data[0].flatten()[0]) else "else_branch")
    if not isinstance(branch, Graph) or len(branch.outputs) != len(node.outputs):
        raise UnsupportedError("its branches do not fit it")
    inside = tracer._graph(branch, values)
    return [tracer._find(inside, name) for name in branch.outputs]


def _bytes(value: Value | None) -> int:
    return sum(t.nbytes for t in value.data) if value is not None else 0


def _ends(graph: Graph) -> dict[int, list[str]]:
    """The values that nobody reads behind a node, by the node's place: kept until the end, they would add up."""
    last: dict[str, int] = {}
    for at, node in enumerate(graph.nodes):
        last |= dict.fromkeys((*node.outputs, *_reads(node)), at)
    ends: dict[int, list[str]] = {}
    for name in last.keys() - {*graph.outputs, *graph.tensors}:
        ends.setdefault(last[name], []).append(name)
    return ends


def _reads(node: Operation) -> Iterator[str]:
    """What a node reads, its branches too."""
    yield from node.inputs
    for branch in node.attributes.values():
        if isinstance(branch, Graph):
            yield from branch.outputs
            for inner in branch.nodes:
                yield from _reads(inner)
