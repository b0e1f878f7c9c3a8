"""ONNX's recurrent operations, LSTM, GRU and RNN, as layers of a GraphBuilder: registered with `onnx_trace`, whose Tracer runs them."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.kinds import CELLS
from rnn2bin.loaders.assemble import BLOCKS, CANDIDATE, split_direction
from rnn2bin.loaders.graph import Direction
from rnn2bin.loaders.onnx_proto import Operation
from rnn2bin.loaders.onnx_trace import Tracer, Value, fixed, must, special

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS = {
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0),
}
PHI = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid", "softsign": "softsign", "elu": "elu", "affine": "identity"}


@dataclass(frozen=True)
class _Layer:
    """A recurrent node, its operands in the layout (T,B,·)."""

    op: str
    hidden: int
    ways: tuple[str, ...]  # forward, reverse
    x: Value
    w: Tensor  # (D, G·H, I)
    r: Tensor  # (D, G·H, H)
    b: Tensor  # (D, 2·G·H)
    p: Tensor | None  # (D, 3·H): peepholes of i,o,f
    lengths: Value | None
    h0: Value | None
    c0: Value | None


@special("LSTM", "GRU", "RNN")
def _recurrent(tracer: Tracer, node: Operation, operands: list[Value | None], values: ChainMap[str, Value]) -> Sequence[Value]:
    """Outputs Y (T,D,B,H), Y_h (D,B,H), Y_c; with layout 1 (B,T,D,H), (B,D,H)."""
    import torch

    layout, direction = node.attributes.get("layout", 0), node.attributes.get("direction", "forward")
    turn = lambda value: tracer.one("Transpose", value, perm=[1, 0, 2]) if layout and value is not None else value
    operands = [*operands, *[None] * (8 - len(operands))]
    ways = ("forward", "reverse") if direction == "bidirectional" else (direction,)
    w, r = fixed(operands, 1), fixed(operands, 2)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op]
    hidden = node.attributes.get("hidden_size", r.shape[-1])
    b = fixed(operands, 3) if operands[3] is not None else torch.zeros(len(ways), 2 * gates * hidden)
    wanted = ((len(ways), gates * hidden, w.shape[-1]), (len(ways), gates * hidden, hidden), (len(ways), 2 * gates * hidden))
    if (tuple(w.shape), tuple(r.shape), tuple(b.shape)) != wanted or set(ways) - {"forward", "reverse"} or hidden < 1:
        raise UnsupportedError(f"weights of shapes {tuple(w.shape)}, {tuple(r.shape)}, {tuple(b.shape)}; wanted {wanted} for {direction}")
    layer = _Layer(
        node.op,
        hidden,
        ways,
        turn(must(operands, 0)),
        w,
        r,
        b,
        _peepholes(node, operands, (len(ways), 3 * hidden)),
        _lengths(tracer, operands[4], layout, operands[0]),
        turn(operands[5]),
        turn(operands[6]),
    )
    y, h, c = (_plain_rnn if node.op == "RNN" else _gated)(tracer, node, layer)
    if layout:
        y = tracer.one("Transpose", y, perm=[2, 0, 1, 3])
    return [one for one in (y, turn(h), turn(c)) if one is not None][: max(len(node.outputs), 1)]


def _peepholes(node: Operation, operands: Sequence[Value | None], wanted: tuple[int, int]) -> Tensor | None:
    """P; None where it is not given, or nothing but zeros."""
    if node.op != "LSTM" or operands[7] is None:
        return None
    p = fixed(operands, 7)
    if tuple(p.shape) != wanted:
        raise UnsupportedError(f"peepholes of shape {tuple(p.shape)}; wanted {wanted}")
    return p if bool(p.any()) else None


def _clip(node: Operation) -> float:
    """What pre-activations are clipped to, 0 where they are not."""
    clip = float(node.attributes.get("clip") or 0.0)
    if not 0 <= clip < math.inf:
        raise UnsupportedError(f"clips its pre-activations at {clip}; wanted a positive number")
    return clip


def _lengths(tracer: Tracer, value: Value | None, layout: int, x: Value | None) -> Value | None:
    """None where every sequence is as long as the input."""
    if value is None or x is None:
        return None
    steps = [t.shape[1 if layout else 0] for t in x.data]
    if not value.deps and all(bool((t == n).all()) for t, n in zip(value.data * len(steps), steps, strict=False)):
        return None
    tracer.lengths += value.deps
    return value


def _functions(node: Operation, count: int, directions: int) -> list[tuple[str, tuple[float, ...]]]:
    """The activations of a node with their parameters, the same for each direction."""
    defaults = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[node.op]
    names = [name.lower() for name in node.attributes.get("activations") or defaults * directions]
    alphas, betas = iter(node.attributes.get("activation_alpha") or []), iter(node.attributes.get("activation_beta") or [])
    found = []
    for name in names:
        rest = PARAMETERS.get(name, ())
        found.append((name, tuple(round(next(source, value), 7) for value, source in zip(rest, (alphas, betas), strict=False))))
    if len(found) != count * directions or found != found[:count] * directions:
        raise UnsupportedError(f"activations {', '.join(names)}: wanted {count}, the same for each direction")
    return found[:count]


def _phi(name: str, parameters: tuple[float, ...]) -> str:
    if name not in PHI or parameters != PARAMETERS.get(name, ()):
        raise UnsupportedError(f"activation {name}{list(parameters) or ''}, which no cell here has; known: {', '.join(PHI)}")
    return PHI[name]


def _gated(tracer: Tracer, node: Operation, layer: _Layer) -> tuple[Value, Value, Value | None]:
    lstm = layer.op == "LSTM"
    (gate, slope), *others = _functions(node, 3 if lstm else 2, len(layer.ways))
    phis = {_phi(*one) for one in others}
    if gate not in ("sigmoid", "hardsigmoid") or (gate == "hardsigmoid" and slope[1] != 0.5):
        raise UnsupportedError(f"gates with activation {gate}{list(slope) or ''}; known: Sigmoid, and HardSigmoid with beta 0.5")
    if len(phis) > 1:
        raise UnsupportedError(f"two activations, {' and '.join(sorted(phis))}, for candidate and cell; wanted the same")
    cell = _lstm_kind(node, layer) if lstm else "gru" if node.attributes.get("linear_before_reset") else "gru_reset_before"
    options = {"activation": phis.pop(), "hard_sigmoid": 2 * slope[0] if gate == "hardsigmoid" else 0.0, "clip": _clip(node)}
    directions = [_direction(cell, layer, k) for k in range(len(layer.ways))]
    x = _backwards(tracer, layer.x, layer) if layer.ways == ("reverse",) else layer.x
    y, h, c = _walk(tracer, cell, replace(layer, x=x), directions, options, hint=node.outputs[0] or node.op)
    if layer.ways == ("reverse",):
        y = _backwards(tracer, y, layer)
    if len(layer.ways) == 1:
        return tracer.one("Unsqueeze", y, tracer.literal([1])), h, c
    parted = tracer.one("Reshape", y, tracer.literal([0, 0, 2, layer.hidden]))
    return tracer.one("Transpose", parted, perm=[0, 2, 1, 3]), h, c


def _lstm_kind(node: Operation, layer: _Layer) -> str:
    """With input_forget, f = 1 − i, whatever the file has as weights of f."""
    return f"lstm{'_coupled' if node.attributes.get('input_forget') else ''}{'' if layer.p is None else '_peephole'}"


def _direction(cell: str, layer: _Layer, k: int) -> Direction:
    """ONNX's row blocks i,o,f,c and z,r,h (peepholes: i,o,f) -> PyTorch's."""
    import torch

    theirs = ("i", "o", "f", CANDIDATE) if layer.op == "LSTM" else ("z", "r", CANDIDATE)

    def order(t: Tensor, wanted: Sequence[str] = BLOCKS[cell]) -> Tensor:
        blocks = dict(zip(theirs, t.split(layer.hidden), strict=False))
        return torch.cat([blocks[name] for name in wanted])

    b_ih, b_hh = layer.b[k].chunk(2)
    peephole = None if layer.p is None else order(layer.p[k], CELLS[cell].gate_names)
    return Direction(order(layer.w[k]), order(layer.r[k]), order(b_ih), order(b_hh), peephole=peephole)


def _backwards(tracer: Tracer, x: Value, layer: _Layer) -> Value:
    """x (T,B,·) reversed in time, each sequence within its own length."""
    if layer.lengths is not None:
        return tracer.one("ReverseSequence", x, layer.lengths, time_axis=0, batch_axis=1)
    return tracer.one("Slice", x, *(tracer.literal([n]) for n in (-1, -(2**62), 0, -1)))


def _walk(
    tracer: Tracer, cell: str, layer: _Layer, directions: Sequence[Direction], options: Mapping[str, Any], *, hint: str
) -> tuple[Value, Value, Value | None]:
    """The layer itself: y (T,B,D·H), h (D,B,H), c (D,B,H)."""
    x, hidden = layer.x, layer.hidden
    tracer.read.append(x.deps)
    tracer.steps.append((x.data[0].shape[0], x.data[0].shape[1]))
    starts = [_start(tracer, one) for one in (layer.h0, layer.c0 if layer.op == "LSTM" else None)]
    lengths = layer.lengths if layer.lengths is not None and not layer.lengths.origin else None
    emittable = all(one is None or one.name is not None for one in (x, lengths, *starts))
    names: tuple[str | None, ...] = (None, None, None)
    if emittable:
        read, began = tracer.use(x), [tracer.use(one) for one in starts]
        if tracer.rows:
            read = _unrolled(tracer, x, read, began, layer)
        names = tracer.builder.recurrent(
            cell, read, directions, h0=began[0], c0=began[1], lengths=tracer.use(lengths), hint=hint, **options
        )
        if tracer.rows:
            names = _rolled(tracer, x, names, hidden)
    ran = _ran(tracer, cell, layer, directions, options)
    deps = x.deps.union(*(one.deps for one in (*starts, layer.lengths) if one is not None))
    made = [Value(data, name, deps, recurrent=True, last=k > 0) for k, (data, name) in enumerate(zip(ran, names, strict=False))]
    return made[0], made[1], made[2] if len(made) > 2 else None


def _start(tracer: Tracer, value: Value | None) -> Value | None:
    """None for zeros and for a state that is carried from call to call: both are ours."""
    if value is None or (value.constant and not bool(value.data[0].any())):
        return None
    if value.origin:
        tracer.states.append(value.origin)
        return None
    if value.constant or not value.deps:
        rows = value.data[0]
        if not bool((rows == rows[:, :1]).all()) or not all(bool((t == rows[:, :1]).all()) for t in value.data):
            raise UnsupportedError("a constant first state that differs between the sequences of a batch")
        return None if not bool(rows.any()) else tracer.literal(rows[:, :1].clone())
    return value


def _unrolled(tracer: Tracer, x: Value, name: str, began: Sequence[str], layer: _Layer) -> str:
    """The file's rows as (T,B,I): those of one step (1,N,I), or those of one sequence (N,1,I)."""
    shapes = [tuple(t.shape) for t in x.data]
    if any(math.prod(shape[:2]) != n or 1 not in shape[:2] for shape, n in zip(shapes, tracer.rows, strict=False)):
        raise UnsupportedError(f"the layer sees {shapes[0][:2]} steps and sequences for {tracer.rows[0]} rows of the input")
    if layer.ways != ("forward",) or layer.lengths is not None or any(began) or (shapes[0][0] == 1 and layer.h0 is None):
        raise UnsupportedError("one step a call needs a forward layer whose state comes in and goes out")
    counted = tracer.builder.add("Slice", tracer.builder.add("Shape", tracer.counted), *(tracer.builder.literal([n]) for n in (0, 2, 0)))
    shape = tracer.builder.add("Concat", counted, tracer.builder.literal([shapes[0][2]]), axis=0)
    return tracer.builder.add("Reshape", name, shape)


def _rolled(tracer: Tracer, x: Value, names: Sequence[str], hidden: int) -> tuple[str | None, ...]:
    """The layer's outputs (T,B,H) as the file's rows. After one step the state is the output; the last cell stays ours."""
    one_step = x.data[0].shape[0] == 1
    y = tracer.builder.add("Reshape", names[0], tracer.builder.literal([1, -1, hidden] if one_step else [-1, 1, hidden]))
    return (y, y, None) if one_step else (y, None, None)


def _ran(tracer: Tracer, cell: str, layer: _Layer, directions: Sequence[Direction], options: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
    """What the layer makes at each probe: y (T,B,D·H), h (D,B,H), c (D,B,H)."""
    import torch

    from rnn2bin.cells.network import Section
    from rnn2bin.gates.estimators import FLOAT
    from rnn2bin.spec import LayerSpec, SectionSpec

    spec = LayerSpec(cell, layer.w.shape[2], layer.hidden, len(directions), **options)
    section = Section(SectionSpec((spec,)), None, "strict").eval()
    weights: dict[str, Tensor] = {}
    for way, one in zip(("fwd", "bwd"), directions, strict=False):
        parts = split_direction(cell, one.weight_ih, one.weight_hh, one.bias_ih, one.bias_hh)
        if one.peephole is not None:
            parts["gates.peephole"] = one.peephole
        weights |= {f"layers.0.{way}.{name}": values for name, values in parts.items()}
    section.load_state_dict(weights)
    results = []
    for probe, x in enumerate(layer.x.data):
        at = lambda value, probe=probe: value.data[probe % len(value.data)]  # type: ignore[misc]
        began = [at(one) if one is not None else x.new_zeros(1) for one in (layer.h0, layer.c0)][: 2 if layer.op == "LSTM" else 1]
        wide = [
            (s[:, :1] if s.ndim == 3 and s.shape[1] != x.shape[1] else s).expand(len(directions), x.shape[1], layer.hidden) for s in began
        ]
        state = [[tuple(s[k] for s in wide) for k in range(len(directions))]]
        with torch.no_grad():
            out = section(x, state, lengths=at(layer.lengths) if layer.lengths is not None else None, mode=FLOAT)
        results.append((out.y, *(torch.stack(s) for s in zip(*out.state[0], strict=True))))
    return list(zip(*results, strict=True))


def _plain_rnn(tracer: Tracer, node: Operation, layer: _Layer) -> tuple[Value, Value, None]:
    """A layer without gates, carried as it is: one operation for each direction."""
    ((name, parameters),) = _functions(node, 1, len(layer.ways))
    if name not in ("tanh", "relu"):
        raise UnsupportedError(f"activation {name}{list(parameters) or ''} of a layer without gates; known: Tanh, Relu")
    if _clip(node):
        raise UnsupportedError(f"clips its pre-activations at {_clip(node)}, which a layer without gates does not here")
    if layer.h0 is not None and layer.h0.origin:
        raise UnsupportedError("a state that is carried from call to call, in a layer without gates")
    made = []
    for k, way in enumerate(layer.ways):
        b_ih, b_hh = layer.b[k].chunk(2)
        start = None if layer.h0 is None else tracer.one("Gather", layer.h0, tracer.literal(k), axis=0)
        weights = [tracer.literal(t) for t in (layer.w[k], layer.r[k], b_ih + b_hh)]
        made.append(
            tracer.apply("PlainRnn", [layer.x, *weights, start, layer.lengths], 2, {"activation": name, "reverse": int(way == "reverse")})
        )
    ys, hs = ([tracer.one("Unsqueeze", one[part], tracer.literal([axis])) for one in made] for part, axis in ((0, 1), (1, 0)))
    join = lambda parts, axis: parts[0] if len(parts) == 1 else tracer.apply("Concat", parts, 1, {"axis": axis})[0]
    return join(ys, 1), join(hs, 0), None
