"""Keras's layers -> nodes of a graph. A layer that is not in `LAYERS` is refused by name; no code of a file is ever run.

Values are (batch, …) as in Keras. Layers that only move values: `keras_shapes.py`. Source: keras-team/keras, `layers/` and `activations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rnn2bin.loaders import keras_recurrent
from rnn2bin.loaders import keras_shapes as _entered  # noqa: F401  its layers are known then
from rnn2bin.loaders.keras_config import Layer, word
from rnn2bin.loaders.keras_context import LAYERS, TRAINING_ONLY, Context, Value, last_axis, layer_kind, wants_axes, weight
from rnn2bin.loaders.keras_weights import CELLS

EPSILON = 1e-7  # keras.backend.epsilon()

LAYERS.update({kind: keras_recurrent.recurrent for kind in (*CELLS, "RNN") if not kind.endswith("Cell")})
LAYERS["Bidirectional"] = keras_recurrent.bidirectional


# --- activations ---------------------------------------------------------------------------------------------------------------

_OPS = {
    "tanh": "Tanh",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "softsign": "Softsign",
    "softplus": "Softplus",
    "elu": "Elu",
    "selu": "Selu",
    "exponential": "Exp",
    "mish": "Mish",
    "gelu": "Gelu",
}
ACTIVATIONS = ("linear", *_OPS, "hard_sigmoid", "swish", "silu", "relu6", "softmax", "log_softmax")


def activated(ctx: Context, layer: Layer, name: str, activation: str) -> str:
    """The value behind an activation of Keras."""
    if activation == "linear":
        return name
    if activation in _OPS:
        return ctx.g.add(_OPS[activation], name)
    if activation == "hard_sigmoid":
        return ctx.g.add("HardSigmoid", name, alpha=ctx.hard_sigmoid / 2, beta=0.5)
    if activation in ("swish", "silu"):
        return ctx.g.add("Mul", name, ctx.g.add("Sigmoid", name))
    if activation == "relu6":
        return ctx.g.add("Clip", name, ctx.g.literal(0.0), ctx.g.literal(6.0))
    if activation in ("softmax", "log_softmax"):
        return ctx.g.add("Softmax" if activation == "softmax" else "LogSoftmax", name, axis=-1)
    raise layer.refuse(f"activation {activation!r}, which rnn2bin does not know; known: {', '.join(ACTIVATIONS)}")


@layer_kind("Activation")
def _activation(ctx: Context, layer: Layer, x: Value) -> Value:
    return replace(x, name=activated(ctx, layer, x.name, layer.text("activation", "linear")))


@layer_kind(*TRAINING_ONLY)
def _identity(ctx: Context, layer: Layer, x: Value) -> Value:
    return x


@layer_kind("ReLU")
def _relu(ctx: Context, layer: Layer, x: Value) -> Value:
    slope, ceiling = layer.number("negative_slope", 0.0), layer.get("max_value")
    if layer.number("threshold", 0.0) != 0 or (slope and ceiling is not None):
        raise layer.refuse("a threshold, or a slope with a greatest value; each alone is read, without a threshold")
    if slope:
        return replace(x, name=ctx.g.add("LeakyRelu", x.name, alpha=slope))
    if ceiling is not None:
        return replace(x, name=ctx.g.add("Clip", x.name, ctx.g.literal(0.0), ctx.g.literal(float(layer.number("max_value", 0.0)))))
    return replace(x, name=ctx.g.add("Relu", x.name))


@layer_kind("LeakyReLU")
def _leaky_relu(ctx: Context, layer: Layer, x: Value) -> Value:
    slope = layer.number("negative_slope", layer.number("alpha", 0.3))  # Keras 3's name, Keras 2's name
    return replace(x, name=ctx.g.add("LeakyRelu", x.name, alpha=slope))


@layer_kind("ELU")
def _elu(ctx: Context, layer: Layer, x: Value) -> Value:
    return replace(x, name=ctx.g.add("Elu", x.name, alpha=layer.number("alpha", 1.0)))


@layer_kind("PReLU")
def _prelu(ctx: Context, layer: Layer, x: Value) -> Value:
    slope = weight(ctx, layer, "alpha", [None] * len(x.shape))
    return replace(x, name=ctx.g.add("PRelu", x.name, ctx.g.constant(slope, f"{layer.name}_alpha")))


@layer_kind("Softmax")
def _softmax(ctx: Context, layer: Layer, x: Value) -> Value:
    if x.mask:
        raise layer.refuse("a softmax over masked steps")
    return replace(x, name=ctx.g.add("Softmax", x.name, axis=layer.whole("axis", -1)))


# --- products --------------------------------------------------------------------------------------------------------------------


@layer_kind("Dense")
def _dense(ctx: Context, layer: Layer, x: Value) -> Value:
    kernel = weight(ctx, layer, "kernel", (x.shape[-1], None))
    y = ctx.g.add("MatMul", x.name, ctx.g.constant(kernel, f"{layer.name}_kernel"))
    if "bias" in layer.weights:
        bias = weight(ctx, layer, "bias", (kernel.shape[1],))
        y = ctx.g.add("Add", y, ctx.g.constant(bias, f"{layer.name}_bias"))
    y = activated(ctx, layer, y, layer.text("activation", "linear"))
    return ctx.value(y, (*x.shape[:-1], kernel.shape[1]))


@layer_kind("Embedding")
def _embedding(ctx: Context, layer: Layer, x: Value) -> Value:
    """The first one to read the input's tokens is the network's table."""
    if len(x.shape) != 1:
        raise layer.refuse(f"reads {len(x.shape) + 1} axes; tokens are (batch, time)")
    if not x.tokens:
        raise layer.refuse("reads what another layer has made; tokens are the network's own input")
    table = weight(ctx, layer, "embeddings", (None, None))
    mask = ctx.not_equal("tokens", 0) if layer.flag("mask_zero") else ""
    if ctx.table is None:
        ctx.table, name = table, "input"
    else:
        name = ctx.g.add("Gather", ctx.g.constant(table, f"{layer.name}_table"), "tokens", axis=0)
    return ctx.value(name, (*x.shape, table.shape[1]), mask)


@layer_kind("Conv1D", "Conv2D")
def _convolution(ctx: Context, layer: Layer, x: Value) -> Value:
    """Kernel (k…, C/groups, F); the steps are the axes between batch and channels."""
    axes = 1 if layer.kind == "Conv1D" else 2
    wants_axes(layer, x, axes + 1)
    groups = layer.whole("groups", 1)
    channels = x.shape[-1]
    kernel = layer.weights["kernel"]
    if axes == 1 and kernel.ndim == 4 and kernel.shape[1] == 1:  # Keras 1
        kernel = kernel[:, 0]
    if kernel.ndim != axes + 2 or groups < 1 or channels is None or kernel.shape[-2] * groups != channels or kernel.shape[-1] % groups:
        raise layer.refuse(f"its kernel has shape {kernel.shape} for {channels} channels in {groups} groups")
    kernel = kernel[(slice(None, None, -1),) * axes] if ctx.flips_kernels else kernel
    sizes, strides, dilations = kernel.shape[:axes], layer.wholes("strides", axes, 1), layer.wholes("dilation_rate", axes, 1)
    matrix = ctx.g.constant(ctx.tensor(kernel.transpose(axes + 1, axes, *range(axes))), f"{layer.name}_kernel")
    operands = [matrix]
    if "bias" in layer.weights:
        operands.append(ctx.g.constant(weight(ctx, layer, "bias", (kernel.shape[-1],)), f"{layer.name}_bias"))
    padding = _padding(layer, [d * (k - 1) for k, d in zip(sizes, dilations, strict=True)])
    y = ctx.g.add("Conv", _channels_first(ctx, x), *operands, strides=strides, dilations=dilations, group=groups, **padding)
    y = activated(ctx, layer, _channels_last(ctx, y, axes), layer.text("activation", "linear"))
    shape = [_length(layer, n, d * (k - 1) + 1, s) for n, k, d, s in zip(x.shape, sizes, dilations, strides, strict=False)]
    return ctx.value(y, (*shape, kernel.shape[-1]))


@layer_kind("MaxPooling1D", "MaxPooling2D", "AveragePooling1D", "AveragePooling2D")
def _pooling(ctx: Context, layer: Layer, x: Value) -> Value:
    axes = int(layer.kind[-2])
    wants_axes(layer, x, axes + 1)
    sizes = layer.wholes("pool_size", axes, 2)
    strides = layer.wholes("strides", axes, 0) if layer.get("strides") is not None else sizes
    op = "MaxPool" if layer.kind.startswith("Max") else "AveragePool"
    y = ctx.g.add(op, _channels_first(ctx, x), kernel_shape=sizes, strides=strides, **_padding(layer, [0] * axes))
    shape = [_length(layer, n, k, s) for n, k, s in zip(x.shape, sizes, strides, strict=False)]
    return ctx.value(_channels_last(ctx, y, axes), (*shape, x.shape[-1]))


def _padding(layer: Layer, before: list[int]) -> dict[str, Any]:
    """Attributes of ONNX; `before`: what stands before the first step where padding is causal."""
    padding = layer.text("padding", "valid")
    if padding == "causal" and len(before) == 1:
        return {"pads": [before[0], 0]}
    if padding == "same":
        return {"auto_pad": "SAME_UPPER"}
    if padding == "valid":
        return {}
    raise layer.refuse(f"padding {padding!r}; valid, same and causal are read")


def _length(layer: Layer, steps: int | None, window: int, stride: int) -> int | None:
    if steps is None:
        return None
    return -(-steps // stride) if layer.text("padding", "valid") in ("same", "causal") else (steps - window) // stride + 1


def _channels_first(ctx: Context, x: Value) -> str:
    rank = len(x.shape) + 1
    return ctx.g.add("Transpose", x.name, perm=[0, rank - 1, *range(1, rank - 1)])


def _channels_last(ctx: Context, name: str, axes: int) -> str:
    return ctx.g.add("Transpose", name, perm=[0, *range(2, axes + 2), 1])


@layer_kind("GlobalMaxPooling1D", "GlobalAveragePooling1D")
def _global_pooling(ctx: Context, layer: Layer, x: Value) -> Value:
    wants_axes(layer, x, 2)
    keep, axis = layer.flag("keepdims"), ctx.g.literal([1])
    shape = (1, x.shape[1]) if keep else (x.shape[1],)
    if layer.kind == "GlobalMaxPooling1D":
        return ctx.value(ctx.g.add("ReduceMax", x.name, axis, keepdims=int(keep)), shape)
    if not x.mask:
        return ctx.value(ctx.g.add("ReduceMean", x.name, axis, keepdims=int(keep)), shape)
    total = ctx.g.add("ReduceSum", ctx.zeroed(x.name, x.mask), axis, keepdims=int(keep))
    count = ctx.g.add("Cast", ctx.g.add("Unsqueeze", x.mask, ctx.g.literal([-1])), to="float32")
    return ctx.value(ctx.g.add("Div", total, ctx.g.add("ReduceSum", count, axis, keepdims=int(keep))), shape)


@layer_kind("WeightedAverage")
def _weighted_average(ctx: Context, layer: Layer, x: Value) -> Value:
    """Σ a_t x_t with a = softmax over the steps of x_t · w: a recipe may say that a layer is this (DeepMoji: AttentionWeightedAverage)."""
    wants_axes(layer, x, 2)
    if layer.flag("return_attention"):
        raise layer.refuse("returns its attention too")
    kernel = ctx.g.constant(weight(ctx, layer, "kernel", (x.shape[-1], 1)), f"{layer.name}_kernel")
    axis = ctx.g.literal([1])
    scores = ctx.g.add("MatMul", x.name, kernel)
    powers = ctx.g.add("Exp", ctx.g.add("Sub", scores, ctx.g.add("ReduceMax", scores, axis, keepdims=1)))
    powers = ctx.zeroed(powers, x.mask) if x.mask else powers
    total = ctx.g.add("Add", ctx.g.add("ReduceSum", powers, axis, keepdims=1), ctx.g.literal(EPSILON))
    weighted = ctx.g.add("Mul", x.name, ctx.g.add("Div", powers, total))
    return ctx.value(ctx.g.add("ReduceSum", weighted, axis, keepdims=0), x.shape[1:])


# --- normalisation ---------------------------------------------------------------------------------------------------------------


@layer_kind("BatchNormalization")
def _batch_norm(ctx: Context, layer: Layer, x: Value) -> Value:
    """As it runs after training: x · scale + shift, folded in float64."""
    import numpy as np

    last_axis(layer, x)
    width = x.shape[-1]
    values = {name: weight(ctx, layer, name, (width,)).double().numpy() for name in layer.weights}
    variance = values["moving_variance"] + layer.number("epsilon", 1e-3)
    if (variance <= 0).any():
        raise layer.refuse("a moving variance that is not positive")
    scale = values.get("gamma", np.ones(1)) / np.sqrt(variance)
    shift = values.get("beta", np.zeros(1)) - values["moving_mean"] * scale
    y = ctx.g.add("Mul", x.name, ctx.g.constant(ctx.tensor(scale), f"{layer.name}_scale"))
    return replace(x, name=ctx.g.add("Add", y, ctx.g.constant(ctx.tensor(shift), f"{layer.name}_shift")))


@layer_kind("LayerNormalization")
def _layer_norm(ctx: Context, layer: Layer, x: Value) -> Value:
    import torch

    last_axis(layer, x)
    if layer.flag("rms_scaling") or x.shape[-1] is None:
        raise layer.refuse("RMS scaling, or an open last axis; the mean is taken off, of as many values as the file says")
    width = x.shape[-1]
    scale = weight(ctx, layer, "gamma", (width,)) if "gamma" in layer.weights else torch.ones(width)
    operands = [ctx.g.constant(scale, f"{layer.name}_gamma")]
    if "beta" in layer.weights:
        operands.append(ctx.g.constant(weight(ctx, layer, "beta", (width,)), f"{layer.name}_beta"))
    return replace(x, name=ctx.g.add("LayerNormalization", x.name, *operands, axis=-1, epsilon=layer.number("epsilon", 1e-3)))


@layer_kind("Masking")
def _masking(ctx: Context, layer: Layer, x: Value) -> Value:
    """A step is masked where all its values are `mask_value`; they are zero from here on."""
    wants_axes(layer, x, 2)
    differs = ctx.not_equal(x.name, float(layer.number("mask_value", 0.0)))
    mask = ctx.g.add("ReduceMax", differs, ctx.g.literal([-1]), keepdims=0)
    return replace(x, name=ctx.zeroed(x.name, mask), mask=mask)


@layer_kind("UnitNormalization")
def _unit_norm(ctx: Context, layer: Layer, x: Value) -> Value:
    """x / √max(Σx², ε): to length 1 along the last axis."""
    last_axis(layer, x)
    squares = ctx.g.add("ReduceSum", ctx.g.add("Mul", x.name, x.name), ctx.g.literal([-1]), keepdims=1)
    return replace(x, name=ctx.g.add("Div", x.name, ctx.g.add("Sqrt", ctx.g.add("Max", squares, ctx.g.literal(1e-12)))))


@layer_kind("Rescaling")
def _rescaling(ctx: Context, layer: Layer, x: Value) -> Value:
    y = ctx.g.add("Mul", x.name, ctx.g.literal(float(layer.number("scale", 1.0))))
    return replace(x, name=ctx.g.add("Add", y, ctx.g.literal(float(layer.number("offset", 0.0)))))


@layer_kind("Normalization")
def _normalization(ctx: Context, layer: Layer, x: Value) -> Value:
    """(x − mean) / √variance, as `adapt` found them or as the config states them."""
    import numpy as np

    last_axis(layer, x)
    if layer.flag("invert"):
        raise layer.refuse("it is inverted, which is not read")
    width = x.shape[-1]
    stated = {name: layer.get(name) for name in ("mean", "variance")}
    found = {name: layer.weights.get(name, value) for name, value in stated.items()}
    try:
        mean, variance = (np.asarray(found[name], np.float64).reshape(-1) for name in ("mean", "variance"))
    except (TypeError, ValueError):
        raise layer.refuse("its mean and variance are not numbers") from None
    if any(len(values) not in (1, width) for values in (mean, variance)):
        raise layer.refuse(f"its mean and variance are not of {width} values")
    if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()):
        raise layer.refuse("its mean or variance is not finite, or a variance is negative")
    scale = 1 / np.maximum(np.sqrt(variance), EPSILON)
    y = ctx.g.add("Mul", x.name, ctx.g.constant(ctx.tensor(scale), f"{layer.name}_scale"))
    return replace(x, name=ctx.g.add("Add", y, ctx.g.constant(ctx.tensor(-mean * scale), f"{layer.name}_shift")))


# --- operations: Keras 3 writes into functional models how masks come about ---------------------------------------------------------


@layer_kind("ops.NotEqual")
def _not_equal(ctx: Context, layer: Layer, x: Value) -> Value:
    value = layer.whole("value") if x.tokens else float(layer.number("value", 0.0))
    return ctx.value(ctx.not_equal(x.name, value), x.shape)


@layer_kind("ops.ExpandDims")
def _expand_dims(ctx: Context, layer: Layer, x: Value) -> Value:
    at = layer.whole("axis")
    at = at + len(x.shape) + 2 if at < 0 else at
    if not 0 < at <= len(x.shape) + 1:
        raise layer.refuse(f"axis {layer.get('axis')}")
    return ctx.value(ctx.g.add("Unsqueeze", x.name, ctx.g.literal([at])), (*x.shape[: at - 1], 1, *x.shape[at - 1 :]))


@layer_kind("ops.ZerosLike")
def _zeros_like(ctx: Context, layer: Layer, x: Value) -> Value:
    if layer.text("dtype", "float32") != "bool":
        raise layer.refuse("zeros that are no mask")
    return ctx.value(ctx.g.add("ConstantOfShape", ctx.g.add("Shape", x.name), value=False, dtype="bool"), x.shape)


@layer_kind("ops.Any")
def _any(ctx: Context, layer: Layer, x: Value) -> Value:
    if layer.get("axis") not in (-1, [-1], len(x.shape)) or layer.flag("keepdims"):
        raise layer.refuse(f"axis {layer.get('axis')}; the last one is read")
    return ctx.value(ctx.g.add("ReduceMax", x.name, ctx.g.literal([-1]), keepdims=0), x.shape[:-1])


@layer_kind("ops.Squeeze")
def _squeeze(ctx: Context, layer: Layer, x: Value) -> Value:
    if layer.get("axis") not in (-1, [-1]) or x.shape[-1:] != (1,):
        raise layer.refuse(f"axis {layer.get('axis')}; a last axis of one is read")
    return ctx.value(ctx.g.add("Squeeze", x.name, ctx.g.literal([-1])), x.shape[:-1])


def _logical_or(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    if len(inputs) != 2:
        raise layer.refuse(f"reads {len(inputs)} values")
    wider = max(inputs, key=lambda value: math.prod(n or 1 for n in value.shape))
    return [ctx.value(ctx.g.add("Or", inputs[0].name, inputs[1].name), wider.shape)]


LAYERS["ops.LogicalOr"] = _logical_or


# --- several values in ---------------------------------------------------------------------------------------------------------------


def _joined_mask(layer: Layer, inputs: Sequence[Value]) -> str:
    """One mask, or none where an input has none. Masks that come from different places have no plain meaning."""
    masks = {value.mask for value in inputs if len(value.shape) > 1}
    if len(masks - {""}) > 1:
        raise layer.refuse("joins values with different masks")
    return next(iter(masks)) if len(masks) == 1 else ""


def _merge(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    """Add, Multiply and their kin, one value after the other."""
    if len(inputs) < 2 or (layer.kind == "Subtract" and len(inputs) != 2):
        raise layer.refuse(f"reads {len(inputs)} values")
    ranks = {len(value.shape) for value in inputs}
    if len(ranks) > 1:
        raise layer.refuse("joins values of different ranks")
    if layer.kind in ("Maximum", "Minimum") and any(value.mask for value in inputs):
        raise layer.refuse("compares masked values")
    op = {"Add": "Add", "Average": "Add", "Subtract": "Sub", "Multiply": "Mul", "Maximum": "Max", "Minimum": "Min"}[
        layer.kind.removeprefix("ops.")
    ]
    y = inputs[0].name
    for value in inputs[1:]:
        y = ctx.g.add(op, y, value.name)
    if layer.kind == "Average":
        y = ctx.g.add("Mul", y, ctx.g.literal(1 / len(inputs)))
    shapes = zip(*(value.shape for value in inputs), strict=True)
    shape = [next((n for n in sizes if n != 1), 1) for sizes in shapes]
    return [ctx.value(y, shape, _joined_mask(layer, inputs))]


LAYERS.update(dict.fromkeys(("Add", "Average", "Subtract", "Multiply", "Maximum", "Minimum"), _merge))
LAYERS.update(dict.fromkeys(("ops.Add", "ops.Subtract", "ops.Multiply"), _merge))


def _concatenate(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    axis, rank = layer.whole("axis", -1), len(inputs[0].shape) + 1
    at = axis % rank
    if len(inputs) < 2 or at == 0 or any(len(value.shape) + 1 != rank for value in inputs):
        raise layer.refuse(f"joins {len(inputs)} values of different ranks, or along the batch")
    masked = [value.mask for value in inputs if value.mask]
    if masked and (at != rank - 1 or len(masked) < len(inputs)):
        raise layer.refuse("joins masked and unmasked values, or masked ones along the steps")
    sizes = [value.shape[at - 1] for value in inputs]
    total = None if None in sizes else sum(n or 0 for n in sizes)
    shape = [total if i == at - 1 else n for i, n in enumerate(inputs[0].shape)]
    return [ctx.value(ctx.g.add("Concat", *(value.name for value in inputs), axis=at), shape, _joined_mask(layer, inputs))]


LAYERS.update(dict.fromkeys(("Concatenate", "ops.Concatenate"), _concatenate))


def _dot(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    """Σ over one axis of each: (B,…a…) and (B,…b…) -> what is left of the first, then of the second."""
    axes = layer.get("axes")
    pair = axes if isinstance(axes, list) else [axes, axes]
    ranks = [len(value.shape) + 1 for value in inputs]
    if len(inputs) != 2 or len(pair) != 2 or not all(isinstance(n, int) for n in pair) or not all(rank in (2, 3) for rank in ranks):
        raise layer.refuse(f"axes {axes} over {len(inputs)} values")
    pair = [axis % rank for axis, rank in zip(pair, ranks, strict=True)]
    if 0 in pair:
        raise layer.refuse("sums over the batch")
    sides = []
    for value, axis in zip(inputs, pair, strict=True):
        name = value.name
        if layer.flag("normalize"):
            length = ctx.g.add("ReduceL2", name, ctx.g.literal([axis]), keepdims=1)
            name = ctx.g.add("Div", name, ctx.g.add("Max", length, ctx.g.literal(1e-6)))
        sides.append(name)
    left, right = sides
    left = ctx.g.add("Unsqueeze", left, ctx.g.literal([1])) if ranks[0] == 2 else left
    left = ctx.g.add("Transpose", left, perm=[0, 2, 1]) if ranks[0] == 3 and pair[0] == 1 else left
    right = ctx.g.add("Unsqueeze", right, ctx.g.literal([2])) if ranks[1] == 2 else right
    right = ctx.g.add("Transpose", right, perm=[0, 2, 1]) if ranks[1] == 3 and pair[1] == 2 else right
    y = ctx.g.add("MatMul", left, right)
    rest = [[n for i, n in enumerate(value.shape) if i + 1 != axis] for value, axis in zip(inputs, pair, strict=True)]
    gone = [axis for axis, rank in ((1, ranks[0]), (2, ranks[1])) if rank == 2]
    if ranks == [2, 2]:
        gone = [1]  # Keras keeps one axis
    y = ctx.g.add("Squeeze", y, ctx.g.literal(gone)) if gone else y
    return [ctx.value(y, rest[0] + rest[1] or [1])]


LAYERS["Dot"] = _dot


def unknown(layers: Sequence[Layer]) -> list[str]:
    """A reason for every layer that is not read, the wrapped ones too."""
    reasons = []
    for layer in layers:
        inner = list(layer.model.layers.values()) if layer.model is not None else list(layer.parts.values())
        if layer.model is None and layer.kind not in LAYERS and layer.kind not in ("InputLayer", "StackedRNNCells", *CELLS):
            reasons.append(str(layer.refuse(f"rnn2bin does not convert it; {_hint(layer)}")))
        reasons += unknown(inner)
    return reasons


def _hint(layer: Layer) -> str:
    if layer.kind == "Lambda":
        return "its code is in the file, and is never run"
    return f"where the recipe knows what it computes, it may say so: `source: {{keras: [{{name: {word(layer.name)}, kind: …}}]}}`"
