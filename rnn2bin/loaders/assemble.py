"""Source + tensors -> (RnnSpec, canonical weights). The one place where gates are permuted.

PyTorch's row blocks are i,f,g,o (LSTM; i,g,o where f = 1 − i) and r,z,n (GRU); the canonical order is spec.py's, with the candidate in
tensors of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin import spec as spec_module
from rnn2bin.errors import UnsupportedError
from rnn2bin.files import json_object
from rnn2bin.kinds import CELLS
from rnn2bin.recipe import LayerSource, LinearSource, SectionSource, Source
from rnn2bin.spec import DIRECTIONS, DecodeSpec, EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

if TYPE_CHECKING:
    import torch

CANDIDATE = "candidate"


def _blocks(gates: tuple[str, ...]) -> tuple[str, ...]:
    before = gates.index("o") if "o" in gates else len(gates)
    return (*gates[:before], CANDIDATE, *gates[before:])


# Of deep cells there is no such order: their tensors come under our own names.
BLOCKS = {name: _blocks(kind.gate_names) for name, kind in CELLS.items() if not kind.deep}

LEFT_OVER = "no part of what was recognised"
# What a tensor that the network does not use most likely is, by its name: said in the refusal, never acted upon.
LOOKS_LIKE = (
    ("attention", ("attn", "attention", "query")),
    ("normalisation", ("norm", "bn", "running_", "num_batches")),
    ("convolution", ("conv",)),
    ("a conditional random field", ("crf", "transition")),
    ("a learned initial state", ("h0", "c0", "h_0", "c_0", "init", "hidden")),
    ("a position embedding", ("pos_", "position")),
    ("an embedding", ("emb",)),
)


@dataclass
class Assembly:
    """The outcome: `spec` is None where the parts do not make one; `reasons` is empty exactly when it can be used; `notes` are told.

    `draft`: the recipe's `source` to start from, where a file needs one; `tensors`: what it holds, for people to look at.
    """

    spec: RnnSpec | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    draft: dict[str, Any] | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)  # beside the source itself


def assemble(source: Source, tensors: Mapping[str, torch.Tensor]) -> tuple[RnnSpec, dict[str, torch.Tensor]]:
    """Spec and canonical float32 weights of a source that names its sections.

    Raises UnsupportedError with all reasons: tensors that are missing, of the wrong shape, not finite, or left over.
    """
    built = build(source, tensors)
    if built.spec is None or built.reasons:
        raise UnsupportedError(*built.reasons)
    return built.spec, built.weights


def build(source: Source, tensors: Mapping[str, torch.Tensor]) -> Assembly:
    """Like `assemble`, but the reasons are returned instead of raised."""
    work = Work(tensors)
    named = {"main": source.main, "encoder": source.encoder, "decoder": source.decoder}
    sections = {name: work.section(name, section) for name, section in named.items() if section is not None}
    decode = DecodeSpec(source.decode.start, source.decode.end, source.decode.max_length) if source.decode else None
    work.reasons += leftovers(tensors, work.uses, source.ignore)
    complete = {name: section for name, section in sections.items() if section is not None}
    if len(complete) < len(sections) or not complete:
        return Assembly(reasons=work.reasons or ["source: names no section"])
    spec = RnnSpec(complete, decode)
    work.reasons += _joins(spec)
    return Assembly(spec, work.weights if not work.reasons else {}, list(dict.fromkeys(work.reasons)))


def by_spec(described: str, tensors: Mapping[str, torch.Tensor], ignore: Sequence[str]) -> Assembly:
    """A file of our own float networks: its spec as JSON, its tensors under our own names. Nothing is taken on trust."""
    try:
        spec = spec_module.from_dict(json_object(described.encode(), where="the header's spec"))
    except UnsupportedError as error:
        return Assembly(reasons=list(error.reasons))
    work = Work(tensors)
    for name, shape in spec.tensors().items():
        values = work.take(name, "the spec in the file's header", shape)
        if values is not None:
            work.keep(name, values)
    work.reasons += leftovers(tensors, work.uses, ignore)
    notes = ["written by rnn2bin: its header says what it is"]
    return Assembly(spec, work.weights if not work.reasons else {}, list(dict.fromkeys(work.reasons)), notes)


def leftovers(tensors: Mapping[str, torch.Tensor], used: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """A short reason for every tensor that is neither used nor listed in `ignore` (names or glob patterns); once, what to do about it."""
    left = unused(tensors, used, ignore)
    if not left:
        return []
    return [
        *(f"{name} {tuple(tensors[name].shape)}: {_guess(name)}{LEFT_OVER}" for name in left),
        f"tensors that are left over ({len(left)}): where the network gives the same outputs without them, list them in the recipe's "
        f'`source: {{ignore: ["{left[0]}"{", …" if len(left) > 1 else ""}]}}`, else export it to ONNX, which says what they do, or say it '
        "in a `graph` (docs/graphs.md); `rnn2bin inspect` prints both to start from",
    ]


def unused(names: Iterable[str], used: Iterable[str], ignore: Sequence[str]) -> list[str]:
    """The tensors that are neither used nor listed in `ignore` (names or glob patterns)."""
    used = set(used)
    return [name for name in names if name not in used and not any(name == p or fnmatchcase(name, p) for p in ignore)]


def _guess(name: str) -> str:
    found = [kind for kind, marks in LOOKS_LIKE if any(mark in name.lower() for mark in marks)]
    return f"looks like {found[0]}; " if found else ""


def _joins(spec: RnnSpec) -> list[str]:
    reasons: list[str] = []
    try:
        spec_module.check(spec)
    except UnsupportedError as error:
        reasons += error.reasons
    vocabulary = spec.main.embedding.num_embeddings if spec.main.embedding else 0
    if spec.decode and max(spec.decode.start, spec.decode.end) >= vocabulary:
        reasons.append(
            f"decode: start {spec.decode.start} and end {spec.decode.end} must be below the decoder's vocabulary of {vocabulary}"
        )
    return reasons


def split_direction(cell: str, ih: torch.Tensor, hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor) -> dict[str, torch.Tensor]:
    """PyTorch's tensors of one direction under the names of `LayerSpec.tensors`: gates in canonical order, the candidate aside.

    ih (G*H, I), hh (G*H, R), b_ih and b_hh (G*H,); G counts the candidate block too. The results may be views.
    """
    import torch

    def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = dict(zip(BLOCKS[cell], values.chunk(len(BLOCKS[cell])), strict=True))
        gates = [blocks[gate] for gate in CELLS[cell].gate_names]
        return torch.cat(gates) if gates else values[:0], blocks[CANDIDATE]

    found = {}
    for name, values in (("weight_ih", ih), ("weight_hh", hh)):
        found[f"gates.{name}"], found[f"candidate.{name}"] = split(values)
    (gates_ih, candidate_ih), (gates_hh, candidate_hh) = split(b_ih), split(b_hh)
    found["gates.bias"] = gates_ih + gates_hh
    if CELLS[cell].candidate_bias_hh:  # the reset gate multiplies b_hn: it cannot be added to b_in
        return {**found, "candidate.bias": candidate_ih, "candidate.bias_hh": candidate_hh}
    return {**found, "candidate.bias": candidate_ih + candidate_hh}


class Work:
    """Takes tensors by name, collecting reasons instead of stopping at the first."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.weights: dict[str, torch.Tensor] = {}
        self.uses: dict[str, str] = {}  # tensor of the file -> the role it was used in
        self.reasons: list[str] = []

    def take(self, name: str, role: str, shape: tuple[int | None, ...]) -> torch.Tensor | None:
        """The tensor as float32, or None with a reason. `shape`: None where any size fits."""
        tensor = self.tensors.get(name)
        if tensor is None:
            near = difflib.get_close_matches(name, self.tensors, n=1)
            self.reasons.append(f"{name}: no such tensor in the file" + (f"; did you mean {near[0]}?" if near else ""))
            return None
        # A table and the output layer may be tied: one matrix in two roles. Nothing else may be.
        before, kind = self.uses.get(name), "matrix" if role in ("embedding", "linear weight") else role
        if before is not None and not (kind == before == "matrix"):
            self.reasons.append(f"{name}: used more than once by the source")
        self.uses[name] = kind
        actual = tuple(tensor.shape)
        if len(actual) != len(shape) or any(want is not None and want != have for want, have in zip(shape, actual, strict=True)):
            wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
            self.reasons.append(f"{name}: shape {actual}, but {wanted} is wanted for {role}")
            return None
        return self._float32(name, tensor)

    def _float32(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        import torch

        if 0 in tensor.shape:
            self.reasons.append(f"{name}: shape {tuple(tensor.shape)} holds nothing")
            return None
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            self.reasons.append(
                f"{name}: {str(tensor.dtype).removeprefix('torch.')} values; weights are float16, bfloat16, float32 or float64"
            )
            return None
        values = tensor.detach().to(torch.float32)
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            self.reasons.append(f"{name}: {int((~finite).sum())} values are not finite in float32 (nan, inf or too large)")
            return None
        return values

    def section(self, name: str, source: SectionSource) -> SectionSpec | None:
        embedding = self.embedding(name, source)
        layers = [self.layer(f"{name}.layers.{index}", source.cell, layer) for index, layer in enumerate(source.layers)]
        head = [self.linear(f"{name}.head.{index}", linear) for index, linear in enumerate(source.head)]
        if not all(layers) or not all(head) or (source.embedding and embedding is None):
            return None
        known = tuple(layer for layer in layers if layer)
        if source.one_hot and not source.embedding:
            embedding = EmbeddingSpec(known[0].input_size, known[0].input_size, one_hot=True)
        return SectionSpec(known, embedding, tuple(linear for linear in head if linear), source.readout)

    def embedding(self, name: str, source: SectionSource) -> EmbeddingSpec | None:
        if not source.embedding:
            return None
        if source.one_hot:
            self.reasons.append(f"{name}: give `embedding` or `one_hot`, not both")
        table = self.take(source.embedding, "embedding", (None, None))
        if table is None:
            return None
        self.keep(f"{name}.embedding.weight", table)
        return EmbeddingSpec(*table.shape)

    def linear(self, prefix: str, source: LinearSource) -> LinearSpec | None:
        weight = self.take(source.weight, "linear weight", (None, None))
        rows = weight.shape[0] if weight is not None else None
        bias = self.take(source.bias, f"the bias of {source.weight}", (rows,)) if source.bias else None
        if weight is None or (source.bias and bias is None):
            return None
        self.keep(f"{prefix}.weight", weight)
        if bias is not None:
            self.keep(f"{prefix}.bias", bias)
        return LinearSpec(weight.shape[1], weight.shape[0], bias is not None, source.activation)

    def layer(self, prefix: str, cell: str, source: LayerSource) -> LayerSpec | None:
        """Both directions of one layer; they must have equal sizes."""
        directions = [source] + ([source.reverse] if source.reverse else [])
        if source.reverse and source.reverse.reverse:
            self.reasons.append(f"{prefix}: the backward direction cannot have a `reverse` of its own")
        specs = [self.direction(f"{prefix}.{name}", cell, one) for name, one in zip(DIRECTIONS, directions, strict=False)]
        if None in specs:
            return None
        first = specs[0]
        assert first is not None
        if len(specs) == 2 and specs[1] != first:
            names = [one.prefix or one.weight_hh for one in directions]
            self.reasons.append(f"{prefix}: the two directions have different sizes ({', '.join(map(str, names))})")
            return None
        return replace(first, directions=len(specs))

    def own(self, prefix: str, cell: str, source: LayerSource) -> LayerSpec | None:
        """A direction under our own names behind `source.prefix`. A gated feedback stack without biases of its global gates has zeros."""
        import torch

        first = self.tensors.get(f"{source.prefix}candidate.weight_ih")
        if first is None or first.ndim != 2 or 0 in first.shape:
            self.take(f"{source.prefix}candidate.weight_ih", f"the candidate of {cell}", (None, None))
            return None
        layer = LayerSpec(cell, first.shape[1], first.shape[0], depth=source.depth, activation=source.activation)
        if CELLS[cell].deep == "" and source.depth > 1:
            self.reasons.append(f"{source.prefix}: {cell} has no depth")
            return None
        found = {}
        for name, shape in layer.tensors().items():
            given = f"{source.prefix}{name}"
            if name == "global.bias" and given not in self.tensors:
                found[name] = torch.zeros(shape)
            elif (values := self.take(given, f"{name} of {cell}", shape)) is not None:
                found[name] = values
        if len(found) < len(layer.tensors()):
            return None
        for name, values in found.items():
            self.keep(f"{prefix}.{name}", values)
        return layer

    def direction(self, prefix: str, cell: str, source: LayerSource) -> LayerSpec | None:
        """weight_ih (G*H, I), weight_hh (G*H, R), biases (G*H,), weight_hr (R, H); G counts the candidate block too."""
        cell = source.cell or cell
        if source.activation != "tanh" and cell != "rnn":
            self.reasons.append(f"{prefix}: activation {source.activation} is for a plain RNN, not for {cell}")
        if source.prefix is not None:
            return self.own(prefix, cell, source)
        assert source.weight_ih is not None  # LayerSource: one of the two
        if cell not in BLOCKS or (source.weight_hh is None) == CELLS[cell].recurrent:
            needs = "weight_hh" if cell in BLOCKS and CELLS[cell].recurrent else "no weight_hh" if cell in BLOCKS else "a `prefix`"
            self.reasons.append(f"{source.weight_ih}: {cell} wants {needs}")
            return None
        blocks, sized = len(BLOCKS[cell]), source.weight_hh or source.weight_ih
        if source.weight_hr and not CELLS[cell].is_lstm:
            self.reasons.append(f"{source.weight_hr}: only an LSTM has a projection")
        projection = self.take(source.weight_hr, "the projection", (None, None)) if source.weight_hr else None
        size = self.tensors[sized].shape if sized in self.tensors else ()
        hidden = size[0] // blocks if len(size) == 2 else None
        recurrent = projection.shape[0] if projection is not None else hidden
        rows = hidden * blocks if hidden is not None else None
        hh = self.take(source.weight_hh, f"weight_hh of {cell}", (rows, recurrent)) if source.weight_hh else None
        ih = self.take(source.weight_ih, f"weight_ih of {cell}", (rows, None))
        biases = {name: self.take(name, f"a bias of {cell}", (rows,)) for name in (source.bias_ih, source.bias_hh) if name}
        if projection is not None and hidden is not None and projection.shape[1] != hidden:
            self.reasons.append(f"{source.weight_hr}: shape {tuple(projection.shape)}, but (any, {hidden}) is wanted for the projection")
            return None
        peephole = self.peephole(cell, source, hidden)
        incomplete = (source.weight_hr and projection is None) or any(bias is None for bias in biases.values())
        if (hh is None and source.weight_hh) or ih is None or hidden is None or incomplete:
            return None
        zeros = ih.new_zeros(blocks * hidden)
        b_ih, b_hh = (biases[name] if name else None for name in (source.bias_ih, source.bias_hh))
        self.permute(prefix, cell, ih, ih[:, :0] if hh is None else hh, zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh)
        if projection is not None:
            self.keep(f"{prefix}.projection.weight", projection)
        if peephole is not None:
            self.keep(f"{prefix}.gates.peephole", peephole)
        proj_size = projection.shape[0] if projection is not None else 0
        return LayerSpec(cell, ih.shape[1], hidden, 1, proj_size, activation=source.activation)

    def peephole(self, cell: str, source: LayerSource, hidden: int | None) -> torch.Tensor | None:
        """(G·H,) or (G·H,H), in the canonical order of gates."""
        import torch

        kind, names = CELLS[cell], source.peephole or []
        shape = (hidden, hidden) if kind.peepholes == "full" else (hidden,)
        if len(names) != len(kind.gates) * bool(kind.peepholes):
            wanted = f"a tensor for each of {', '.join(kind.gate_names)}" if kind.peepholes else "none"
            self.reasons.append(f"{source.weight_hh}: {len(names)} peepholes given; {cell} has {wanted}")
            return None
        found = [self.take(name, f"the peephole of {gate}", shape) for name, gate in zip(names, kind.gate_names, strict=False)]
        whole = [one for one in found if one is not None]
        return torch.cat(whole) if whole else None

    def permute(self, prefix: str, cell: str, ih: torch.Tensor, hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor) -> None:
        for name, values in split_direction(cell, ih, hh, b_ih, b_hh).items():
            if values.numel():  # a cell without gates has no rows of them, one that looks at no step before no columns
                self.keep(f"{prefix}.{name}", values)

    def keep(self, name: str, values: torch.Tensor) -> None:
        import torch

        # A copy: the weights must not share memory with the file's tensors or with each other.
        self.weights[name] = values.clone(memory_format=torch.contiguous_format)
