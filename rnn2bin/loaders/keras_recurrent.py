"""Keras's recurrent layers -> nodes of a graph: gate orders, CuDNN's layouts, both directions, stacked cells, masks and states.

A masked step is one the cell does not see: its output repeats the one before (zeros at first), or is zero where the layer says so.
Gates stand in Keras as i,f,c,o (LSTM) and z,r,h (GRU). Source: keras-team/keras, `layers/rnn` and `backend.rnn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn2bin.loaders.graph import Direction
from rnn2bin.loaders.keras_config import Layer
from rnn2bin.loaders.keras_weights import CELLS
from rnn2bin.spec import CELL_ACTIVATIONS

if TYPE_CHECKING:
    from numpy import ndarray

    from rnn2bin.loaders.keras_context import Context, Value

MERGES = ("concat", "sum", "mul", "ave")
GATES = {"lstm": 4, "gru": 3, "plain": 1}
STATES = {"lstm": 2, "gru": 1, "plain": 1}


@dataclass(frozen=True)
class _Cell:
    """One direction of one cell, in PyTorch's layout."""

    kind: str  # of LayerSpec, or "plain"
    direction: Direction
    activation: str
    hard_sigmoid: float

    @property
    def joins(self) -> tuple[object, ...]:
        """What two directions must share to be one layer."""
        return self.kind, self.direction.weight_ih.shape, self.direction.weight_hh.shape, self.activation, self.hard_sigmoid


@dataclass(frozen=True)
class _Walk:
    """What a layer gives: outputs (T,B,R), each last state (B,·), and the mask (B,T) in the order of the outputs."""

    y: str
    states: list[str]
    mask: str = ""


def recurrent(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    """LSTM, GRU, SimpleRNN, their CuDNN forms, RNN(cell): outputs, then the last states."""
    x, stack = inputs[0], _stack(ctx, layer)
    _three_axes(layer, x)
    states = _initial(ctx, layer, inputs[1:], stack[:1] if len(stack) == 1 else [])
    walk = _walk(ctx, layer, x, stack, backwards=layer.flag("go_backwards"), states=states)
    sequences, zero = layer.flag("return_sequences"), layer.flag("zero_output_for_mask")
    width = _width(stack[-1])
    out = _steps(ctx, walk, zero=zero) if sequences else _last(ctx, walk, zero=zero)
    shape = (x.shape[0], width) if sequences else (width,)
    return [ctx.value(out, shape, x.mask if sequences else "")] + [ctx.value(name, (width,)) for name in walk.states]


def bidirectional(ctx: Context, layer: Layer, inputs: list[Value]) -> list[Value]:
    """Both directions merged: outputs, then the forward and the backward layer's last states."""
    merge, x = layer.config.get("merge_mode", "concat"), inputs[0]
    if merge not in MERGES:
        raise layer.refuse(f"merge mode {merge!r}; concat, sum, mul and ave are read")
    _three_axes(layer, x)
    ways = [layer.parts["forward_layer"], layer.parts["backward_layer"]]
    for way in ways:
        if way.kind not in (*CELLS, "RNN"):
            raise way.refuse(f"within {layer.name!r}; recurrent layers go both ways")
    if ways[0].flag("go_backwards") or not ways[1].flag("go_backwards") or len({way.flag("return_sequences") for way in ways}) > 1:
        raise layer.refuse("its forward layer goes backwards, or its layers disagree on return_sequences")
    stacks = [_stack(ctx, way) for way in ways]
    sequences = ways[0].flag("return_sequences")
    # Keras 2.4 and later make masked steps zero here; before, each direction repeated its own step before.
    zero = sequences and ctx.zeroes_masked
    starts = [_initial(ctx, layer, part, stacks[0][:1]) for part in _halves(layer, inputs[1:])]
    joint = len(stacks[0]) == len(stacks[1]) == 1 and stacks[0][0].joins == stacks[1][0].joins and (zero or not sequences or not x.mask)
    if joint:
        walk = _walk_both(ctx, layer, x, [stacks[0][0], stacks[1][0]], starts)
        states = walk.states
        whole = _steps(ctx, walk, zero=zero) if sequences else ""
        halves = [ctx.g.name("forwards"), ctx.g.name("backwards")]
        parts = [states[0], states[len(states) // 2]]
        if sequences:
            parts = list(ctx.g.add_many("Split", (whole,), halves, axis=-1, num_outputs=2))
        out = whole if sequences and merge == "concat" else _merged(ctx, parts, merge)
    else:
        walks = [_walk(ctx, ways[k], x, stacks[k], backwards=k == 1, states=starts[k]) for k in (0, 1)]
        states = walks[0].states + walks[1].states
        parts = [walk.states[0] for walk in walks]
        if sequences:
            parts = [_steps(ctx, walks[0], zero=zero), ctx.flipped(_steps(ctx, walks[1], zero=zero), axis=1)]
        out = _merged(ctx, parts, merge)
    widths = [_width(stack[-1]) for stack in stacks]
    width = sum(widths) if merge == "concat" else widths[0]
    shape = (x.shape[0], width) if sequences else (width,)
    return [ctx.value(out, shape, x.mask if sequences else "")] + [ctx.value(name, (widths[0],)) for name in states]


def _three_axes(layer: Layer, x: Value) -> None:
    if len(x.shape) != 2:
        raise layer.refuse(f"reads {len(x.shape) + 1} axes; a recurrent layer reads (batch, time, features)")


def _width(cell: _Cell) -> int:
    return int(cell.direction.weight_hh.shape[1])


# --- one walk over the steps -----------------------------------------------------------------------------------------------------


def _walk(ctx: Context, layer: Layer, x: Value, stack: Sequence[_Cell], *, backwards: bool, states: list[str]) -> _Walk:
    """One direction. Backwards: the steps are reversed before, and the outputs stay in that order."""
    steps, mask = ctx.g.add("Transpose", x.name, perm=[1, 0, 2]), x.mask
    if backwards:
        steps, mask = ctx.flipped(steps, axis=0), ctx.flipped(mask, axis=1) if mask else ""
    steps, lengths, places = _compact(ctx, steps, mask)
    ends: list[str] = []
    for cell in stack:
        steps, ends = _run(ctx, layer, steps, [cell], lengths, states)
    if mask:
        steps = ctx.g.add("Spread", steps, places)
    return _Walk(steps, [ctx.g.add("Squeeze", end, ctx.g.literal([0])) for end in ends], mask)


def _walk_both(ctx: Context, layer: Layer, x: Value, cells: list[_Cell], starts: list[list[str]]) -> _Walk:
    """Both directions as one layer; states: the forward ones, then the backward ones."""
    steps, lengths, places = _compact(ctx, ctx.g.add("Transpose", x.name, perm=[1, 0, 2]), x.mask)
    start = [ctx.g.add("Concat", a, b, axis=0) for a, b in zip(*starts, strict=True)]
    steps, ends = _run(ctx, layer, steps, cells, lengths, start)
    if x.mask:
        steps = ctx.g.add("Spread", steps, places)
    states = [ctx.g.add("Gather", end, ctx.g.literal(way), axis=0) for way in (0, 1) for end in ends]
    return _Walk(steps, states, x.mask)


def _compact(ctx: Context, steps: str, mask: str) -> tuple[str, str, str]:
    if not mask:
        return steps, "", ""
    names = [ctx.g.name(hint) for hint in ("real_steps", "lengths", "places")]
    steps, lengths, places = ctx.g.add_many("Compact", (steps, mask), names)
    return steps, lengths, places


def _steps(ctx: Context, walk: _Walk, *, zero: bool) -> str:
    """Outputs (B,T,R)."""
    y = ctx.g.add("Transpose", walk.y, perm=[1, 0, 2])
    return ctx.zeroed(y, walk.mask) if walk.mask and zero else y


def _last(ctx: Context, walk: _Walk, *, zero: bool) -> str:
    """The last output (B,R): the state after the last step that counts; zero where the layer zeroes masked steps and the last one is."""
    if not (walk.mask and zero):
        return walk.states[0]
    return ctx.g.add("Gather", _steps(ctx, walk, zero=True), ctx.g.literal(-1), axis=1)


def _run(ctx: Context, layer: Layer, x: str, cells: list[_Cell], lengths: str, start: list[str]) -> tuple[str, list[str]]:
    """Cells of one layer, one for each direction, over x (T,B,I): outputs (T,B,D·R) and last states (D,B,·)."""
    first = cells[0]
    if first.kind == "plain":
        return _plain(ctx, layer, x, cells, lengths, start)
    h0, c0 = [*start, "", ""][:2]
    y, h, c = ctx.g.recurrent(
        first.kind,
        x,
        [cell.direction for cell in cells],
        h0=h0,
        c0=c0,
        lengths=lengths,
        activation=first.activation,
        hard_sigmoid=first.hard_sigmoid,
        hint=layer.name,
    )
    return y, [h, c] if first.kind == "lstm" else [h]


def _plain(ctx: Context, layer: Layer, x: str, cells: list[_Cell], lengths: str, start: list[str]) -> tuple[str, list[str]]:
    """A layer without gates: it is carried through."""
    ys, hs = [], []
    for at, cell in enumerate(cells):
        if cell.activation not in ("tanh", "relu"):
            raise layer.refuse(f"a plain RNN with activation {cell.activation}; tanh and relu are read")
        one = cell.direction
        weights = [ctx.g.constant(value, f"{layer.name}_{part}") for part, value in (("w", one.weight_ih), ("u", one.weight_hh))]
        bias = ctx.g.constant(one.bias_ih, f"{layer.name}_b")
        h0 = ctx.g.add("Gather", start[0], ctx.g.literal(at), axis=0) if start else ""
        names = [ctx.g.name(f"{layer.name}_{part}") for part in ("y", "h")]
        y, h = ctx.g.add_many(
            "PlainRnn", (x, *weights, bias, h0, lengths), names, activation=cell.activation, **({"reverse": True} if at else {})
        )
        ys.append(y)
        hs.append(ctx.g.add("Unsqueeze", h, ctx.g.literal([0])))
    joined = lambda names, axis: names[0] if len(names) == 1 else ctx.g.add("Concat", *names, axis=axis)
    return joined(ys, 2), [joined(hs, 0)]


# --- states and merging ----------------------------------------------------------------------------------------------------------


def _halves(layer: Layer, states: list[Value]) -> list[list[Value]]:
    if len(states) % 2:
        raise layer.refuse(f"is given {len(states)} states for two directions")
    return [states[: len(states) // 2], states[len(states) // 2 :]]


def _initial(ctx: Context, layer: Layer, given: list[Value], cells: Sequence[_Cell]) -> list[str]:
    """Initial states (1,B,·) of one direction, or none."""
    if not given:
        return []
    wanted = STATES["gru" if cells[0].kind.startswith("gru") else cells[0].kind] if cells else 0
    if len(given) != wanted or any(state.shape != (_width(cells[0]),) for state in given):
        raise layer.refuse(f"is given {len(given)} initial states that do not fit it")
    return [ctx.g.add("Unsqueeze", state.name, ctx.g.literal([0])) for state in given]


def _merged(ctx: Context, parts: Sequence[str], merge: str) -> str:
    if merge == "concat":
        return ctx.g.add("Concat", *parts, axis=-1)
    if merge == "mul":
        return ctx.g.add("Mul", *parts)
    total = ctx.g.add("Add", *parts)
    return ctx.g.add("Mul", total, ctx.g.literal(0.5)) if merge == "ave" else total


# --- one cell's weights ----------------------------------------------------------------------------------------------------------


def _stack(ctx: Context, layer: Layer) -> list[_Cell]:
    """The cells a layer runs on top of each other, most often one."""
    if layer.kind != "RNN":
        return [_cell(ctx, layer)]
    inner = layer.parts["cell"]
    cells = list(inner.parts.values()) if inner.kind == "StackedRNNCells" else [inner]
    for cell in cells:
        if cell.kind not in CELLS:
            raise layer.refuse(f"a cell of class {cell.kind!r}, which rnn2bin does not know")
    if not cells:
        raise layer.refuse("no cells")
    return [_cell(ctx, cell) for cell in cells]


def _cell(ctx: Context, layer: Layer) -> _Cell:
    kind = CELLS[layer.kind]
    gates, units = GATES[kind], _units(layer, GATES[kind])
    kernel, recurrent = (layer.weights[name] for name in ("kernel", "recurrent_kernel"))
    bias = layer.weights.get("bias")
    of_cudnn = bias is not None and kind != "plain" and bias.shape == (2 * gates * units,)
    if of_cudnn:
        kernel, recurrent = _from_cudnn(kernel, recurrent, gates)
    reset_after = kind == "gru" and (of_cudnn or layer.kind == "CuDNNGRU" or layer.flag("reset_after"))
    b_ih, b_hh = _biases(layer, bias, gates * units, two=of_cudnn or reset_after)
    if kind == "gru":  # z,r,h -> r,z,n
        kernel, recurrent, b_ih, b_hh = (_reordered(each, units) for each in (kernel, recurrent, b_ih, b_hh))
    direction = Direction(*(ctx.tensor(values) for values in (kernel.T, recurrent.T, b_ih, b_hh)))
    activation, slope = ("tanh", 0.0) if layer.kind.startswith("CuDNN") else _activations(ctx, layer, kind)
    return _Cell("gru_reset_before" if kind == "gru" and not reset_after else kind, direction, activation, slope)


def _units(layer: Layer, gates: int) -> int:
    """U, of weights (I, G·U) and (U, G·U) that fit each other and what the config says."""
    kernel, recurrent = layer.weights["kernel"], layer.weights["recurrent_kernel"]
    units = recurrent.shape[0] if recurrent.ndim == 2 else 0
    fits = kernel.ndim == 2 and recurrent.shape == (units, gates * units) and kernel.shape[1] == gates * units and 0 not in kernel.shape
    if not fits or units == 0 or layer.whole("units", units) != units:
        raise layer.refuse(
            f"weights of shapes {kernel.shape} and {recurrent.shape}, which are not those of {layer.get('units', 'its')} units"
        )
    return int(units)


def _biases(layer: Layer, bias: ndarray | None, rows: int, *, two: bool) -> tuple[ndarray, ndarray]:
    """Input and recurrent bias, each (rows,)."""
    import numpy as np

    if bias is None:
        return np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    wanted = ((2, rows), (2 * rows,)) if two else ((rows,),)
    if bias.shape not in wanted:
        raise layer.refuse(f"a bias of shape {bias.shape}, wanted {' or '.join(map(str, wanted))}")
    return (bias.reshape(2, rows)[0], bias.reshape(2, rows)[1]) if two else (bias, np.zeros(rows, bias.dtype))


def _from_cudnn(kernel: ndarray, recurrent: ndarray, gates: int) -> tuple[ndarray, ndarray]:
    """CuDNN's layout: each gate's kernel transposed within the same shape, each gate's recurrent kernel transposed."""
    import numpy as np

    kernels = [part.T.reshape(part.shape, order="F") for part in np.split(kernel, gates, 1)]
    return np.concatenate(kernels, 1), np.concatenate([part.T for part in np.split(recurrent, gates, 1)], 1)


def _reordered(values: ndarray, units: int) -> ndarray:
    import numpy as np

    return np.concatenate([values[..., units : 2 * units], values[..., :units], values[..., 2 * units :]], -1)


def _activations(ctx: Context, layer: Layer, kind: str) -> tuple[str, float]:
    """φ, and the slope of a hard sigmoid."""
    activation = {"linear": "identity"}.get(name := layer.text("activation", "tanh"), name)
    if activation not in CELL_ACTIVATIONS:
        raise layer.refuse(f"activation {name!r}; a cell's may be {', '.join(CELL_ACTIVATIONS[:-1])} and linear")
    if kind == "plain":
        return activation, 0.0
    gate = layer.text("recurrent_activation", "not given")
    if gate not in ("sigmoid", "hard_sigmoid"):
        raise layer.refuse(f"recurrent activation {gate!r}; gates are sigmoid or hard_sigmoid")
    return activation, ctx.hard_sigmoid if gate == "hard_sigmoid" else 0.0
