"""The operations around recurrent layers, each a function of tensors and plain attributes, with the meaning ONNX gives its name (opset 17).

An operation that ONNX does not have says what it does. Sizes come from files: what would fill the memory is refused (`bounded`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.errors import UnsupportedError

Values = Sequence[Tensor | None]
Result = Tensor | tuple[Tensor, ...]
Operation = Callable[[Values, dict[str, Any]], Result]

# What operations raise, of Python and of torch, on operands that do not fit.
MISFITS = (RuntimeError, LookupError, ValueError, TypeError, AssertionError, ArithmeticError)
MOST_ELEMENTS = ContextVar("MOST_ELEMENTS", default=2**28)  # of a tensor, a gigabyte of float32; less while a file is read
OPS: dict[str, Operation] = {}


def dtype_of(name: str) -> torch.dtype:
    """int64, bool, or float32: torch's default, so that a whole graph may run in float64."""
    return {"float32": torch.get_default_dtype(), "int64": torch.int64, "bool": torch.bool}[name]


def operation(name: str) -> Callable[[Operation], Operation]:
    def enter(function: Operation) -> Operation:
        OPS[name] = function
        return function

    return enter


def given(values: Values, index: int) -> Tensor:
    """Operand `index`, which must be there."""
    value = values[index] if index < len(values) else None
    if value is None:
        raise UnsupportedError(f"an operation lacks its input {index}")
    return value


def maybe(values: Values, index: int) -> Tensor | None:
    return values[index] if index < len(values) else None


def numbers(values: Values, index: int, attributes: dict[str, Any], name: str) -> list[int] | None:
    """Whole numbers that an operation takes as an operand (newer opsets) or as an attribute (older ones)."""
    value = maybe(values, index)
    return [int(n) for n in value.flatten().tolist()] if value is not None else attributes.get(name)


def bounded(shape: Sequence[int]) -> list[int]:
    """The shape, where its elements can be held; UnsupportedError otherwise."""
    if any(n < 0 for n in shape) or math.prod(shape) > MOST_ELEMENTS.get():
        raise UnsupportedError(f"an operation wants a tensor of shape {tuple(shape)}; refused, it would exhaust the memory")
    return list(shape)


# --- elementwise -----------------------------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sign": torch.sign,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "IsNaN": torch.isnan,
    "IsInf": torch.isinf,
    "Not": torch.logical_not,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Mish": functional.mish,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "Dropout": lambda x: x,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": lambda a, b: torch.pow(a, b).to(a.dtype),
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}


def _of_one(function: Callable[[Tensor], Tensor]) -> Operation:
    return lambda values, attributes: function(given(values, 0))


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    def run(values: Values, attributes: dict[str, Any]) -> Tensor:
        a, b = given(values, 0), given(values, 1)
        bounded(torch.broadcast_shapes(a.shape, b.shape))
        return function(a, b)

    return run


OPS |= {name: _of_one(function) for name, function in _UNARY.items()}
OPS |= {name: _of_two(function) for name, function in _BINARY.items()}


@operation("Div")
def _div(values: Values, attributes: dict[str, Any]) -> Tensor:
    a, b = given(values, 0), given(values, 1)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operation("Mod")
def _mod(values: Values, attributes: dict[str, Any]) -> Tensor:
    function = torch.fmod if attributes.get("fmod") else torch.remainder
    return function(given(values, 0), given(values, 1))


def _of_many(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    def run(values: Values, attributes: dict[str, Any]) -> Tensor:
        result = given(values, 0)
        for index in range(1, len(values)):
            bounded(torch.broadcast_shapes(result.shape, given(values, index).shape))
            result = function(result, given(values, index))
        return result

    return run


OPS |= {"Max": _of_many(torch.maximum), "Min": _of_many(torch.minimum), "Sum": _of_many(torch.add)}


@operation("Mean")
def _mean(values: Values, attributes: dict[str, Any]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*(given(values, k) for k in range(len(values))))).mean(0)


@operation("Where")
def _where(values: Values, attributes: dict[str, Any]) -> Tensor:
    condition, a, b = (given(values, k) for k in range(3))
    bounded(torch.broadcast_shapes(condition.shape, a.shape, b.shape))
    return torch.where(condition, a, b)


@operation("Clip")
def _clip(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, low, high = given(values, 0), maybe(values, 1), maybe(values, 2)
    bounds = [float(v) if v is not None else attributes.get(name) for v, name in ((low, "min"), (high, "max"))]
    return x if bounds == [None, None] else x.clamp(*bounds).to(x.dtype)


@operation("LeakyRelu")
def _leaky_relu(values: Values, attributes: dict[str, Any]) -> Tensor:
    return functional.leaky_relu(given(values, 0), attributes.get("alpha", 0.01))


@operation("Elu")
def _elu(values: Values, attributes: dict[str, Any]) -> Tensor:
    return functional.elu(given(values, 0), attributes.get("alpha", 1.0))


@operation("Selu")
def _selu(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, alpha, gamma = given(values, 0), attributes.get("alpha", 1.6732631921768188), attributes.get("gamma", 1.0507010221481323)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operation("Celu")
def _celu(values: Values, attributes: dict[str, Any]) -> Tensor:
    return functional.celu(given(values, 0), attributes.get("alpha", 1.0))


@operation("ThresholdedRelu")
def _thresholded_relu(values: Values, attributes: dict[str, Any]) -> Tensor:
    x = given(values, 0)
    return torch.where(x > attributes.get("alpha", 1.0), x, x.new_zeros(()))


@operation("Swish")
def _swish(values: Values, attributes: dict[str, Any]) -> Tensor:
    x = given(values, 0)
    return x * torch.sigmoid(attributes.get("alpha", 1.0) * x)


@operation("Gelu")
def _gelu(values: Values, attributes: dict[str, Any]) -> Tensor:
    return functional.gelu(given(values, 0), approximate=attributes.get("approximate", "none"))


@operation("PRelu")
def _prelu(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, slope = given(values, 0), given(values, 1)
    return torch.where(x > 0, x, x * slope)


@operation("HardSigmoid")
def _hard_sigmoid(values: Values, attributes: dict[str, Any]) -> Tensor:
    return (given(values, 0) * attributes.get("alpha", 0.2) + attributes.get("beta", 0.5)).clamp(0, 1)


@operation("Softmax")
def _softmax(values: Values, attributes: dict[str, Any]) -> Tensor:
    return torch.softmax(given(values, 0), attributes.get("axis", -1))


@operation("LogSoftmax")
def _log_softmax(values: Values, attributes: dict[str, Any]) -> Tensor:
    return torch.log_softmax(given(values, 0), attributes.get("axis", -1))


@operation("Cast")
def _cast(values: Values, attributes: dict[str, Any]) -> Tensor:
    """`to`: float32, int64 or bool; narrower types of a file are read as the wide ones."""
    return given(values, 0).to(dtype_of(attributes["to"]))


@operation("CastLike")
def _cast_like(values: Values, attributes: dict[str, Any]) -> Tensor:
    return given(values, 0).to(given(values, 1).dtype)


@operation("CumSum")
def _cumsum(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, axis = given(values, 0), int(given(values, 1))
    turned = x.flip(axis) if attributes.get("reverse") else x
    total = turned.cumsum(axis)
    total = total - turned if attributes.get("exclusive") else total
    return total.flip(axis) if attributes.get("reverse") else total


# --- products --------------------------------------------------------------------------------------------------------------


@operation("MatMul")
def _matmul(values: Values, attributes: dict[str, Any]) -> Tensor:
    a, b = given(values, 0), given(values, 1)
    if a.ndim > 1 and b.ndim > 1:
        bounded([*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]])
    return a @ b


@operation("Einsum")
def _einsum(values: Values, attributes: dict[str, Any]) -> Tensor:
    operands = [given(values, index) for index in range(len(values))]
    equation = attributes["equation"].replace(" ", "")
    sizes: dict[str, int] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        sizes |= {letter: n for letter, n in zip(term, operand.shape, strict=False) if n != 1}
    bounded([sizes.get(letter, 1) for letter in equation.partition("->")[2]])
    return torch.einsum(equation, operands)


@operation("Gemm")
def _gemm(values: Values, attributes: dict[str, Any]) -> Tensor:
    a, b, c = given(values, 0), given(values, 1), maybe(values, 2)
    a = a.t() if attributes.get("transA") else a
    b = b.t() if attributes.get("transB") else b
    y = attributes.get("alpha", 1.0) * (a @ b) if attributes.get("alpha", 1.0) != 1 else a @ b
    return y if c is None else y + attributes.get("beta", 1.0) * c


@operation("Conv")
def _conv(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, weight, bias = given(values, 0), given(values, 1), maybe(values, 2)
    axes = weight.ndim - 2
    strides, dilations = attributes.get("strides") or [1] * axes, attributes.get("dilations") or [1] * axes
    kernel = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x = _padded(x, kernel, strides, attributes, 0.0)
    function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[axes]
    return function(x, weight, bias, strides, 0, dilations, attributes.get("group", 1))


def _padded(x: Tensor, kernel: Sequence[int], strides: Sequence[int], attributes: dict[str, Any], fill: float) -> Tensor:
    """x (N,C,…) with the pads that `pads` or `auto_pad` ask for."""
    axes, auto = len(kernel), attributes.get("auto_pad", "NOTSET")
    pads = attributes.get("pads") or [0] * (2 * axes)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        whole = [max(0, (-(-n // s) - 1) * s + k - n) for n, s, k in zip(x.shape[2:], strides, kernel, strict=True)]
        less, more = [n // 2 for n in whole], [n - n // 2 for n in whole]
        pads = less + more if auto == "SAME_UPPER" else more + less
    if not any(pads):
        return x
    bounded([n + pads[i] + pads[i + axes] for i, n in enumerate(x.shape[2:])])
    return functional.pad(x, [pads[i + side * axes] for i in reversed(range(axes)) for side in (0, 1)], value=fill)


def _window(attributes: dict[str, Any], *, ceil: bool = False) -> tuple[list[int], list[int]]:
    """A pool's kernel and strides; UnsupportedError for what no network here has asked for yet. `ceil`: ceil_mode without pads is run."""
    kernel = attributes["kernel_shape"]
    padded = any(attributes.get("pads") or []) or attributes.get("auto_pad", "NOTSET") != "NOTSET"
    if (attributes.get("ceil_mode") and (padded or not ceil)) or any(d != 1 for d in attributes.get("dilations") or []):
        raise UnsupportedError("pools with dilations, or with ceil_mode unless they are MaxPool without pads, are not run")
    return kernel, attributes.get("strides") or [1] * len(kernel)


@operation("MaxPool")
def _max_pool(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, (kernel, strides) = given(values, 0), _window(attributes, ceil=True)
    x = _padded(x, kernel, strides, attributes, float("-inf"))
    function: Any = {1: functional.max_pool1d, 2: functional.max_pool2d}[len(kernel)]
    return function(x, kernel, strides, ceil_mode=bool(attributes.get("ceil_mode")))


@operation("AveragePool")
def _average_pool(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, (kernel, strides) = given(values, 0), _window(attributes)
    function: Any = {1: functional.avg_pool1d, 2: functional.avg_pool2d}[len(kernel)]
    total = function(_padded(x, kernel, strides, attributes, 0.0), kernel, strides)
    if attributes.get("count_include_pad"):
        return total
    return total / function(_padded(torch.ones_like(x), kernel, strides, attributes, 0.0), kernel, strides)


# --- shapes ----------------------------------------------------------------------------------------------------------------


@operation("Shape")
def _shape(values: Values, attributes: dict[str, Any]) -> Tensor:
    return torch.tensor(given(values, 0).shape[attributes.get("start", 0) : attributes.get("end")])


@operation("Size")
def _size(values: Values, attributes: dict[str, Any]) -> Tensor:
    return torch.tensor(given(values, 0).numel())


@operation("Reshape")
def _reshape(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, shape = given(values, 0), numbers(values, 1, attributes, "shape") or []
    return x.reshape([x.shape[i] if n == 0 and not attributes.get("allowzero") else n for i, n in enumerate(shape)])


@operation("Flatten")
def _flatten(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, axis = given(values, 0), attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operation("Transpose")
def _transpose(values: Values, attributes: dict[str, Any]) -> Tensor:
    x = given(values, 0)
    return x.permute(attributes.get("perm") or list(reversed(range(x.ndim))))


@operation("Squeeze")
def _squeeze(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, axes = given(values, 0), numbers(values, 1, attributes, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operation("Unsqueeze")
def _unsqueeze(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, axes = given(values, 0), numbers(values, 1, attributes, "axes") or []
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operation("Concat")
def _concat(values: Values, attributes: dict[str, Any]) -> Tensor:
    parts, axis = [given(values, index) for index in range(len(values))], attributes["axis"]
    bounded([sum(part.numel() for part in parts)])
    return torch.cat(parts, axis)


@operation("Split")
def _split(values: Values, attributes: dict[str, Any]) -> tuple[Tensor, ...]:
    x, axis, sizes = given(values, 0), attributes.get("axis", 0), numbers(values, 1, attributes, "split")
    if sizes is not None:
        return x.split(sizes, axis)
    return x.split(-(-x.shape[axis] // attributes["num_outputs"]), axis)


@operation("Slice")
def _slice(values: Values, attributes: dict[str, Any]) -> Tensor:
    x = given(values, 0)
    starts, ends = numbers(values, 1, attributes, "starts") or [], numbers(values, 2, attributes, "ends") or []
    axes = numbers(values, 3, attributes, "axes") or list(range(len(starts)))
    steps = numbers(values, 4, attributes, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index = range(*slice(start if start > -(2**31) else None, end if -(2**31) < end < 2**31 else None, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, index.start, len(index))
        else:
            x = x.index_select(axis, torch.tensor(list(index), dtype=torch.long, device=x.device))
    return x


@operation("Gather")
def _gather(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, index, axis = given(values, 0), given(values, 1).long(), attributes.get("axis", 0)
    axis %= x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    bounded([*x.shape[:axis], index.numel(), *x.shape[axis + 1 :]])
    chosen = x.index_select(axis, index.flatten())
    return chosen.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operation("GatherElements")
def _gather_elements(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, index, axis = given(values, 0), given(values, 1).long(), attributes.get("axis", 0)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


@operation("GatherND")
def _gather_nd(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, index, outer = given(values, 0), given(values, 1).long(), attributes.get("batch_dims", 0)
    places = list(index.unbind(-1))
    bounded([*index.shape[:-1], *x.shape[outer + len(places) :]])
    for axis in range(outer):
        places.insert(axis, torch.arange(x.shape[axis]).reshape(*[-1 if a == axis else 1 for a in range(index.ndim - 1)]))
    return x[tuple(places)]


@operation("ScatterND")
def _scatter_nd(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, index, updates = given(values, 0), given(values, 1).long(), given(values, 2)
    if attributes.get("reduction", "none") not in ("none", "add"):
        raise UnsupportedError(f"ScatterND with reduction {attributes['reduction']}")
    return x.index_put(index.unbind(-1), updates, accumulate=attributes.get("reduction") == "add")


@operation("ScatterElements")
def _scatter_elements(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, index, updates, axis = given(values, 0), given(values, 1).long(), given(values, 2), attributes.get("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    match attributes.get("reduction", "none"):
        case "none":
            return x.scatter(axis, index, updates)
        case "add":
            return x.scatter_add(axis, index, updates)
    raise UnsupportedError(f"ScatterElements with reduction {attributes['reduction']}")


@operation("Trilu")
def _trilu(values: Values, attributes: dict[str, Any]) -> Tensor:
    k = maybe(values, 1)
    return (torch.triu if attributes.get("upper", 1) else torch.tril)(given(values, 0), int(k) if k is not None else 0)


@operation("TopK")
def _top_k(values: Values, attributes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    found = given(values, 0).topk(int(given(values, 1)), attributes.get("axis", -1), bool(attributes.get("largest", 1)))
    return found.values, found.indices


@operation("ReverseSequence")
def _reverse_sequence(values: Values, attributes: dict[str, Any]) -> Tensor:
    """Each sequence of a batch reversed within its own length."""
    x, lengths, time = given(values, 0), given(values, 1), attributes.get("time_axis", 0)
    moved = x.movedim((time, attributes.get("batch_axis", 1)), (0, 1))
    at = torch.arange(len(moved), device=x.device)[:, None]
    index = torch.where(at < lengths[None], lengths[None] - 1 - at, at)
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(moved.shape)
    return moved.gather(0, index).movedim((0, 1), (time, attributes.get("batch_axis", 1)))


@operation("Expand")
def _expand(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, shape = given(values, 0), numbers(values, 1, attributes, "shape") or []
    return x.expand(bounded(torch.broadcast_shapes(x.shape, tuple(shape))))


@operation("Tile")
def _tile(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, times = given(values, 0), numbers(values, 1, attributes, "repeats") or []
    bounded([n * k for n, k in zip(x.shape, times, strict=True)])
    return x.repeat(times)


@operation("Pad")
def _pad(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, pads = given(values, 0), numbers(values, 1, attributes, "pads") or []
    fill, axes = maybe(values, 2), numbers(values, 3, attributes, "axes") or list(range(x.ndim))
    each = {axis % x.ndim: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    bounded([n + sum(each.get(i, (0, 0))) for i, n in enumerate(x.shape)])
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        flat = [n for axis in reversed(range(x.ndim)) for n in each.get(axis, (0, 0))]
        return functional.pad(x, flat, value=float(fill) if fill is not None else attributes.get("value", 0.0))
    for axis, (before, after) in each.items():
        x = _mirrored(x, axis, before, after, edge=mode == "edge")
    return x


def _mirrored(x: Tensor, axis: int, before: int, after: int, *, edge: bool) -> Tensor:
    """x with `before` and `after` more entries along an axis: its edge again, or its reflection without the edge."""
    size = x.shape[axis]
    at = torch.arange(-before, size + after, device=x.device)
    at = at.clamp(0, size - 1) if edge else (size - 1 - (at.abs() - (size - 1)).abs()).abs()
    return x.index_select(axis, at)


@operation("Constant")
def _constant(values: Values, attributes: dict[str, Any]) -> Tensor:
    """`value`: nested lists; `dtype`: float32, int64 or bool; `shape` where a list cannot say it."""
    value = torch.tensor(attributes["value"], dtype=dtype_of(attributes["dtype"]))
    return value.reshape(attributes["shape"]) if "shape" in attributes else value


@operation("ConstantOfShape")
def _constant_of_shape(values: Values, attributes: dict[str, Any]) -> Tensor:
    shape = bounded(numbers(values, 0, attributes, "shape") or [])
    return torch.full(shape, attributes.get("value", 0.0), dtype=dtype_of(attributes.get("dtype", "float32")))


@operation("Range")
def _range(values: Values, attributes: dict[str, Any]) -> Tensor:
    start, end, step = (given(values, k) for k in range(3))
    bounded([max(0, math.ceil((float(end) - float(start)) / float(step)))])
    return torch.arange(start.item(), end.item(), step.item())


@operation("OneHot")
def _one_hot(values: Values, attributes: dict[str, Any]) -> Tensor:
    index, depth, levels = given(values, 0).long(), int(given(values, 1)), given(values, 2)
    bounded([*index.shape, depth])
    axis = attributes.get("axis", -1)
    hot = functional.one_hot(index % depth, depth)
    hot = hot if axis == -1 else hot.movedim(-1, axis)
    return torch.where(hot.bool(), levels[1], levels[0])


# --- sums over axes ----------------------------------------------------------------------------------------------------------


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operation:
    def run(values: Values, attributes: dict[str, Any]) -> Tensor:
        x, axes = given(values, 0), numbers(values, 1, attributes, "axes")
        if not axes and attributes.get("noop_with_empty_axes"):
            return x
        return function(x, tuple(axes) if axes else tuple(range(x.ndim)), bool(attributes.get("keepdims", 1)))

    return run


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keep)
    return x


OPS |= {
    "ReduceMean": _reduction(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSum": _reduction(lambda x, axes, keep: x.sum(axes, keep).log()),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ReduceProd": _reduction(lambda x, axes, keep: _product(x, axes, keep)),
    "GlobalAveragePool": lambda values, attributes: given(values, 0).mean(tuple(range(2, given(values, 0).ndim)), True),
    "GlobalMaxPool": lambda values, attributes: given(values, 0).amax(tuple(range(2, given(values, 0).ndim)), True),
}


def _first_place(best: Callable[..., Tensor]) -> Operation:
    def run(values: Values, attributes: dict[str, Any]) -> Tensor:
        if attributes.get("select_last_index"):
            raise UnsupportedError("ArgMax and ArgMin with select_last_index are not run")
        return best(given(values, 0), attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))

    return run


OPS |= {"ArgMax": _first_place(torch.argmax), "ArgMin": _first_place(torch.argmin)}


@operation("LpNormalization")
def _lp_norm(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, axis = given(values, 0), attributes.get("axis", -1)
    return x / (x.abs().sum(axis, True) if attributes.get("p", 2) == 1 else x.square().sum(axis, True).sqrt())


@operation("InstanceNormalization")
def _instance_norm(values: Values, attributes: dict[str, Any]) -> Tensor:
    return functional.instance_norm(
        given(values, 0), None, None, given(values, 1), given(values, 2), True, 0.0, attributes.get("epsilon", 1e-5)
    )


@operation("GroupNormalization")
def _group_norm(values: Values, attributes: dict[str, Any]) -> Tensor:
    """Scale and bias (C,), as from opset 21 on."""
    return functional.group_norm(
        given(values, 0), attributes["num_groups"], given(values, 1), given(values, 2), attributes.get("epsilon", 1e-5)
    )


@operation("RMSNormalization")
def _rms_norm(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, scale, axis = given(values, 0), given(values, 1), attributes.get("axis", -1)
    axes = tuple(range(axis % x.ndim, x.ndim))
    return x * (x.square().mean(axes, True) + attributes.get("epsilon", 1e-5)).rsqrt() * scale


@operation("LayerNormalization")
def _layer_norm(values: Values, attributes: dict[str, Any]) -> Tensor:
    x, scale, bias = given(values, 0), given(values, 1), maybe(values, 2)
    axis = attributes.get("axis", -1) % x.ndim
    shape = x.shape[axis:]
    return functional.layer_norm(
        x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), attributes.get("epsilon", 1e-5)
    )


# --- masks: what Keras calls a masked step is one the layer does not see -------------------------------------------------------


@operation("Compact")
def _compact(values: Values, attributes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """x (T,B,…), mask (B,T) -> the real steps first, in order, zeros behind; lengths (B,); for each step the place its output is at (T,B).

    A masked step's place is that of the last real step before it, −1 where there is none. No ONNX operation.
    """
    x, mask = given(values, 0), given(values, 1).bool().t()
    lengths = mask.sum(0)
    order = (~mask).to(torch.uint8).argsort(dim=0, stable=True)
    wide = (*mask.shape, *[1] * (x.ndim - 2))
    moved = x.gather(0, order.view(wide).expand_as(x))
    real = torch.arange(len(x), device=x.device)[:, None] < lengths[None]
    return torch.where(real.view(wide), moved, moved.new_zeros(())), lengths, mask.long().cumsum(0) - 1


@operation("Spread")
def _spread(values: Values, attributes: dict[str, Any]) -> Tensor:
    """y (T,B,·) of compacted steps, places (T,B) of `Compact` -> outputs at the original steps; zeros where nothing real has come yet, and
    with `zero` at every masked step too (mask (B,T) as third value). No ONNX operation."""
    y, places = given(values, 0), given(values, 1)
    out = y.gather(0, places.clamp_min(0).unsqueeze(-1).expand(*places.shape, y.shape[2]))
    keep = places >= 0
    if attributes.get("zero"):
        keep = keep & given(values, 2).bool().t()
    return torch.where(keep.unsqueeze(-1), out, out.new_zeros(()))


# --- plain recurrent layers: they have no gates, so they are carried through -----------------------------------------------------


@operation("PlainRnn")
def _plain_rnn(values: Values, attributes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """h' = φ(W x + U h + b). x (T,B,I), W (H,I), U (H,H), b (H,), h0 (B,H)?, lengths (B,)? -> every h (T,B,H), the last (B,H).

    `reverse` walks backwards within each length; `activation`: tanh or relu. No ONNX operation: theirs has both directions in one.
    """
    from rnn2bin.cells.network import reverse, valid_steps

    x, w, u, b = (given(values, k) for k in range(4))
    h, lengths = maybe(values, 4), maybe(values, 5)
    h = x.new_zeros(x.shape[1], u.shape[0]) if h is None else h
    phi = torch.relu if attributes.get("activation") == "relu" else torch.tanh
    x = reverse(x, lengths) if attributes.get("reverse") else x
    real = None if lengths is None else valid_steps(lengths, len(x))
    steps = []
    for t, x_t in enumerate(functional.linear(x, w, b)):
        new = phi(x_t + h @ u.t())
        h = new if real is None else torch.where(real[t], new, h)
        steps.append(h if real is None else torch.where(real[t], new, new.new_zeros(())))
    y = torch.stack(steps)
    return (reverse(y, lengths) if attributes.get("reverse") else y), h
