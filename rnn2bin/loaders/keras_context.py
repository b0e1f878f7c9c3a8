"""What a Keras layer's handler is given and where it is entered: the graph as it is being made, its values, the table of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rnn2bin.loaders.graph import GraphBuilder
from rnn2bin.loaders.keras_config import Layer

if TYPE_CHECKING:
    from torch import Tensor


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
TRAINING_ONLY = (*_DROPOUTS, "ActivityRegularization", "Identity")
_NORMS = ("BatchNormalization", "LayerNormalization", "UnitNormalization", "Normalization", "Rescaling")
_ONE_TO_ONE = ("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", *_NORMS)
PASS_MASKS = ("Dense", *_ONE_TO_ONE, *TRAINING_ONLY)


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


def weight(ctx: Context, layer: Layer, name: str, shape: Sequence[int | None]) -> Tensor:
    """A layer's array as float32; its shape must be the one wanted (None: any size)."""
    values = layer.weights[name]
    if len(values.shape) != len(shape) or any(b is not None and a != b for a, b in zip(values.shape, shape, strict=True)):
        raise layer.refuse(f"its {name} has shape {values.shape}, wanted ({', '.join('any' if n is None else str(n) for n in shape)})")
    return ctx.tensor(values)


def wants_axes(layer: Layer, x: Value, wanted: int) -> None:
    """Refuses a value that has not so many axes, the batch's aside."""
    if len(x.shape) != wanted:
        raise layer.refuse(f"reads {len(x.shape) + 1} axes, wanted {wanted + 1} with the batch")


def last_axis(layer: Layer, x: Value) -> None:
    """Refuses every `axis` of a layer but the last."""
    axis = layer.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(x.shape)):
        raise layer.refuse(f"axis {axis}; the last one is read")
