"""Operations that move, choose and make elements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.ops.table import Values, bounded, dtype_of, given, maybe, numbers, operation
from rnn2bin.errors import UnsupportedError


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
