"""Sums and the like over axes, and what normalises by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.ops.table import OPS, Operation, Values, given, maybe, numbers, operation
from rnn2bin.errors import UnsupportedError


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
