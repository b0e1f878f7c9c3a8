"""Operations on each element by itself, softmaxes and casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.ops.table import OPS, Operation, Values, bounded, dtype_of, given, maybe, operation

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
