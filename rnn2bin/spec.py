"""What a network is made of, as frozen data: cell kinds, gates and their canonical order, tensor names and shapes. No torch here.

Alphabet of shapes: T time, B batch, I input, H hidden, R recurrent (the projection where there is one, else H), G gates,
D directions, V vocabulary, E embedding, O output.

Gate rows and candidate rows are separate tensors, so that a runtime can skip candidate rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

from rnn2bin.errors import UnsupportedError

FORMAT_VERSION = 1

Readout = Literal["all", "last", "final", "mean", "max"]
Activation = Literal["none", "relu", "tanh", "sigmoid", "softmax", "log_softmax", "l2", "relu_l2"]
READOUTS: tuple[str, ...] = ("all", "last", "final", "mean", "max")
ACTIVATIONS: tuple[str, ...] = ("none", "relu", "tanh", "sigmoid", "softmax", "log_softmax", "l2", "relu_l2")
CELL_ACTIVATIONS: tuple[str, ...] = ("tanh", "relu", "sigmoid", "softsign", "elu", "identity")


@dataclass(frozen=True)
class GateSpec:
    """One gate. `closed` and `open` are the strict values of bit 0 and bit 1; `learns` names the levels that may be learned.

    A level on which a skip depends is never learned: `lo` of i, o and r (exactly 0), `hi` of z (exactly 1: keep).
    """

    name: str
    learns: tuple[Literal["lo", "hi"], ...]
    maximum: float | None = None  # learned levels stay within [0, maximum]: a forget gate above 1 would let the cell grow
    shared: bool = False  # one decision for all units, with weights of its own: a global gate

    @property
    def letter(self) -> str:
        """Its name without the numbers of layers that a deep cell adds: a recipe means all of them by it."""
        return self.name.rstrip("0123456789")

    @property
    def keeps(self) -> bool:
        """Whether a bit of 1 leaves the state as it is: units ask for their rows where they do not keep."""
        return self.learns == ("lo",)


@dataclass(frozen=True)
class CellKind:
    """A kind of cell: its gates in canonical order, its states, and which tensors it has.

    `family`: the file of cells/ that has its equations, and of the native runtime's kernels/ that has them in C.
    States: h, of which others read; c, a unit's memory; r, what its own candidate reads at the next step.
    `candidate_bias_hh`: a recurrent bias of the candidate. `peepholes`: gates see c, diagonal (each unit its own) or full (a matrix).
    `recurrent`: whether a step reads the one before it.
    `deep`: a step goes through `LayerSpec.depth` layers, "inner" ones that hand one state on, or a "stack" of which each has its own and
    reads all others'; gates and tensors are then those of each layer, and of a stack `links` are gates from every layer to every layer.
    `came_from`: the float cell, where that is another.
    """

    name: str
    family: str
    gates: tuple[GateSpec, ...]
    states: tuple[str, ...]
    candidate_bias_hh: bool = False
    peepholes: Literal["", "diagonal", "full"] = ""
    recurrent: bool = True
    deep: Literal["", "inner", "stack"] = ""
    links: tuple[GateSpec, ...] = ()
    came_from: str = ""

    @property
    def gate_names(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.gates)

    @property
    def unit_gates(self) -> int:
        """Gates that decide for each unit; they stand before those that decide for all."""
        return sum(not g.shared for g in self.gates)

    @property
    def may_share(self) -> bool:
        """Whether units can read one row of a gate's weights together: gates have a matrix of their own, and nothing but it and vectors."""
        return self.family in ("lstm", "gru") and self.peepholes != "full"

    @property
    def has_cell(self) -> bool:
        """Whether h is what is shown of c, a memory of its own."""
        return "c" in self.states

    @property
    def is_lstm(self) -> bool:
        """An LSTM of any kind: its candidate rows wait for i, the first gate, its columns of h for o, the last."""
        return self.family == "lstm"

    @property
    def closes(self) -> bool:
        """Whether its last gate is an output gate: where that is 0, so is h."""
        return self.is_lstm or self.name == "gru_output"

    def at(self, depth: int) -> CellKind:
        """This kind with its gates at a depth: t of two layers is t1, t2; g23 goes from layer 2 to layer 3."""
        return _at(self, depth) if self.deep else self


@lru_cache
def _at(kind: CellKind, depth: int) -> CellKind:
    layers = range(1, depth + 1)
    gates = [replace(g, name=f"{g.name}{k}") for k in layers for g in kind.gates]
    links = [replace(g, name=f"{g.name}{source}{target}") for target in layers for source in layers for g in kind.links]
    return replace(kind, gates=(*gates, *links), links=())


_LSTM_GATES = (GateSpec("i", ("hi",)), GateSpec("f", ("lo", "hi"), maximum=1.0), GateSpec("o", ("hi",)))
# f = 1 − i: one decision, 0 keeps the cell exactly, 1 overwrites it, wholly or in part.
_COUPLED_GATES = (GateSpec("i", ("hi",), maximum=1.0), GateSpec("o", ("hi",)))

_GLOBAL = (GateSpec("g", (), shared=True),)
_GRU_GATES = (GateSpec("r", ("hi",)), GateSpec("z", ("lo",), maximum=1.0))

CELLS: dict[str, CellKind] = {
    kind.name: kind
    for kind in (
        CellKind("lstm", "lstm", _LSTM_GATES, ("h", "c")),
        # i and f see P c before the step, o sees P c after it (Gers & Schmidhuber 2000, Graves 2013, the ONNX input P).
        CellKind("lstm_peephole", "lstm", _LSTM_GATES, ("h", "c"), peepholes="diagonal"),
        # The same with a matrix: every gate sees every cell.
        CellKind("lstm_peephole_full", "lstm", _LSTM_GATES, ("h", "c"), peepholes="full"),
        # CIFG (Greff et al. 2015), the ONNX attribute input_forget.
        CellKind("lstm_coupled", "lstm", _COUPLED_GATES, ("h", "c")),
        CellKind("lstm_coupled_peephole", "lstm", _COUPLED_GATES, ("h", "c"), peepholes="diagonal"),
        # r multiplies U_n h + b_hn (PyTorch, cuDNN). z = 1 keeps h.
        CellKind("gru", "gru", _GRU_GATES, ("h",), candidate_bias_hh=True),
        # The same with an output gate: c is its memory, h = o⊙c what its own gates and all others read. No file has it; a GRU becomes one
        # where density is wanted (docs/decisions/027-output-gate.md).
        CellKind("gru_output", "gru", (*_GRU_GATES, GateSpec("o", ("hi",))), ("h", "c"), candidate_bias_hh=True, came_from="gru"),
        # r multiplies h before U_n (Cho 2014, the ONNX default, TensorFlow 1).
        CellKind("gru_reset_before", "gru", _GRU_GATES, ("h",)),
        # No gate: carried through beside layers that have some.
        CellKind("rnn", "rnn", (), ("h",)),
        # h = f h + (1 − f) φ(…): f = 1 keeps h.
        CellKind("rnn_minimal", "rnn", (GateSpec("f", ("lo",), maximum=1.0),), ("h",)),
        # h = h + f φ(…): f = 0 keeps h.
        CellKind("rnn_residual", "rnn", (GateSpec("f", ("hi",)),), ("h",)),
        # y = t φ(…) + (1 − t) x: t = 0 carries. No step reads another.
        CellKind("highway", "highway", (GateSpec("t", ("hi",), maximum=1.0),), ("h",), recurrent=False),
        # The same over the state, through `depth` layers a step, of which the first reads the input.
        CellKind("recurrent_highway", "highway", (GateSpec("t", ("hi",), maximum=1.0),), ("h",), deep="inner"),
        # On the way from an RNN to the LSTM (R2RT 2016): differences 1, 2, 3 of cells/memory.py, all of which make the LSTM.
        CellKind("prototype", "memory", _LSTM_GATES, ("h",)),
        CellKind("prototype_normalized", "memory", _LSTM_GATES, ("h",)),
        *(CellKind(f"pseudo{which}", "memory", _LSTM_GATES, ("h", "c")) for which in ("", "_2", "_3", "_13", "_23", "_123")),
        *(CellKind(f"pseudo{which}", "memory", _LSTM_GATES, ("h", "c", "r")) for which in ("_1", "_12")),
        # A stack whose layers all read all layers of the step before, through global gates (Chung et al. 2015).
        CellKind("gf_tanh", "feedback", (), ("h",), deep="stack", links=_GLOBAL),
        CellKind("gf_gru", "feedback", _GRU_GATES, ("h",), deep="stack", links=_GLOBAL),
        CellKind("gf_lstm", "feedback", _LSTM_GATES, ("h", "c"), deep="stack", links=_GLOBAL),
    )
}
MOST_DEPTH = 9  # layers within a step: their numbers in gates' names have one digit


@dataclass(frozen=True)
class LayerSpec:
    """One recurrent layer, one or two directions. Output width is `output_size` = D * R.

    `copies` n > 1: every unit takes n decisions for each gate, with n thresholds, levels and states behind one row of weights; what others
    read of it is the mean over them. Vectors over the copies are `width` = n * H long, unit j of copy k at k * H + j.

    `activation` is φ, of the candidate and of an LSTM's cell. `hard_sigmoid` s > 0: float gates are
    clip((s·pre + 1)/2, 0, 1) and not σ(pre); s is 0.4 in Keras 2 and 1/3 in Keras 3. A bit is 1[pre > 0] with either.

    What is clipped to [−n, n], 0 where nothing is: `clip` the pre-activations of float gates and of the candidate (ONNX; a bit is the same
    with and without), `cell_clip` an LSTM's c after its update, `proj_clip` its h after the projection (TensorFlow 1).

    `shared` n > 1: a gate has one row of recurrent weights for n units, ⌈H/n⌉ in all; `gates.row` says which of them a unit reads (whole
    numbers, the gate's own from 0), `gates.scale` what its product is multiplied by before the unit's thresholds. `shared_inputs` is the
    same for the input's weights, 1 where they are a table of tokens, which costs a step nothing.

    `depth`: how many layers a step goes through, of kinds that are deep; all are `hidden_size` wide, others read the last one's h.
    """

    cell: str
    input_size: int
    hidden_size: int
    directions: int = 1
    proj_size: int = 0
    copies: int = 1
    activation: str = "tanh"
    hard_sigmoid: float = 0.0
    clip: float = 0.0
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    depth: int = 1
    shared: int = 1
    shared_inputs: int = 1

    def gate_rows(self, shared: int) -> int:
        """Rows of a gate's weights where so many units share one."""
        return -(-self.hidden_size // shared)

    @property
    def width(self) -> int:
        return self.copies * self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Of each state. Where there is a c, h is what others read; else h stands there for every copy. A stack's are its layers' in a
        row."""
        sizes = {"h": self.recurrent_size if self.kind.has_cell else self.width, "c": self.width, "r": self.hidden_size}
        return tuple(sizes[name] * (self.depth if self.kind.deep == "stack" else 1) for name in self.kind.states)

    @property
    def kind(self) -> CellKind:
        """With the gates that it has at this depth."""
        return CELLS[self.cell].at(self.depth)

    @property
    def floating(self) -> LayerSpec:
        """The float layer that this one came from."""
        return replace(self, cell=self.kind.came_from or self.cell, copies=1, shared=1, shared_inputs=1)

    @property
    def recurrent_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def output_size(self) -> int:
        return self.directions * self.recurrent_size

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of one direction's weights, levels apart. A deep cell's layers follow one another in the rows; the input's columns
        are the first's alone, `weight_below` are a stack's others'."""
        hidden, kind, layers = self.hidden_size, self.kind, self.depth
        first_rows = kind.unit_gates // layers * hidden
        parts = {"gates": (first_rows, kind.unit_gates * hidden), "candidate": (hidden, layers * hidden)}
        shapes: dict[str, tuple[int, ...]] = {}
        for part, (first, every) in parts.items():
            if not every:
                continue
            shapes[f"{part}.weight_ih"] = (first, self.input_size)
            if kind.deep == "stack" and layers > 1:
                shapes[f"{part}.weight_below"] = (every - first, hidden)
            if kind.recurrent:
                shapes[f"{part}.weight_hh"] = (every, self.recurrent_size)
            shapes[f"{part}.bias"] = (every * (self.copies if part == "gates" else 1),)
        if self.shared > 1:
            gates = kind.unit_gates
            shapes["gates.weight_ih"] = (gates * self.gate_rows(self.shared_inputs), self.input_size)
            shapes["gates.weight_hh"] = (gates * self.gate_rows(self.shared), self.recurrent_size)
            shapes |= {"gates.row": (gates * hidden,), "gates.scale": (gates * hidden,)}
        if kind.deep == "stack":
            shapes["candidate.weight_hh"] = (layers * hidden, layers * hidden)  # block (j, i) reads layer i for layer j
            shapes["global.weight_ih"] = (layers, self.input_size)
            if layers > 1:
                shapes["global.weight_below"] = ((layers - 1) * layers, hidden)
            shapes["global.weight_hh"] = (layers * layers, layers * hidden)
            shapes["global.bias"] = (layers * layers,)
        if kind.peepholes:
            rows = kind.unit_gates * hidden
            shapes["gates.peephole"] = (rows, hidden) if kind.peepholes == "full" else (rows,)
        if kind.candidate_bias_hh:
            shapes["candidate.bias_hh"] = (hidden,)
        if self.proj_size:
            shapes["projection.weight"] = (self.proj_size, hidden)
        return shapes


@dataclass(frozen=True)
class EmbeddingSpec:
    """Token input: a table (V, E), or one-hot vectors of width V where the file has no table (`one_hot`)."""

    num_embeddings: int
    embedding_dim: int
    one_hot: bool = False


@dataclass(frozen=True)
class LinearSpec:
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "none"


@dataclass(frozen=True)
class Node:
    """One operation of a graph, under ONNX's name and with its meaning where ONNX has it; `Recurrent` is a layer of the section.

    `inputs` and `outputs` are names of values, "" for one that is left out. `attributes` are plain data.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphSpec:
    """What stands around and between the recurrent layers of a network that is no plain chain. Float weights are `tensors`, by name.

    The value `input` is what the section reads behind its embedding, `tokens` the token numbers themselves; both (B,T,…) where
    `batch_first`, else (T,B,…), and so is the value named by `output`: (B,T',O) where `per_step`, or (B,O). `activation` follows it.
    `lengths` (B,) are the sequences' own lengths, T where a call gives none.
    `token_layers`: layers whose first operand is tokens (T,B), which they look up themselves: weights times embedding is a table then.
    `steps`: the only T that fits. `stepwise`: a sequence may be cut anywhere if the state is carried. `padded`: with lengths given, what
    stands behind a sequence's end changes nothing before it.
    """

    nodes: tuple[Node, ...]
    output: str
    input_shape: tuple[int, ...]
    output_size: int
    per_step: bool
    batch_first: bool = True
    activation: str = "none"
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    token_layers: tuple[int, ...] = ()
    steps: int | None = None
    stepwise: bool = False
    padded: bool = False


@dataclass(frozen=True)
class SectionSpec:
    """embedding? -> recurrent layers -> readout -> linear layers?; or embedding? -> `graph`, which says where the layers stand."""

    layers: tuple[LayerSpec, ...]
    embedding: EmbeddingSpec | None = None
    head: tuple[LinearSpec, ...] = ()
    readout: str = "all"
    graph: GraphSpec | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one step: () for a token or a single number, (I,) for floats."""
        if self.embedding:
            return ()
        return self.graph.input_shape if self.graph else (self.layers[0].input_size,)

    @property
    def token_layers(self) -> tuple[int, ...]:
        """Those that look their input up."""
        return self.graph.token_layers if self.graph else (0,) if self.embedding else ()

    @property
    def output_size(self) -> int:
        if self.graph:
            return self.graph.output_size
        return self.head[-1].out_features if self.head else self.layers[-1].output_size

    @property
    def per_step(self) -> bool:
        """Whether outputs have a time axis."""
        return self.graph.per_step if self.graph else self.readout == "all"

    @property
    def activation(self) -> str:
        """What follows the last linear operation."""
        if self.graph:
            return self.graph.activation
        return self.head[-1].activation if self.head else "none"

    @property
    def windowed(self) -> bool:
        """Whether a sequence may be cut into windows, its state carried, without changing the outputs."""
        forward = all(layer.directions == 1 for layer in self.layers)
        return forward and self.per_step and (self.graph is None or self.graph.stepwise)


@dataclass(frozen=True)
class DecodeSpec:
    """How a decoder runs free: first token, stop token, most steps."""

    start: int
    end: int
    max_length: int


@dataclass(frozen=True)
class RnnSpec:
    """A whole network: one section ("main"), or "encoder" and "decoder" where the encoder's last state starts the decoder."""

    sections: dict[str, SectionSpec]
    decode: DecodeSpec | None = None

    @property
    def kind(self) -> str:
        return "encoder-decoder" if self.decode else "sequence"

    @property
    def main(self) -> SectionSpec:
        """The section whose output is the network's output."""
        return self.sections["decoder" if self.decode else "main"]

    @property
    def entry(self) -> SectionSpec:
        """The section that reads the network's input."""
        return self.sections["encoder" if self.decode else "main"]

    @property
    def floating(self) -> RnnSpec:
        """The float network that this one came from."""
        layers = lambda section: tuple(layer.floating for layer in section.layers)
        return replace(self, sections={name: replace(section, layers=layers(section)) for name, section in self.sections.items()})

    def cell_names(self) -> list[tuple[str, LayerSpec]]:
        """Canonical prefix of every cell ("main.layers.0.fwd") with its layer."""
        return [
            (f"{section}.layers.{index}.{direction}", layer)
            for section, spec in self.sections.items()
            for index, layer in enumerate(spec.layers)
            for direction in DIRECTIONS[: layer.directions]
        ]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every float weight (levels of binary gates are the student's own)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for section, spec in self.sections.items():
            if spec.embedding and not spec.embedding.one_hot:
                shapes[f"{section}.embedding.weight"] = (spec.embedding.num_embeddings, spec.embedding.embedding_dim)
            for index, linear in enumerate(spec.head):
                shapes[f"{section}.head.{index}.weight"] = (linear.out_features, linear.in_features)
                if linear.bias:
                    shapes[f"{section}.head.{index}.bias"] = (linear.out_features,)
            for tensor, shape in spec.graph.tensors.items() if spec.graph else ():
                shapes[f"{section}.graph.{tensor}"] = shape
        for prefix, layer in self.cell_names():
            shapes.update({f"{prefix}.{name}": shape for name, shape in layer.tensors().items()})
        return shapes


DIRECTIONS = ("fwd", "bwd")
MOST_ROWS = 2048  # that a unit may choose from: whole numbers up to there are exact in fp16
MOST_CLIP = 1e38  # what float32 holds


def check(spec: RnnSpec) -> None:
    """Refuse a spec whose parts do not join, with all the reasons (UnsupportedError)."""
    reasons = []
    for name, section in spec.sections.items():
        width = section.embedding.embedding_dim if section.embedding else section.layers[0].input_size
        if section.embedding and section.embedding.one_hot and section.embedding.num_embeddings != width:
            reasons.append(f"{name}.embedding: one-hot vectors of {section.embedding.num_embeddings} tokens are not {width} wide")
        for index, layer in enumerate(section.layers):
            if layer.directions > len(DIRECTIONS):
                reasons.append(f"{name}.layers.{index}: {layer.directions} directions; there are {len(DIRECTIONS)}")
            if layer.cell not in CELLS:
                reasons.append(f"{name}.layers.{index}: unknown cell {layer.cell!r}; known: {', '.join(CELLS)}")
            else:
                reasons += [f"{name}.layers.{index}: {reason}" for reason in _layer_reasons(layer)]
            if not all(0 <= bound < MOST_CLIP for bound in (layer.clip, layer.cell_clip, layer.proj_clip)):
                reasons.append(f"{name}.layers.{index}: what is clipped is clipped to a positive number, or 0 where nothing is")
            if layer.activation not in CELL_ACTIVATIONS or not 0 <= layer.hard_sigmoid < 100:
                reasons.append(f"{name}.layers.{index}: unknown activation {layer.activation!r} or hard sigmoid {layer.hard_sigmoid!r}")
        reasons += [
            f"{name}.layers.{index}: reads tokens, of which a table holds every unit's share: shared_inputs must be 1"
            for index in section.token_layers
            if index < len(section.layers) and section.layers[index].shared_inputs > 1
        ]
        if section.graph:
            reasons += [f"{name}.graph: {reason}" for reason in _graph_reasons(section)]
            continue
        for index, layer in enumerate(section.layers):
            if layer.input_size != width:
                reasons.append(f"{name}.layers.{index}: reads {layer.input_size} values but receives {width}")
            width = layer.output_size
        for index, linear in enumerate(section.head):
            if linear.in_features != width:
                reasons.append(f"{name}.head.{index}: reads {linear.in_features} values but receives {width}")
            if linear.activation not in ACTIVATIONS:
                reasons.append(f"{name}.head.{index}: unknown activation {linear.activation!r}; known: {', '.join(ACTIVATIONS)}")
            width = linear.out_features
        if section.readout not in READOUTS:
            reasons.append(f"{name}: unknown readout {section.readout!r}; known: {', '.join(READOUTS)}")
    if spec.decode:
        encoder, decoder = spec.sections["encoder"], spec.sections["decoder"]
        if decoder.embedding is None:
            reasons.append("decoder: needs an embedding (or one-hot tokens): it reads the tokens it writes")
        pairs = (
            [(e.cell, e.width, e.output_size) for e in encoder.layers],
            [(d.cell, d.width, d.output_size) for d in decoder.layers],
        )
        if pairs[0] != pairs[1]:
            reasons.append("decoder: its layers must have the cells and sizes of the encoder's, whose last states start it")
    if reasons:
        raise UnsupportedError(*reasons)


def _layer_reasons(layer: LayerSpec) -> list[str]:
    kind, reasons = CELLS[layer.cell], []
    if (layer.proj_clip and not layer.proj_size) or (layer.cell_clip and not kind.is_lstm):
        reasons.append(f"clips a {'projection' if layer.proj_clip else 'cell'} that it does not have")
    if (layer.clip or layer.proj_size) and kind.family not in ("lstm", "gru"):
        reasons.append(f"{layer.cell} clips and projects nothing")
    if not 1 <= layer.depth <= (MOST_DEPTH if kind.deep else 1):
        reasons.append(f"{layer.cell} has a depth of 1{f' to {MOST_DEPTH}' if kind.deep else ''}, not {layer.depth}")
    if not kind.recurrent and layer.input_size != layer.hidden_size:
        reasons.append(f"{layer.cell} carries its input: its {layer.input_size} inputs must be as many as its {layer.hidden_size} units")
    if layer.shared > 1 and not kind.may_share:
        reasons.append(f"{layer.cell}: its units cannot share rows of gates")
    if layer.shared_inputs not in (1, layer.shared) or (layer.shared > 1 and layer.gate_rows(layer.shared) > MOST_ROWS):
        reasons.append(
            f"{layer.shared} and {layer.shared_inputs} units share rows of gates: wanted the same or 1, and {MOST_ROWS} rows at most"
        )
    if layer.copies > 1 and not kind.unit_gates:
        reasons.append(f"{layer.cell} has no gate of which a unit could have copies")
    return reasons


def _graph_reasons(section: SectionSpec) -> list[str]:
    graph = section.graph
    assert graph is not None
    reasons = []
    placed = [node.attributes.get("layer") for node in graph.nodes if node.op == "Recurrent"]
    if placed != list(range(len(section.layers))):
        reasons.append(f"its recurrent nodes are layers {placed}; wanted each of {len(section.layers)} once, in order")
    known = {"input", "tokens", "lengths", "", *graph.tensors}
    for node in graph.nodes:
        reasons += [f"{node.op} reads {name!r}, which nothing before it makes" for name in node.inputs if name not in known]
        known |= set(node.outputs)
    if graph.output not in known:
        reasons.append(f"nothing makes its output {graph.output!r}")
    if len(set(graph.token_layers)) < len(graph.token_layers):
        reasons.append(f"token_layers names a layer twice: {list(graph.token_layers)}")
    for index in graph.token_layers:
        if section.embedding is None or index >= len(section.layers) or section.layers[index].input_size != section.embedding.embedding_dim:
            reasons.append(f"layer {index} cannot look tokens up: no such layer, or no embedding of its width")
    if graph.activation not in ACTIVATIONS:
        reasons.append(f"unknown activation {graph.activation!r}; known: {', '.join(ACTIVATIONS)}")
    if section.head:
        reasons.append("a graph holds its linear layers itself; head must be empty")
    return reasons


def to_dict(spec: RnnSpec) -> dict[str, Any]:
    """Plain data for config.json."""
    from dataclasses import asdict

    return asdict(spec)


MAY_BE_ZERO = {"proj_size", "start", "end"}
_Part = TypeVar("_Part", LayerSpec, EmbeddingSpec, LinearSpec, DecodeSpec)


def _made(kind: type[_Part], data: dict[str, Any]) -> _Part:
    """The part, its values of the types that its fields declare (TypeError, ValueError)."""
    part = kind(**data)
    for one in fields(part):
        value = getattr(part, one.name)
        if type(value).__name__ != one.type:
            raise TypeError(f"{one.name} is a {type(value).__name__}")
        if one.type == "int" and not (one.name not in MAY_BE_ZERO) <= value < 2**31:
            raise ValueError(f"{one.name} is out of range")
    return part


def from_dict(data: dict[str, Any]) -> RnnSpec:
    """The inverse of `to_dict`; raises UnsupportedError where the data do not fit."""
    try:
        sections = {
            name: SectionSpec(
                layers=tuple(_made(LayerSpec, layer) for layer in section["layers"]),
                embedding=_made(EmbeddingSpec, section["embedding"]) if section["embedding"] else None,
                head=tuple(_made(LinearSpec, linear) for linear in section["head"]),
                readout=section["readout"],
                graph=_graph_from(section.get("graph")),
            )
            for name, section in data["sections"].items()
        }
        spec = RnnSpec(sections, _made(DecodeSpec, data["decode"]) if data["decode"] else None)
        if spec.sections.keys() != ({"encoder", "decoder"} if spec.decode else {"main"}) or not all(s.layers for s in sections.values()):
            raise ValueError("sections or layers are missing")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnsupportedError(f"config.json: the spec is not one that this version reads ({error})") from None
    check(spec)
    return spec


def _graph_from(data: dict[str, Any] | None) -> GraphSpec | None:
    if data is None:
        return None
    rest = dict(data)
    nodes = tuple(Node(str(n["op"]), _names(n["inputs"]), _names(n["outputs"]), dict(n["attributes"])) for n in rest.pop("nodes"))
    tensors = {str(name): _sizes(shape) for name, shape in rest.pop("tensors").items()}
    looked_up = rest.pop("token_layers", [])  # older directories do not have it
    if not isinstance(looked_up, list | tuple) or not all(type(index) is int and index >= 0 for index in looked_up):
        raise ValueError(f"token_layers: {looked_up} is no list of layers")
    graph = GraphSpec(nodes=nodes, tensors=tensors, input_shape=_sizes(rest.pop("input_shape")), token_layers=tuple(looked_up), **rest)
    flags = (graph.per_step, graph.batch_first, graph.stepwise, graph.padded)
    _sizes([graph.output_size, *([] if graph.steps is None else [graph.steps])])
    if not all(isinstance(flag, bool) for flag in flags) or not isinstance(graph.output, str):
        raise TypeError("a graph's flags are true or false, and its output is a name")
    return graph


def _names(data: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in data):
        raise TypeError("values of a graph are named by strings")
    return tuple(data)


def _sizes(data: list[Any]) -> tuple[int, ...]:
    if not all(type(size) is int and 0 < size < 2**31 for size in data):
        raise ValueError(f"{data} are no sizes")
    return tuple(data)
