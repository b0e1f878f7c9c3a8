"""Keras's JSON -> layers and how they are called. Nothing of it is run: a class is a name here, and a function is refused.

Read: the configs of Keras 1 and 2 (`inbound_nodes` as lists) and of Keras 3 (tensors that tell their history), Sequential and functional,
one nested in another. Source: keras-team/keras, `Functional.get_config` and `Sequential.get_config` of each generation.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy import ndarray

MODELS = ("Sequential", "Functional", "Model")
MOST_LAYERS = 2000
MOST_NESTED = 8
# Of Keras 3, between layers; no layer has their names.
OPERATIONS = ("NotEqual", "ExpandDims", "ZerosLike", "LogicalOr", "Any", "Squeeze")
# Keras 1's names of classes and options, and what Keras 2 calls them.
OLD_KINDS = {"Convolution1D": "Conv1D", "Convolution2D": "Conv2D", "TimeDistributedDense": "Dense"}
OLD_OPTIONS = {
    "output_dim": "units",
    "inner_activation": "recurrent_activation",
    "bias": "use_bias",
    "border_mode": "padding",
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "subsample_length": "strides",
    "subsample": "strides",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "p": "rate",
}


@dataclass
class Layer:
    """One layer as its file describes it. `parts` are the layers within it, by the path under which Keras 3 saves each."""

    name: str
    kind: str
    config: dict[str, Any]
    parts: dict[str, Layer] = field(default_factory=dict)
    model: Model | None = None  # of a nested one
    weights: dict[str, ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"layer {word(self.name)!r} ({word(self.kind)})"

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self}: {why}")

    def get(self, option: str, default: Any = None) -> Any:
        value = self.config.get(option)
        return default if value is None else value

    def flag(self, option: str, default: bool = False) -> bool:
        value = self.get(option, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{option} is {_short(value)}, not true or false")
        return value

    def number(self, option: str, default: float) -> float:
        value = self.get(option, default)
        if isinstance(value, Mapping):  # Keras 2 writes some numbers as {"class_name": "__numpy__" or "ndarray", "value": …}
            value = value.get("value", value.get("config"))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(f"{option} is {_short(value)}, not a number")
        return value

    def whole(self, option: str, default: int | None = None) -> int:
        value = self.get(option, default)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(f"{option} is {_short(value)}, not a whole number")
        return value

    def wholes(self, option: str, count: int, default: int) -> list[int]:
        """One number for each of `count` axes, positive."""
        value = self.get(option, default)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**20 for n in values):
            raise self.refuse(f"{option} is {_short(value)}, not {count} positive whole numbers")
        return values

    def text(self, option: str, default: str) -> str:
        """A name. Keras 3 writes a function of its own as {"class_name": "function", "config": name}."""
        value = self.get(option, default)
        if isinstance(value, Mapping) and value.get("class_name") == "function" and not value.get("registered_name"):
            value = value.get("config")
        if not isinstance(value, str):
            shown = value.get("class_name") if isinstance(value, Mapping) else value
            raise self.refuse(f"{option} is {_short(shown)}, which rnn2bin does not know")
        return value

    def shape(self, option: str) -> tuple[int | None, ...] | None:
        """A shape whose first axis is the batch; None where there is none."""
        value = self.config.get(option)
        if value is None:
            return None
        if isinstance(value, Mapping):  # Keras 3 has written {"class_name": "__tuple__", "items": […]}
            value = value.get("items")
        if (
            not isinstance(value, list)
            or not 0 < len(value) <= 8
            or not all(n is None or (isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31) for n in value)
        ):
            raise self.refuse(f"{option} is {_short(value)}, not a shape")
        return tuple(value)


@dataclass(frozen=True)
class Ref:
    """A tensor: output `tensor` of the `node`-th call of a layer."""

    layer: str
    node: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Call:
    """What a layer reads in one call: its tensors, behind them initial states; the mask, where the file says which."""

    reads: list[Ref]
    mask: Ref | None = None

    @property
    def all(self) -> list[Ref]:
        return self.reads + ([self.mask] if self.mask else [])


@dataclass(frozen=True)
class Model:
    """Layers by name, in the file's order; their calls; what goes in and out."""

    layers: dict[str, Layer]
    calls: dict[str, list[Call]]
    inputs: list[Ref]
    outputs: list[Ref]


def model(entry: Any, depth: int = 0) -> Model:
    """A model from its {"class_name": …, "config": …}. UnsupportedError with what does not fit."""
    kind, config = _kind(entry), _get(entry, "config", (dict, list))
    if depth > MOST_NESTED:
        raise UnsupportedError(f"models nested more than {MOST_NESTED} deep")
    if kind not in MODELS:
        raise UnsupportedError(
            f"a model of class {kind!r}: code of its own, which is not in the file; Sequential and functional models are read"
        )
    entries = config if isinstance(config, list) else _get(config, "layers", (list,))
    if len(entries) > MOST_LAYERS:
        raise UnsupportedError(f"{len(entries)} layers; up to {MOST_LAYERS} are read")
    if kind == "Sequential":
        return _sequential([layer(each, depth) for each in entries], config if isinstance(config, dict) else {})
    return _functional(entries, config, depth)


def layer(entry: Any, depth: int = 0) -> Layer:
    """A layer from its entry, with the layers within it."""
    kind, config = _kind(entry), _get(entry, "config", (dict, list))
    name: Any = entry.get("name") or (config.get("name") if isinstance(config, dict) else None) or kind
    if not isinstance(name, str):
        raise UnsupportedError(f"a layer's name is {_short(name)}, not text")
    if kind in MODELS:
        return Layer(name, kind, config if isinstance(config, dict) else {}, model=model(entry, depth + 1))
    if not isinstance(config, dict):
        raise UnsupportedError(f"layer {name!r}: its config is no map")
    found = Layer(name, _owned(kind, entry), {OLD_OPTIONS.get(str(key), str(key)): value for key, value in config.items()})
    found.parts = dict(_parts(found, depth + 1))
    return found


def _owned(kind: str, entry: Mapping[str, Any]) -> str:
    """The class under a name that is Keras's alone: somebody's own class may be called LSTM too."""
    module, registered = (value if isinstance(value := entry.get(key), str) else "" for key in ("module", "registered_name"))
    if module.startswith("keras.src.ops.") or (not module and kind in OPERATIONS):
        return f"ops.{kind}"
    foreign = module and not re.match(r"(tf_)?keras\b|tensorflow\b|builtins\b", module)
    if foreign or (">" in registered and not registered.startswith("keras")):
        return registered if ">" in registered else f"{module}>{kind}"
    return OLD_KINDS.get(kind, kind)


def _parts(outer: Layer, depth: int) -> Iterator[tuple[str, Layer]]:
    if depth > MOST_NESTED:
        raise UnsupportedError(f"layers nested more than {MOST_NESTED} deep")
    if outer.kind == "Bidirectional":
        forward = layer(outer.config.get("layer"), depth)
        own = outer.config.get("backward_layer")
        backward = layer(own, depth) if own else layer(outer.config.get("layer"), depth)
        backward.config = backward.config | {"go_backwards": not forward.flag("go_backwards")}
        yield from (("forward_layer", forward), ("backward_layer", backward))
    elif outer.kind == "TimeDistributed":
        yield "layer", layer(outer.config.get("layer"), depth)
    elif outer.kind == "RNN":
        yield "cell", layer(outer.config.get("cell"), depth)
    elif outer.kind == "StackedRNNCells":
        cells = [layer(each, depth) for each in _get(outer.config, "cells", (list,))[:MOST_LAYERS]]
        yield from zip((f"cells/{name}" for name in container_names(cells)), cells, strict=True)


def container_names(layers: Sequence[Layer]) -> list[str]:
    """The names under which Keras 3 saves a list of layers: their classes in snake case, numbered."""
    names, counts = [], dict[str, int]()
    for each in layers:
        plain = re.sub(r"\W+", "", each.kind.rpartition(">")[2])
        snake = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", plain)).lower()
        names.append(f"{snake}_{counts[snake]}" if snake in counts else snake)
        counts[snake] = counts.get(snake, 0) + 1
    return names


def _sequential(layers: list[Layer], config: Mapping[str, Any]) -> Model:
    if not layers:
        raise UnsupportedError("a Sequential model without layers")
    if layers[0].kind != "InputLayer":
        layers = [Layer("input of the model", "InputLayer", _input_config(layers[0], config)), *layers]
    calls = {after.name: [Call([Ref(before.name)])] for before, after in itertools.pairwise(layers)}
    if len({each.name for each in layers}) < len(layers):
        raise UnsupportedError("two layers of one name")
    return Model({each.name: each for each in layers}, calls, [Ref(layers[0].name)], [Ref(layers[-1].name)])


def _input_config(first: Layer, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the first layer says of the model's input."""
    if first.model is not None:
        inner = first.model
        named = inner.inputs[0].layer if inner.inputs else ""
        if named not in inner.layers:
            raise UnsupportedError(f"the input {named!r} of the model {first.name!r} is none of its layers")
        return inner.layers[named].config
    for found in (first.config.get("batch_input_shape"), first.config.get("batch_shape"), config.get("build_input_shape")):
        if found is not None:
            return {"batch_shape": found}
    return {"batch_shape": [None, None]} if first.kind == "Embedding" else {}


def _functional(entries: list[Any], config: Mapping[str, Any], depth: int) -> Model:
    layers: dict[str, Layer] = {}
    calls: dict[str, list[Call]] = {}
    for entry in entries:
        found = layer(entry, depth)
        if found.name in layers:
            raise UnsupportedError(f"two layers named {found.name!r}")
        layers[found.name] = found
        calls[found.name] = [_read_call(node, found) for node in _get(entry, "inbound_nodes", (list,))]
    inputs, outputs = (_ends(config, key) for key in ("input_layers", "output_layers"))
    return Model(layers, calls, inputs, outputs)


def _ends(config: Mapping[str, Any], key: str) -> list[Ref]:
    value = _get(config, key, (list, dict))
    if isinstance(value, dict):
        value = list(value.values())
    return [_ref(value)] if value and isinstance(value[0], str) else [_ref(each) for each in value]


def _ref(value: Any) -> Ref:
    fits = isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str)
    if not fits or not all(isinstance(n, int) and 0 <= n < 10_000 for n in value[1:3]):
        raise UnsupportedError(f"{_short(value)} names no layer's output")
    return Ref(*value[:3])


def _read_call(node: Any, owner: Layer) -> Call:
    kwargs: dict[str, Any] = {}
    if isinstance(node, list):
        found = [_ref(each) for each in (node if not node or isinstance(node[0], list) else [node])]
        for each in node:
            kwargs |= each[3] if isinstance(each, list) and len(each) > 3 and isinstance(each[3], dict) else {}
        states = kwargs.pop("initial_state", None) or []
        found += [_ref(each) for each in (states if isinstance(states, list) else [states])]
    elif isinstance(node, dict):
        kwargs, args = dict(_get(node, "kwargs", (dict,))), _get(node, "args", (list,))
        if owner.kind == "ops.NotEqual" and len(args) == 2 and isinstance(args[1], int | float):
            owner.config["value"], args = args[1], args[:1]
        found = list(_histories(args, owner)) + list(_histories(kwargs.pop("initial_state", None), owner))
    else:
        raise owner.refuse("its inbound nodes are not readable")
    masks = list(_histories(kwargs.pop("mask", None), owner)) if isinstance(node, dict) else []
    odd = [key for key, value in kwargs.items() if key != "training" and value not in (None, [], [None])]
    if odd or len(masks) > 1:
        raise owner.refuse(f"is called with {', '.join(map(str, odd)) or 'masks'}, which rnn2bin does not follow")
    return Call(found, masks[0] if masks else None)


def _histories(value: Any, owner: Layer, depth: int = 0) -> Iterator[Ref]:
    if value is None:
        return
    if isinstance(value, list) and depth < MOST_NESTED:
        for each in value:
            yield from _histories(each, owner, depth + 1)
    elif isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        yield _ref(_get(_get(value, "config", (dict,)), "keras_history", (list,)))
    else:
        raise owner.refuse(f"is called with {_short(value)}, which is no other layer's output")


def _kind(entry: Any) -> str:
    return str(_get(entry, "class_name", (str,)))


def _get(entry: Any, key: str, types: tuple[type, ...]) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get(key), types):
        raise UnsupportedError(f"the model's config is not one that Keras writes: no {key} in {_short(entry)}")
    return entry[key]


def word(text: str) -> str:
    """A name from the file as it may stand in a message: no line breaks or escape sequences, and not long."""
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= 80 else text[:79] + "…"


def _short(value: Any) -> str:
    """At most a few words of a value that may be anything."""
    if isinstance(value, Mapping):
        return f"a map of {', '.join(sorted(map(str, value))[:5])[:60]}"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
