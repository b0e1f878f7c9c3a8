"""TensorFlow's operations as ours: what is constant is computed, everything else is for whoever derives from `Values`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders import graphdef
from rnn2bin.loaders.graphdef import BOOL, FLOATS, GraphNode

if TYPE_CHECKING:
    from torch import Tensor

Ref = tuple[str, int]  # a node and which of its outputs
SAME = frozenset({"Identity", "StopGradient", "Snapshot", "CheckNumerics", "PreventGradient", "EnsureShape"})
MOST_FOLDED = 2**30  # numbers that a file's constants may be computed to, all together
FREEZE = "freeze the part of the graph that runs the network for inference"


class NotConstantError(Exception):
    """A value that depends on what the network reads."""


@dataclass(frozen=True)
class Value:
    """`constant`, or the builder's value `name`.

    `lifted`: (B,F) of a loop's every step in the file, (T,B,F) here. `flipped`: the file's value is this one reversed along that axis.
    """

    name: str = ""
    constant: Tensor | None = None
    lifted: bool = False
    flipped: int | None = None


# --- operations: what TensorFlow calls by another name or with other operands ------------------------------------------------------

ALIKE = {
    **dict.fromkeys(SAME, "Identity"),
    **{
        name: name
        for name in ("Relu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Neg", "Abs", "Sign", "Floor", "Ceil", "Erf", "Elu", "Selu")
    },
    **{name: name for name in ("Softplus", "Softsign", "Softmax", "LogSoftmax", "Sin", "Cos", "Reciprocal", "Shape", "Range")},
    **{name: name for name in ("Add", "Sub", "Mul", "Pow", "Greater", "Less", "Equal")},
    "AddV2": "Add",
    "BiasAdd": "Add",
    "RealDiv": "Div",
    "Div": "Div",
    "FloorDiv": "Div",
    "Maximum": "Max",
    "Minimum": "Min",
    "GreaterEqual": "GreaterOrEqual",
    "LessEqual": "LessOrEqual",
    "LogicalAnd": "And",
    "LogicalOr": "Or",
    "LogicalNot": "Not",
    "Inv": "Reciprocal",
    "Rint": "Round",
    "SelectV2": "Where",
    "Select": "Where",
    "BatchMatMul": "MatMul",
    "BatchMatMulV2": "MatMul",
    "Tile": "Tile",
}
# What means the same for one step and for all steps at once.
LIFTED = frozenset(ALIKE.values()) - {"Shape", "Range", "Tile", "Equal"} | {"MatMul", "Concat", "Clip", "LeakyRelu", "Identity"}
Handler = Callable[["Values", GraphNode, "list[Value]"], "Value | tuple[Value, ...]"]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def _whole(value: Value, node: GraphNode) -> list[int]:
    """The numbers of an operand that must be constant."""
    if value.constant is None:
        raise UnsupportedError(f"{node.op} ({node.name}): its axes or sizes depend on the input; rnn2bin needs them constant")
    return [int(n) for n in value.constant.flatten().tolist()]


@handles("MatMul")
def _matmul(do: Values, node: GraphNode, values: list[Value]) -> Value:
    a, b = (
        do("Transpose", v, perm=[1, 0]) if node.attributes.get(f"transpose_{side}") else v for v, side in zip(values, "ab", strict=True)
    )
    if b.lifted:
        raise UnsupportedError(f"MatMul ({node.name}): a loop multiplies by what it computes itself")
    return do("MatMul", a, b)


@handles("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(do: Values, node: GraphNode, values: list[Value]) -> Value:
    """Of three axes where it transposes, which attention has."""
    a, b = (do("Transpose", v, perm=[0, 2, 1]) if node.attributes.get(f"adj_{side}") else v for v, side in zip(values, "xy", strict=True))
    return do("MatMul", a, b)


@handles("BiasAdd")
def _bias_add(do: Values, node: GraphNode, values: list[Value]) -> Value:
    if node.attributes.get("data_format") == b"NCHW":
        raise UnsupportedError(f"BiasAdd ({node.name}): channels first (NCHW) is not read")
    return do("Add", *values)


@handles("ConcatV2", "Concat")
def _concat(do: Values, node: GraphNode, values: list[Value]) -> Value:
    axis, parts = (values[-1], values[:-1]) if node.op == "ConcatV2" else (values[0], values[1:])
    (at,) = _whole(axis, node)
    if any(part.lifted for part in parts):
        if at not in (1, -1):
            raise UnsupportedError(f"Concat ({node.name}): inside a loop only features can be joined")
        at = -1
    return do("Concat", *parts, axis=at)


@handles("Pack")
def _pack(do: Values, node: GraphNode, values: list[Value]) -> Value:
    axis = node.attributes.get("axis", 0)
    return do("Concat", *(do("Unsqueeze", v, axes=[axis]) for v in values), axis=axis)


@handles("Unpack")
def _unpack(do: Values, node: GraphNode, values: list[Value]) -> tuple[Value, ...]:
    axis = node.attributes.get("axis", 0)
    return tuple(do("Gather", values[0], do.literal(k), axis=axis) for k in range(_bounded(node, node.attributes["num"])))


def _bounded(node: GraphNode, count: int) -> int:
    if not 0 < count <= 65536:
        raise UnsupportedError(f"{node.op} ({node.name}): {count} outputs")
    return count


@handles("ExpandDims")
def _expand_dims(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Unsqueeze", values[0], axes=_whole(values[1], node))


@handles("Squeeze")
def _squeeze(do: Values, node: GraphNode, values: list[Value]) -> Value:
    axes = node.attributes.get("squeeze_dims") or node.attributes.get("axis")
    return do("Squeeze", values[0], **({"axes": axes} if axes else {}))


@handles("Reshape")
def _reshape(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Reshape", *values, allowzero=1)


@handles("Transpose")
def _transpose(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Transpose", values[0], perm=_whole(values[1], node))


@handles("Gather", "GatherV2", "ResourceGather")
def _gather(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Gather", values[0], values[1], axis=_whole(values[2], node)[0] if len(values) > 2 else 0)


@handles("Split")
def _split(do: Values, node: GraphNode, values: list[Value]) -> tuple[Value, ...]:
    count = _bounded(node, node.attributes["num_split"])
    return do.many("Split", [values[1]], count, axis=_whole(values[0], node)[0], num_outputs=count)


@handles("SplitV")
def _split_sizes(do: Values, node: GraphNode, values: list[Value]) -> tuple[Value, ...]:
    sizes = _whole(values[1], node)
    return do.many("Split", [values[0]], len(sizes), axis=_whole(values[2], node)[0], split=sizes)


@handles("Slice")
def _slice(do: Values, node: GraphNode, values: list[Value]) -> Value:
    starts, sizes = (_whole(v, node) for v in values[1:])
    ends = [2**31 if size < 0 else start + size for start, size in zip(starts, sizes, strict=True)]
    return do("Slice", values[0], starts=starts, ends=ends)


@handles("StridedSlice")
def _strided_slice(do: Values, node: GraphNode, values: list[Value]) -> Value:
    begin, end, stride = (_whole(v, node) for v in values[1:])
    mask = lambda name, at: bool(node.attributes.get(f"{name}_mask", 0) >> at & 1)
    starts, ends, axes, steps, axis = [], [], [], [], 0
    gone: list[int] = []
    new: list[int] = []
    for at, (a, b, step) in enumerate(zip(begin, end, stride, strict=True)):
        if mask("ellipsis", at):
            if any(mask("new_axis", k) for k in range(len(begin))):
                raise UnsupportedError(f"StridedSlice ({node.name}): an ellipsis and a new axis in one")
            axis = at + 1 - len(begin)  # the axes behind it are counted from the end
            continue
        if mask("new_axis", at):
            new.append(axis + len(new) - len(gone))
            continue
        single = mask("shrink_axis", at)
        starts.append((0 if step > 0 else 2**31) if mask("begin", at) and not single else a)
        ends.append((a + 1 or 2**31) if single else (2**31 if step > 0 else -(2**31)) if mask("end", at) else b)
        axes.append(axis)
        steps.append(1 if single else step)
        gone += [axis] if single else []
        axis += 1
    y = do("Slice", values[0], starts=starts, ends=ends, axes=axes, steps=steps) if axes else values[0]
    y = do("Squeeze", y, axes=gone) if gone else y
    return do("Unsqueeze", y, axes=new) if new else y


@handles("Mean", "Sum", "Max", "Min", "Prod")
def _reduce(do: Values, node: GraphNode, values: list[Value]) -> Value:
    keep = int(bool(node.attributes.get("keep_dims")))
    return do(f"Reduce{node.op}", values[0], axes=_whole(values[1], node), keepdims=keep, noop_with_empty_axes=1)


@handles("Cast")
def _cast(do: Values, node: GraphNode, values: list[Value]) -> Value:
    kind = node.attributes.get("DstT")
    return do("Cast", values[0], to="float32" if kind in FLOATS else "bool" if kind == BOOL else "int64")


@handles("Fill")
def _fill(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Expand", values[1], values[0])


@handles("ZerosLike")
def _zeros_like(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Sub", values[0], values[0])


@handles("Square")
def _square(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Mul", values[0], values[0])


@handles("SquaredDifference")
def _squared_difference(do: Values, node: GraphNode, values: list[Value]) -> Value:
    d = do("Sub", *values)
    return do("Mul", d, d)


@handles("Rsqrt")
def _rsqrt(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Reciprocal", do("Sqrt", values[0]))


@handles("AddN")
def _add_n(do: Values, node: GraphNode, values: list[Value]) -> Value:
    y = values[0]
    for other in values[1:]:
        y = do("Add", y, other)
    return y


@handles("Relu6")
def _relu6(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("Clip", values[0], min=0.0, max=6.0)


@handles("LeakyRelu")
def _leaky_relu(do: Values, node: GraphNode, values: list[Value]) -> Value:
    return do("LeakyRelu", values[0], alpha=node.attributes.get("alpha", 0.2))


@handles("Pad", "PadV2")
def _pad(do: Values, node: GraphNode, values: list[Value]) -> Value:
    pairs = _whole(values[1], node)
    return do("Pad", values[0], pads=pairs[::2] + pairs[1::2])


@handles("OneHot")
def _one_hot(do: Values, node: GraphNode, values: list[Value]) -> Value:
    levels = do("Concat", *(do("Unsqueeze", v, axes=[0]) for v in (values[3], values[2])), axis=0)
    return do("OneHot", values[0], values[1], levels, axis=node.attributes.get("axis", -1))


@handles("ReverseV2")
def _reverse(do: Values, node: GraphNode, values: list[Value]) -> Value:
    axes = _whole(values[1], node)
    if len(axes) != 1:
        raise UnsupportedError(f"ReverseV2 ({node.name}): reverses {len(axes)} axes")
    return do.flip(values[0], axes[0])


@handles("Conv2D", "MaxPool", "AvgPool")
def _windowed(do: Values, node: GraphNode, values: list[Value]) -> Value:
    """Channels last; a one-dimensional one is written with an axis of 1."""
    if node.attributes.get("data_format", b"NHWC") != b"NHWC" or node.attributes.get("padding") not in (b"SAME", b"VALID"):
        raise UnsupportedError(f"{node.op} ({node.name}): only channels last (NHWC) with padding SAME or VALID is read")
    options: dict[str, Any] = {"strides": node.attributes["strides"][1:3]}
    options |= {"auto_pad": "SAME_UPPER"} if node.attributes["padding"] == b"SAME" else {}
    x = do("Transpose", values[0], perm=[0, 3, 1, 2])
    if node.op == "Conv2D":
        options["dilations"] = (node.attributes.get("dilations") or [1, 1, 1, 1])[1:3]
        y = do("Conv", x, do("Transpose", values[1], perm=[3, 2, 0, 1]), **options)
    else:
        name = "MaxPool" if node.op == "MaxPool" else "AveragePool"
        y = do(name, x, kernel_shape=node.attributes["ksize"][1:3], **options)
    return do("Transpose", y, perm=[0, 2, 3, 1])


@handles("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_norm(do: Values, node: GraphNode, values: list[Value]) -> Value:
    """(x − mean)·scale/√(variance + ε) + offset, as at inference."""
    if node.attributes.get("is_training", True) or node.attributes.get("data_format", b"NHWC") != b"NHWC":
        raise UnsupportedError(f"{node.op} ({node.name}): frozen in training mode, or channels first")
    x, scale, offset, mean, variance = values[:5]
    epsilon = do.literal(node.attributes.get("epsilon", 1e-4))
    factor = do("Mul", scale, do("Reciprocal", do("Sqrt", do("Add", variance, epsilon))))
    return do("Add", do("Mul", do("Sub", x, mean), factor), offset)


# --- values: constants are computed, everything else is left to the importer --------------------------------------------------------


class Values:
    """Values of a graph's nodes, each made once. Alone it knows constants, and what `given` sets."""

    def __init__(self, nodes: dict[str, GraphNode], given: dict[Ref, Value] | None = None) -> None:
        self.nodes = nodes
        self.made: dict[Ref, Value] = dict(given or {})
        self.folded = 0

    def value(self, ref: Ref) -> Value:
        if ref not in self.made:
            node = self.node(ref)
            found = self.of(node, ref)
            self.made |= {(node.name, k): v for k, v in enumerate(found)} if isinstance(found, tuple) else {ref: found}
            if ref not in self.made:
                raise UnsupportedError(f"{node.op} ({node.name}) has no output {ref[1]}")
        return self.made[ref]

    def node(self, ref: Ref) -> GraphNode:
        if ref[0] not in self.nodes:
            raise UnsupportedError(f"a node reads {ref[0]!r}, which the file does not hold; {FREEZE}")
        return self.nodes[ref[0]]

    def of(self, node: GraphNode, ref: Ref) -> Value | tuple[Value, ...]:
        from rnn2bin.cells.ops import MISFITS

        if node.op == "Const":
            stored = node.attributes.get("value")
            if not isinstance(stored, graphdef.Stored):
                raise UnsupportedError(f"Const ({node.name}) holds no tensor")
            return Value(constant=graphdef.tensor(stored))
        if node.op == "PlaceholderWithDefault" or node.op in ("Enter", "RefEnter"):
            return self.value(node.inputs[0])
        if node.op not in HANDLERS and node.op not in ALIKE:
            return self.other(node, ref)
        values = [self.value(one) for one in node.inputs]
        try:
            return HANDLERS[node.op](self, node, values) if node.op in HANDLERS else self(ALIKE[node.op], *values)
        except MISFITS as error:
            raise UnsupportedError(f"{node.op} ({node.name}) is not as TensorFlow writes it ({error})") from None

    def other(self, node: GraphNode, ref: Ref) -> Value | tuple[Value, ...]:
        raise NotConstantError(node.op)

    def constant(self, ref: Ref) -> Tensor | None:
        """What a value is, where it does not depend on what the network reads."""
        try:
            return self.value(ref).constant
        except (NotConstantError, UnsupportedError):
            return None

    def literal(self, numbers: Any) -> Value:
        import torch

        return Value(constant=torch.tensor(numbers))

    def flip(self, value: Value, axis: int) -> Value:
        if value.lifted or value.flipped not in (None, axis):
            raise UnsupportedError("a value reversed along two axes, or inside a loop")
        if value.constant is not None:
            return Value(constant=value.constant.flip(axis))
        return replace(value, flipped=axis if value.flipped is None else None)

    def __call__(self, op: str, *values: Value, **attributes: Any) -> Value:
        return self.many(op, values, 1, **attributes)[0]

    def many(self, op: str, values: Sequence[Value], count: int, **attributes: Any) -> tuple[Value, ...]:
        """An operation under ONNX's name, computed at once where all its operands are constant."""
        from rnn2bin.cells.ops import MISFITS, OPS

        constants = [v.constant for v in values if v.constant is not None]
        if len(constants) == len(values):
            try:
                self.folded += _size(op, constants, attributes)
                if self.folded > MOST_FOLDED:
                    raise UnsafeError("the file's constants compute to more than 2^30 numbers; refused, it would exhaust the memory")
                made = OPS[op](constants, attributes)
            except MISFITS as error:
                raise UnsupportedError(f"{op} does not run on the file's constants ({error})") from None
            return tuple(Value(constant=t) for t in (made if isinstance(made, tuple) else (made,)))
        return self.add(op, values, count, attributes)

    def add(self, op: str, values: Sequence[Value], count: int, attributes: dict[str, Any]) -> tuple[Value, ...]:
        raise NotConstantError(op)


def _size(op: str, constants: Sequence[Tensor], attributes: dict[str, Any]) -> int:
    """How many numbers an operation on constants makes, at most; those that repeat or fill are bounded where they run."""
    import torch

    if op == "MatMul":
        return constants[0].numel() // max(constants[0].shape[-1], 1) * constants[1].shape[-1]
    if op in LIFTED and op != "Concat":
        return math.prod(torch.broadcast_shapes(*(c.shape for c in constants)))
    return sum(c.numel() for c in constants)
