"""Keras's layers that move, repeat, pad or cut values -> nodes of a graph; a layer on every step.

Source: keras-team/keras, `layers/reshaping`.
"""

from __future__ import annotations

import math
from typing import Any

from rnn2bin.loaders.keras_config import Layer
from rnn2bin.loaders.keras_context import LAYERS, PASS_MASKS, Context, Value, call, layer_kind, wants_axes
from rnn2bin.loaders.keras_weights import CELLS

MOST_REPEATS = 65536


@layer_kind("Flatten")
def _flatten(ctx: Context, layer: Layer, x: Value) -> Value:
    known = [n for n in x.shape if n is not None]
    return ctx.value(ctx.g.add("Flatten", x.name, axis=1), (math.prod(known) if len(known) == len(x.shape) else None,))


@layer_kind("Reshape")
def _reshape(ctx: Context, layer: Layer, x: Value) -> Value:
    target: Any = layer.get("target_shape", [])
    target = target.get("items") if isinstance(target, dict) else target
    fits = isinstance(target, list) and all(isinstance(n, int) and (n == -1 or 0 < n < 2**31) for n in target)
    if not fits or target.count(-1) > 1:
        raise layer.refuse("its target shape is not one")
    shape: list[int | None] = [None if n == -1 else n for n in target]
    known = [n for n in x.shape if n is not None]
    if len(known) == len(x.shape) and -1 in target:
        rest = math.prod(n for n in target if n != -1)
        shape[target.index(-1)] = math.prod(known) // rest
    return ctx.value(ctx.g.add("Reshape", x.name, ctx.g.literal([0, *target])), shape)


@layer_kind("Permute")
def _permute(ctx: Context, layer: Layer, x: Value) -> Value:
    dims = layer.get("dims", [])
    dims = dims.get("items") if isinstance(dims, dict) else dims
    if not isinstance(dims, list) or not all(isinstance(n, int) for n in dims) or sorted(dims) != list(range(1, len(x.shape) + 1)):
        raise layer.refuse("its dims are no order of the axes")
    return ctx.value(ctx.g.add("Transpose", x.name, perm=[0, *dims]), [x.shape[n - 1] for n in dims])


@layer_kind("ZeroPadding1D", "ZeroPadding2D")
def _zero_padding(ctx: Context, layer: Layer, x: Value) -> Value:
    sides = _sides(layer, x, "padding")
    flat = [before for before, _ in sides] + [after for _, after in sides]
    axes = ctx.g.literal([k + 1 for k in range(len(sides))])
    y = ctx.g.add("Pad", x.name, ctx.g.literal(flat), ctx.g.literal(0.0), axes)
    shape = [None if n is None else n + a + b for n, (a, b) in zip(x.shape, sides, strict=False)]
    return ctx.value(y, (*shape, x.shape[-1]))


@layer_kind("Cropping1D", "Cropping2D")
def _cropping(ctx: Context, layer: Layer, x: Value) -> Value:
    sides = _sides(layer, x, "cropping")
    if any(n is not None and n <= a + b for n, (a, b) in zip(x.shape, sides, strict=False)):
        raise layer.refuse(f"crops more than the {x.shape[0]} steps there are")
    first = ctx.g.literal([before for before, _ in sides])
    last = ctx.g.literal([-after if after else 2**31 for _, after in sides])
    y = ctx.g.add("Slice", x.name, first, last, ctx.g.literal([k + 1 for k in range(len(sides))]))
    shape = [None if n is None else n - a - b for n, (a, b) in zip(x.shape, sides, strict=False)]
    return ctx.value(y, (*shape, x.shape[-1]))


def _sides(layer: Layer, x: Value, option: str) -> list[tuple[int, int]]:
    """What an axis gets or loses before and behind: one number, one an axis, or a pair an axis."""
    axes = int(layer.kind[-2])
    wants_axes(layer, x, axes + 1)
    given: Any = layer.get(option, 1)
    given = given.get("items") if isinstance(given, dict) else given
    if isinstance(given, int):
        given = [given] * axes
    if axes == 1 and isinstance(given, list) and len(given) == 2:
        given = [given]
    pairs = [[one, one] if isinstance(one, int) else one for one in given] if isinstance(given, list) else []
    fits = len(pairs) == axes and all(isinstance(p, list) and len(p) == 2 and all(type(n) is int for n in p) for p in pairs)
    if not fits or any(not 0 <= n <= MOST_REPEATS for pair in pairs for n in pair):
        raise layer.refuse(f"its {option} is not one or two whole numbers an axis")
    return [(a, b) for a, b in pairs]


@layer_kind("UpSampling1D")
def _up_sampling(ctx: Context, layer: Layer, x: Value) -> Value:
    """Every step `size` times, one after another."""
    size = layer.whole("size", 2)
    wants_axes(layer, x, 2)
    if not 0 < size <= MOST_REPEATS or x.shape[1] is None:
        raise layer.refuse(f"repeats steps {size} times; up to {MOST_REPEATS} are read")
    wide = ctx.g.add("Tile", x.name, ctx.g.literal([1, 1, size]))
    y = ctx.g.add("Reshape", wide, ctx.g.literal([0, -1, x.shape[1]]))
    return ctx.value(y, (None if x.shape[0] is None else x.shape[0] * size, x.shape[1]))


@layer_kind("RepeatVector")
def _repeat(ctx: Context, layer: Layer, x: Value) -> Value:
    count = layer.whole("n")
    wants_axes(layer, x, 1)
    if not 0 < count <= MOST_REPEATS:
        raise layer.refuse(f"repeats {count} times; up to {MOST_REPEATS} are read")
    wide = ctx.g.add("Unsqueeze", x.name, ctx.g.literal([1]))
    return ctx.value(ctx.g.add("Tile", wide, ctx.g.literal([1, count, 1])), (count, *x.shape))


def _time_distributed(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    """The inner layer on every step: as it is where it looks at the last axis only, else on steps and batch in one axis."""
    inner, x = layer.parts["layer"], inputs[0]
    if inner.kind in PASS_MASKS:
        return call(ctx, inner, inputs)
    if len(inputs) != 1 or len(x.shape) < 2 or x.mask or inner.kind in (*CELLS, "RNN", "Bidirectional", "TimeDistributed", "Embedding"):
        raise layer.refuse(f"{inner} on every step, or with a mask; rnn2bin does not read that")
    sizes = x.shape[1:]
    if None in sizes:
        raise layer.refuse("its inner shape is open")
    flat = ctx.g.add("Reshape", x.name, ctx.g.literal([-1, *(int(n or 0) for n in sizes)]))
    (y,) = call(ctx, inner, [ctx.value(flat, sizes)])
    if None in y.shape:
        raise layer.refuse("its inner output's shape is open")
    lead = ctx.g.add("Shape", x.name, start=0, end=2)
    shape = ctx.g.add("Concat", lead, ctx.g.literal([int(n or 0) for n in y.shape]), axis=0)
    return [ctx.value(ctx.g.add("Reshape", y.name, shape), (x.shape[0], *y.shape))]


LAYERS["TimeDistributed"] = _time_distributed
