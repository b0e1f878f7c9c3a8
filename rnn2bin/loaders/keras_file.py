"""Reader of Keras files: `.h5` and `.hdf5` of Keras 1 and 2, `.keras` and `.weights.h5` of Keras 3 -> Assembly. Keras itself is never used.

A file is a config (JSON: layers and how they are called) and weights (HDF5). Where there are weights only, the recipe's
`source: {keras: …}` is the config. Names in the file are data: a class is looked up in a closed table, a function is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders import keras_container, keras_context, keras_layers
from rnn2bin.loaders.assemble import Assembly
from rnn2bin.loaders.graph import GraphBuilder
from rnn2bin.loaders.keras_config import Call, Layer, Model, Ref, layer, model, word
from rnn2bin.loaders.keras_container import KerasFile
from rnn2bin.loaders.keras_context import Context, Value
from rnn2bin.loaders.keras_draft import draft
from rnn2bin.loaders.keras_weights import CELLS, KERNELS, Weights
from rnn2bin.recipe import KerasLayer, Source

if TYPE_CHECKING:
    from numpy import ndarray

MOST_VALUES = 2**24  # in one input sequence


def read(path: Path, source: Source) -> Assembly:
    """The network of a Keras file. Where the file holds weights only and the recipe does not say what they are: a draft of that.

    Raises UnsupportedError with every reason, UnsafeError for links, bombs and false sizes, UsageError where h5py is missing.
    """
    if not source.automatic:
        raise UnsupportedError("a Keras file says itself how its layers join; `source` may hold `keras`, `output` and `ignore`")
    file = keras_container.read(path)
    if not file.tensors:
        raise UnsupportedError(f"{path}: holds no weights")
    if file.config is None and not source.keras:
        proposal, reasons = draft(file.groups, file.tensors)
        return Assembly(reasons=reasons, draft={"keras": proposal}, tensors=_as_torch(file.tensors))
    described = _described(file, source.keras or []) if file.config is not None else _declared(file, source.keras or [])
    return _network(file, described, source)


def _as_torch(tensors: Mapping[str, ndarray]) -> dict[str, Any]:
    import numpy as np
    import torch

    kinds = {"f": np.float32, "i": np.int64, "u": np.int64}
    return {name: torch.from_numpy(values.astype(kinds[values.dtype.kind])) for name, values in tensors.items()}


# --- what the file or the recipe says of the layers --------------------------------------------------------------------------------


def _described(file: KerasFile, given: Sequence[KerasLayer]) -> Model:
    """The file's own config, with what the recipe says otherwise."""
    assert file.config is not None
    known = {each.name: each for each in given}
    found = model(file.config)
    reasons = [f"source.keras: {name!r} is no layer of the file" for name in known.keys() - {each.name for each in _all(found)}]
    for each in _all(found):
        one = known.get(each.name)
        if one is None:
            continue
        if one.inputs is not None or one.bidirectional is not None:
            reasons.append(f"source.keras: {each.name!r}: the file says which layers it reads and whether it goes both ways")
        each.kind = one.kind or each.kind
        each.config = {**each.config, **_input(one), **one.config()}
    if reasons:
        raise UnsupportedError(*reasons)
    return found


def _all(described: Model) -> list[Layer]:
    """Every layer, those of nested models and wrapped ones too."""
    found = []
    open_ = list(described.layers.values())
    while open_:
        each = open_.pop()
        found.append(each)
        open_ += [*each.parts.values(), *(each.model.layers.values() if each.model is not None else [])]
    return found


def _input(one: KerasLayer) -> dict[str, Any]:
    shape = {"batch_shape": [None, *one.shape]} if one.shape is not None else {}
    return shape | ({"one_hot": True} if one.one_hot else {})


def _declared(file: KerasFile, given: Sequence[KerasLayer]) -> Model:
    """The recipe's list of layers, for a file that holds weights only."""
    reasons = [f"source.keras: {one.name!r} has no kind" for one in given if one.kind is None]
    reasons += [f"source.keras: {name!r} is in the file, but not in the list" for name in _missing(file, given)]
    if len({one.name for one in given}) < len(given):
        reasons.append("source.keras: two layers of one name")
    if reasons:
        raise UnsupportedError(*reasons)
    layers = {one.name: _declared_layer(file, one) for one in given}
    if next(iter(layers.values())).kind != "InputLayer":
        layers = {"input of the model": Layer("input of the model", "InputLayer", {}), **layers}
    entry, reader = [*layers.values(), Layer("", "", {})][:2]
    entry.config = _width(file, reader) | entry.config
    names = list(layers)
    reads = {one.name: one.inputs for one in given}
    calls = {
        name: [Call([Ref(each) for each in reads.get(name) or ([before] if before else [])])]
        for before, name in zip(["", *names], names, strict=False)
    }
    calls |= {name: [] for name, each in layers.items() if each.kind == "InputLayer"}
    read = [(name, ref.layer) for name in names for call in calls[name] for ref in call.reads]
    strange = [f"source.keras: {name!r} reads {other!r}, which is no layer here" for name, other in read if other not in layers]
    if strange:
        raise UnsupportedError(*strange)
    return Model(layers, calls, [Ref(name) for name, each in layers.items() if each.kind == "InputLayer"], [Ref(names[-1])])


def _missing(file: KerasFile, given: Sequence[KerasLayer]) -> list[str]:
    named = {one.name for one in given}
    return [name for name, paths in file.groups.items() if paths and name not in named]


def _declared_layer(file: KerasFile, one: KerasLayer) -> Layer:
    count = len(file.groups.get(one.name, ())) // (2 if one.bidirectional else 1)
    most = {**dict.fromkeys(CELLS, 3), **dict.fromkeys(KERNELS, 2)}.get(str(one.kind), 0)
    config = {"name": one.name, "return_sequences": False, "use_bias": count >= most} | one.config() | _input(one)
    entry = {"class_name": "InputLayer" if one.kind == "Input" else one.kind, "name": one.name, "config": config}
    if one.bidirectional:
        entry = {"class_name": "Bidirectional", "name": one.name, "config": {"layer": entry, "merge_mode": one.bidirectional}}
    return layer(entry)


def _width(file: KerasFile, first: Layer) -> dict[str, Any]:
    """The shape of an input that nobody declared: as wide as the kernel of the first layer behind it."""
    if first.kind == "Embedding":
        return {"batch_shape": [None, None]}
    shapes = [file.tensors[path].shape for path in file.groups.get(first.name, ())[:1] if path in file.tensors]
    return {"batch_shape": [None, None, shapes[0][-2]]} if shapes and len(shapes[0]) > 1 else {}


# --- the network -------------------------------------------------------------------------------------------------------------------


def _network(file: KerasFile, described: Model, source: Source) -> Assembly:
    output = _output(described, source)
    used = _leading_to(described, output)
    ignored = lambda name: any(name == pattern or fnmatchcase(name, pattern) for pattern in source.ignore)
    layers = list(described.layers.values())
    reasons = keras_layers.unknown([each for each in layers if each.name in used])
    reasons += [
        f"{each}: does not lead to the output {output.layer!r}; where it is not needed, list it: `source: {{ignore: [{word(each.name)}]}}`"
        for each in layers
        if each.name not in used and not ignored(each.name)
    ]
    weights = Weights(file.tensors, file.groups if file.ordered or file.config is None else None, file.root)
    missing = weights.give(layers, used)
    if not reasons:
        left = [path for path in weights.leftovers() if not ignored(path)]
        reasons = missing + [f"{path}: an array that no layer of the model uses" for path in left if not missing]
    if reasons:
        raise UnsupportedError(*reasons)
    inputs = [name for name in (ref.layer for ref in described.inputs) if name in used]
    if len(inputs) != 1:
        raise UnsupportedError(f"reads {len(inputs)} inputs ({', '.join(map(word, inputs))}); networks of one input are converted")
    ctx = Context(GraphBuilder(), 1 / 3 if file.generation >= 3 else 0.4, file.zeroes_masked, flips_kernels=file.backend == "theano")
    first = described.layers[inputs[0]]
    value = _entry(first, described)
    (result,) = _run(ctx, described, {inputs[0]: value}, [output])
    hot = value.shape[-1] if first.flag("one_hot") else None
    return ctx.g.network(
        result.name,
        input_shape=() if ctx.table is not None or hot else [int(n or 0) for n in value.shape[1:]],
        embedding=ctx.table if ctx.table is not None else hot,
        steps=value.shape[0],
    )


def _output(described: Model, source: Source) -> Ref:
    if source.output is not None:
        if source.output not in described.layers:
            raise UnsupportedError(
                f"source.output: the file has no layer {source.output!r}; layers: {', '.join(map(word, described.layers))}"
            )
        return Ref(source.output)
    if len(described.outputs) != 1:
        names = ", ".join(word(ref.layer) for ref in described.outputs)
        raise UnsupportedError(f"gives {len(described.outputs)} outputs ({names}); say which: `source: {{output: NAME}}`")
    return described.outputs[0]


def _leading_to(described: Model, output: Ref) -> set[str]:
    """Names of the layers that the output needs."""
    used: set[str] = set()
    open_ = [output]
    while open_:
        ref = open_.pop()
        if ref.layer not in described.layers:
            raise UnsupportedError(f"the model's config reads layer {ref.layer!r}, which it does not have")
        if ref.layer not in used:
            used.add(ref.layer)
            open_ += [each for call in described.calls.get(ref.layer, []) for each in call.all]
    return used


def _entry(first: Layer, described: Model) -> Value:
    """The network's input. Tokens where an embedding reads them."""
    shape = first.shape("batch_shape") or first.shape("batch_input_shape")
    if shape is None or len(shape) < 2:
        raise first.refuse("its shape is not in the file; give it: `source: {keras: [{name: …, shape: [null, …]}]}` (steps, features)")
    steps = shape[1:]
    if None in steps[1:]:
        raise first.refuse(f"shape {steps}: only the number of steps may be open")
    if math.prod(n or 1 for n in steps) > MOST_VALUES:
        raise first.refuse(f"shape {steps}: more than {MOST_VALUES} values in a sequence")
    if len(steps) == 1 and _feeds_embedding(described, first.name):
        return Value("tokens", steps, tokens=True)
    return Value("input", steps)


def _feeds_embedding(described: Model, name: str) -> bool:
    for reader, calls in described.calls.items():
        if not any(ref.layer == name for call in calls for ref in call.reads) or reader not in described.layers:
            continue
        found = described.layers[reader]
        if found.kind == "Embedding" or (
            found.model is not None and any(_feeds_embedding(found.model, ref.layer) for ref in found.model.inputs)
        ):
            return True
    return False


@dataclass
class _Progress:
    """Values that are there: by layer, one list of outputs for each call."""

    made: dict[str, list[list[Value]]] = field(default_factory=dict)

    def get(self, ref: Ref) -> Value | None:
        calls = self.made.get(ref.layer, [])
        if ref.node >= len(calls):
            return None
        if ref.tensor >= len(calls[ref.node]):
            raise UnsupportedError(f"layer {ref.layer!r} gives no output {ref.tensor} here")
        return calls[ref.node][ref.tensor]


def _run(ctx: Context, described: Model, given: Mapping[str, Value], outputs: Sequence[Ref]) -> list[Value]:
    """Call layers whose inputs are there until the outputs are; all reasons of the layers that cannot be made, at once."""
    needed = set().union(*(_leading_to(described, ref) for ref in outputs))
    progress = _Progress({name: [[value]] for name, value in given.items()})
    waiting = [
        (described.layers[name], call)
        for name in described.layers
        if name in needed
        for call in described.calls.get(name, [])
        if call.reads
    ]
    reasons: list[str] = []
    while waiting:
        blocked = []
        stuck: set[str] = set()  # the calls of a layer keep their order
        for each, call in waiting:
            inputs = [progress.get(ref) for ref in call.all] if each.name not in stuck else [None]
            if None in inputs:
                blocked.append((each, call))
                stuck.add(each.name)
                continue
            try:
                made = _call(ctx, each, _masked(call, [value for value in inputs if value is not None]))
            except UnsupportedError as error:
                reasons += error.reasons
                continue
            progress.made.setdefault(each.name, []).append(made)
        if len(blocked) == len(waiting):
            break
        waiting = blocked
    results = [progress.get(ref) for ref in outputs]
    if reasons or None in results:
        raise UnsupportedError(*(dict.fromkeys(reasons) or ["the model's config is a circle: layers wait for each other"]))
    return [value for value in results if value is not None]


def _masked(call: Call, values: list[Value]) -> list[Value]:
    """The values read, the first with the mask that the call names."""
    if call.mask is None:
        return values
    first, *rest, mask = values
    return [replace(first, mask=mask.name), *rest]


def _call(ctx: Context, each: Layer, inputs: list[Value]) -> list[Value]:
    if each.model is None:
        return keras_context.call(ctx, each, inputs)
    if len(inputs) != len(each.model.inputs):
        raise each.refuse(f"reads {len(inputs)} values, wanted {len(each.model.inputs)}")
    given = {ref.layer: replace(value) for ref, value in zip(each.model.inputs, inputs, strict=True)}
    return _run(ctx, each.model, given, each.model.outputs)
