"""What a network is made of, as frozen data: layers, sections, tensor names and shapes. No torch here.

Alphabet of shapes: T time, B batch, I input, H hidden, R recurrent (the projection where there is one, else H), G gates,
D directions, V vocabulary, E embedding, O output.

Gate rows and candidate rows are separate tensors, so that a runtime can skip candidate rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from rnn2bin.errors import UnsupportedError
from rnn2bin.kinds import CELLS, MOST_DEPTH, CellKind

FORMAT_VERSION = 1

Readout = Literal["all", "last", "final", "mean", "max"]
Activation = Literal["none", "relu", "tanh", "sigmoid", "softmax", "log_softmax", "l2", "relu_l2"]
READOUTS: tuple[str, ...] = ("all", "last", "final", "mean", "max")
ACTIVATIONS: tuple[str, ...] = ("none", "relu", "tanh", "sigmoid", "softmax", "log_softmax", "l2", "relu_l2")
CELL_ACTIVATIONS: tuple[str, ...] = ("tanh", "relu", "sigmoid", "softsign", "elu", "identity")


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
