"""Keras's layers -> nodes of a graph. A layer that is not in `LAYERS` is refused by name; no code of a file is ever run.

Values are (batch, …) as in Keras. Source: keras-team/keras, `layers/` and `activations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rnn2bin.loaders import keras_recurrent
from rnn2bin.loaders.graph import GraphBuilder
from rnn2bin.loaders.keras_config import Layer, word
from rnn2bin.loaders.keras_weights import CELLS

if TYPE_CHECKING:
    from torch import Tensor

MOST_REPEATS = 65536
EPSILON = 1e-7  # keras.backend.epsilon()


@dataclass(frozen=True)
class Value:
    """A value of the graph: `shape` without the batch axis, None where any size may come; `mask`: a value (B,T), "" where there is none.

    `tokens`: the network's own input as whole numbers.
    """

    name: str
    shape: tuple[int | None, ...]
    mask: str = ""
    tokens: bool = False


@dataclass
class Context:
    """The graph as it is being made, and what the file's generation of Keras means by its words.

    `hard_sigmoid`: the slope of LayerSpec; `zeroes_masked`: whether Bidirectional makes masked steps zero; `table`: the input's embedding.
    """

    g: GraphBuilder
    hard_sigmoid: float
    zeroes_masked: bool
    flips_kernels: bool = False  # Theano's convolutions run the kernel backwards
    table: Tensor | None = None
    _differing: dict[tuple[str, float], str] = field(default_factory=dict)

    def value(self, name: str, shape: Sequence[int | None], mask: str = "") -> Value:
        return Value(name, tuple(shape), mask)

    def tensor(self, values: Any) -> Tensor:
        """An array in float32; what is too large becomes infinite, which the builder refuses."""
        import numpy as np
        import torch

        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(values, np.float32, order="C"))

    def not_equal(self, name: str, value: float) -> str:
        """Where x is not `value`; one value for the same question, so that masks of one origin are seen to be the same."""
        key = (name, float(value))
        if key not in self._differing:
            self._differing[key] = self.g.add("Not", self.g.add("Equal", name, self.g.literal(value)))
        return self._differing[key]

    def flipped(self, name: str, *, axis: int) -> str:
        """Reversed along an axis."""
        first, last, step = self.g.literal([-1]), self.g.literal([-(2**31)]), self.g.literal([-1])
        return self.g.add("Slice", name, first, last, self.g.literal([axis]), step)

    def zeroed(self, name: str, mask: str) -> str:
        """x (B,T,F) with zeros where the mask (B,T) is false, whatever stood there."""
        return self.g.add("Where", self.g.add("Unsqueeze", mask, self.g.literal([-1])), name, self.g.literal(0.0))


Handler = Callable[[Context, Layer, list[Value]], list[Value]]
LAYERS: dict[str, Handler] = {}
_DROPOUTS = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise")
_TRAINING_ONLY = (*_DROPOUTS, "ActivityRegularization", "Identity")
_NORMS = ("BatchNormalization", "LayerNormalization", "UnitNormalization", "Normalization", "Rescaling")
_ONE_TO_ONE = ("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", *_NORMS)
PASS_MASKS = ("Dense", *_ONE_TO_ONE, *_TRAINING_ONLY)


def call(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    """What a layer makes of its inputs; masks go on as Keras lets them. UnsupportedError names the layer."""
    handler = LAYERS.get(layer.kind)
    if handler is None:
        raise layer.refuse("rnn2bin does not convert it here")
    if layer.config.get("data_format") not in (None, "channels_last"):
        raise layer.refuse(f"data_format {layer.config['data_format']!r}; channels_last is read")
    if any(value.tokens for value in inputs) and layer.kind not in ("Embedding", "ops.NotEqual"):
        inputs = [_as_floats(ctx, value) for value in inputs]
    outputs = handler(ctx, layer, inputs)
    if layer.kind in PASS_MASKS and inputs[0].mask:
        outputs = [replace(value, mask=inputs[0].mask) for value in outputs]
    return outputs


def _as_floats(ctx: Context, value: Value) -> Value:
    return replace(value, name=ctx.g.add("Cast", value.name, to="float32"), tokens=False) if value.tokens else value


def layer_kind(*names: str) -> Callable[[Callable[[Context, Layer, Value], Value]], Callable[[Context, Layer, Value], Value]]:
    """Enter a function of one value under the classes it is for."""

    def enter(function: Callable[[Context, Layer, Value], Value]) -> Callable[[Context, Layer, Value], Value]:
        def handler(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
            if len(inputs) != 1:
                raise layer.refuse(f"reads {len(inputs)} values; one is read")
            return [function(ctx, layer, inputs[0])]

        LAYERS.update(dict.fromkeys(names, handler))
        return function

    return enter


LAYERS.update({kind: keras_recurrent.recurrent for kind in (*CELLS, "RNN") if not kind.endswith("Cell")})
LAYERS["Bidirectional"] = keras_recurrent.bidirectional


def weight(ctx: Context, layer: Layer, name: str, shape: Sequence[int | None]) -> Tensor:
    """A layer's array as float32; its shape must be the one wanted (None: any size)."""
    values = layer.weights[name]
    if len(values.shape) != len(shape) or any(b is not None and a != b for a, b in zip(values.shape, shape, strict=True)):
        raise layer.refuse(f"its {name} has shape {values.shape}, wanted ({', '.join('any' if n is None else str(n) for n in shape)})")
    return ctx.tensor(values)


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


@layer_kind(*_TRAINING_ONLY)
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
    _axes(layer, x, axes + 1)
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
    _axes(layer, x, axes + 1)
    sizes = layer.wholes("pool_size", axes, 2)
    strides = layer.wholes("strides", axes, 0) if layer.get("strides") is not None else sizes
    op = "MaxPool" if layer.kind.startswith("Max") else "AveragePool"
    y = ctx.g.add(op, _channels_first(ctx, x), kernel_shape=sizes, strides=strides, **_padding(layer, [0] * axes))
    shape = [_length(layer, n, k, s) for n, k, s in zip(x.shape, sizes, strides, strict=False)]
    return ctx.value(_channels_last(ctx, y, axes), (*shape, x.shape[-1]))


def _axes(layer: Layer, x: Value, wanted: int) -> None:
    if len(x.shape) != wanted:
        raise layer.refuse(f"reads {len(x.shape) + 1} axes, wanted {wanted + 1} with the batch")


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
    _axes(layer, x, 2)
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
    _axes(layer, x, 2)
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

    axis = layer.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(x.shape)):
        raise layer.refuse(f"axis {axis}; the last one is read")
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

    axis = layer.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(x.shape)) or layer.flag("rms_scaling") or x.shape[-1] is None:
        raise layer.refuse(f"axis {axis} or RMS scaling; the last axis is read, with its mean")
    width = x.shape[-1]
    scale = weight(ctx, layer, "gamma", (width,)) if "gamma" in layer.weights else torch.ones(width)
    operands = [ctx.g.constant(scale, f"{layer.name}_gamma")]
    if "beta" in layer.weights:
        operands.append(ctx.g.constant(weight(ctx, layer, "beta", (width,)), f"{layer.name}_beta"))
    return replace(x, name=ctx.g.add("LayerNormalization", x.name, *operands, axis=-1, epsilon=layer.number("epsilon", 1e-3)))


@layer_kind("Masking")
def _masking(ctx: Context, layer: Layer, x: Value) -> Value:
    """A step is masked where all its values are `mask_value`; they are zero from here on."""
    _axes(layer, x, 2)
    differs = ctx.not_equal(x.name, float(layer.number("mask_value", 0.0)))
    mask = ctx.g.add("ReduceMax", differs, ctx.g.literal([-1]), keepdims=0)
    return replace(x, name=ctx.zeroed(x.name, mask), mask=mask)


@layer_kind("UnitNormalization")
def _unit_norm(ctx: Context, layer: Layer, x: Value) -> Value:
    """x / √max(Σx², ε): to length 1 along the last axis."""
    axis = layer.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(x.shape)):
        raise layer.refuse(f"axis {axis}; the last one is read")
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

    axis, width = layer.get("axis", -1), x.shape[-1]
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(x.shape)) or layer.flag("invert"):
        raise layer.refuse(f"axis {axis}, or inverted; the last axis is read")
    stated = {name: layer.get(name) for name in ("mean", "variance")}
    found = {name: layer.weights.get(name, value) for name, value in stated.items()}
    try:
        mean, variance = (np.asarray(found[name], np.float64).reshape(-1) for name in ("mean", "variance"))
    except (TypeError, ValueError):
        raise layer.refuse("its mean and variance are not numbers") from None
    if not np.isfinite(variance).all() or any(len(values) not in (1, width) for values in (mean, variance)):
        raise layer.refuse(f"its mean and variance are not of {width} values")
    scale = 1 / np.maximum(np.sqrt(variance), EPSILON)
    y = ctx.g.add("Mul", x.name, ctx.g.constant(ctx.tensor(scale), f"{layer.name}_scale"))
    return replace(x, name=ctx.g.add("Add", y, ctx.g.constant(ctx.tensor(-mean * scale), f"{layer.name}_shift")))


# --- shapes ----------------------------------------------------------------------------------------------------------------------


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
    _axes(layer, x, axes + 1)
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
    _axes(layer, x, 2)
    if not 0 < size <= MOST_REPEATS or x.shape[1] is None:
        raise layer.refuse(f"repeats steps {size} times; up to {MOST_REPEATS} are read")
    wide = ctx.g.add("Tile", x.name, ctx.g.literal([1, 1, size]))
    y = ctx.g.add("Reshape", wide, ctx.g.literal([0, -1, x.shape[1]]))
    return ctx.value(y, (None if x.shape[0] is None else x.shape[0] * size, x.shape[1]))


@layer_kind("RepeatVector")
def _repeat(ctx: Context, layer: Layer, x: Value) -> Value:
    count = layer.whole("n")
    _axes(layer, x, 1)
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
