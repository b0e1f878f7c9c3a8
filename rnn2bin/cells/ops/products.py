"""Products, convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.ops.table import Values, bounded, given, maybe, operation
from rnn2bin.errors import UnsupportedError


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
