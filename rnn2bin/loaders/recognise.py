"""From names and shapes to a proposed `source:`. What is not certain becomes a reason, never a guess.

Works on plain dicts ("drafts", the YAML of a recipe's `source:`), because a draft may hold `unknown` where only the user can say.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rnn2bin.recipe import Source

UNKNOWN = "unknown"  # stands where the user has to decide; no recipe accepts it
Draft = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

RECURRENT = re.compile(
    r"^(?P<stem>(?:.*[._/:])?)(?P<kind>weight|bias|w|b)_(?P<side>ih|hh|hr)"
    r"(?:_?l(?P<layer>\d{1,4}))?(?P<back>_reverse)?(?P<tail>_(?:enc|dec)\w*)?$",
    re.IGNORECASE,
)
MATRIX = re.compile(r"(?P<head>^|[._/:])(?P<word>weight|kernel|w)(?P<rest>s?$|_[^.]*$)", re.IGNORECASE)
TABLE = re.compile(r"emb|wte|lookup|tok|vocab|(^|[._/])encoder\.weight$", re.IGNORECASE)
OUTPUT = re.compile(r"out|head|logit|classif|final|pred|(^|[._/])(fc\w*|linear|dense|decoder|generator)[._]", re.IGNORECASE)
NEITHER = re.compile(r"attn|attention|query|conv|norm|(^|[._])bn|crf|transition|pos_|position|mask|gate", re.IGNORECASE)
ENCODER = re.compile(r"(^|[._/])enc(oder)?\d*([._/]|$)", re.IGNORECASE)
DECODER = re.compile(r"(^|[._/])dec(oder)?\d*([._/]|$)", re.IGNORECASE)
ONE_WAY = re.compile(r"(^|[._/])(fwd?|bwd?|forward|backward)(\d*)([._/]|$)", re.IGNORECASE)
MOST_ORDERS = 6  # parts of one kind whose order is looked for by width: 6! = 720 orders


@dataclass(frozen=True)
class Proposal:
    """`draft` is a `source:` to start from (None when nothing recurrent was found); `reasons` is empty when it is certain."""

    draft: Draft | None
    reasons: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)  # what a draft of one part alone leaves out

    def source(self) -> Source | None:
        """The draft as a Source, unless it waits for the user's decision."""
        if self.draft is None or UNKNOWN in _strings(self.draft):
            return None
        return Source.model_validate({**self.draft, **({"ignore": self.ignore} if self.ignore else {})})

    def uses(self) -> set[str]:
        """All strings of the draft; among them the names of the tensors it uses."""
        return set(_strings(self.draft or {}))


class _Part(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def reads(self) -> int: ...
    @property
    def gives(self) -> int: ...


@dataclass(frozen=True)
class Stack:
    """One nn.LSTM / nn.GRU, or one cell: layers in order under a common name."""

    name: str
    cell: str
    layers: tuple[Draft, ...]
    reads: int
    gives: int


@dataclass(frozen=True)
class Matrix:
    """A 2-D tensor that is not recurrent: a linear layer (gives, reads) or a table (vocabulary, reads)."""

    name: str
    gives: int
    reads: int
    bias: str | None


def recognise(shapes: Shapes, *, hints: Source | None = None) -> Proposal:
    """Propose a source for tensors of these names and shapes. `hints`: decode, cell, readout, activations of a recipe's source."""
    return _Recogniser(shapes, hints or Source()).proposal()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """Name with its numbers taken out, and the numbers: `cells.1.` -> ("cells.#.", (1,))."""
    return re.sub(r"\d+", "#", name), tuple(int(n) for n in re.findall(r"\d+", name))


def _rest(names: Iterable[str], used: set[str]) -> list[str]:
    """Patterns for all names but the used ones: `encoder.*` where nothing below `encoder` is used."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        head = next((head for head in heads if not any(other.startswith(head) for other in used)), None)
        if name not in used:
            found[f"{head}*" if head and not set("*?[") & set(head) else name] = None
    return list(found)


def _chains(parts: Sequence[_Part]) -> bool:
    return all(a.gives == b.reads for a, b in itertools.pairwise(parts))


def orders(parts: Sequence[_Part], width: int | None) -> list[list[Any]]:
    """The orders in which parts join, starting at `width` (None: any). Names that differ by number only keep their numbers' order."""
    patterns = {_numbers(part.name)[0] for part in parts}
    if len(patterns) == 1 or len(parts) > MOST_ORDERS:
        candidates: Iterator[tuple[_Part, ...]] = iter([tuple(sorted(parts, key=lambda part: _numbers(part.name)[1]))])
    else:
        candidates = itertools.permutations(parts)
    return [list(c) for c in candidates if _chains(c) and (width is None or not c or c[0].reads == width)]


class _Recogniser:
    def __init__(self, shapes: Shapes, hints: Source) -> None:
        self.shapes, self.hints = shapes, hints
        self.reasons: list[str] = []
        names = list(shapes)
        # A file that keeps the order of definition tells which layer comes first; a sorted one does not.
        self.ordered = names != sorted(names)
        self.numbered = all(re.match(r"\d+\.", name) for name in names)
        self.index = {name: index for index, name in enumerate(names)}
        self.parsed = {name: match for name in names if (match := RECURRENT.match(name))}
        self.apart = False  # recurrent layers that do not join: several networks in one file, perhaps

    def proposal(self) -> Proposal:
        stacks = self.stacks()
        if not stacks:
            self.reasons.insert(
                0, "no recurrent layer recognised: no names such as rnn.weight_ih_l0 and rnn.weight_hh_l0; write `source:` by hand"
            )
            return Proposal(None, self.reasons)
        matrices = self.matrices()
        encoders = [s for s in stacks if ENCODER.search(s.name) and not DECODER.search(s.name)]
        decoders = [s for s in stacks if DECODER.search(s.name)]
        if encoders and decoders:
            draft = self.pair(stacks, encoders, decoders, matrices)
        else:
            main = self.section("main", stacks, matrices)
            draft = {"main": main} if main else None
            if draft is None and self.apart:
                return self.alone(stacks[0])
            if self.hints.decode:
                self.reasons.append("source.decode: for an encoder with a decoder; only one chain of recurrent layers was recognised")
        return Proposal(draft, self.reasons)

    def alone(self, stack: Stack) -> Proposal:
        """A start for a file of several networks: the first one's recurrent layers, everything else ignored. Never without its reason."""
        draft: Draft = {"main": {"cell": stack.cell, "layers": list(stack.layers)}}
        return Proposal(draft, self.reasons, _rest(self.shapes, set(_strings(draft))))

    # -- recurrent layers --

    def stacks(self) -> list[Stack]:
        groups: dict[tuple[str, str, bool], dict[tuple[int, bool], dict[str, str]]] = {}
        for name, match in self.parsed.items():
            key = (match["stem"], (match["tail"] or "").lower(), match["layer"] is not None)
            place = (int(match["layer"] or 0), bool(match["back"]))
            kind = "weight" if match["kind"].lower().startswith("w") else "bias"
            groups.setdefault(key, {}).setdefault(place, {})[f"{kind}_{match['side'].lower()}"] = name
        found = [self.stack(stem + tail.removeprefix("_" if not stem else ""), places) for (stem, tail, _), places in groups.items()]
        return [stack for stack in found if stack]

    def stack(self, name: str, places: Mapping[tuple[int, bool], dict[str, str]]) -> Stack | None:
        label = name.rstrip("._/:") or "the recurrent layers"
        numbers = sorted({layer for layer, _ in places})
        two_ways = any(back for _, back in places)
        if numbers != list(range(len(numbers))):
            self.reasons.append(f"{label}: layers are numbered {numbers}; layers in between are missing")
            return None
        missing = [
            f"{label}: layer {layer}{' reverse' if back else ''} has no {role}"
            for layer in numbers
            for back in ((False, True) if two_ways else (False,))
            for role in ("weight_ih", "weight_hh")
            if role not in places.get((layer, back), {})
        ]
        if missing:
            self.reasons.extend(missing)
            return None
        cells = {self.cell(label, roles) for roles in places.values()}
        if None in cells:
            return None
        if len(cells) > 1:
            self.reasons.append(f"{label}: its layers are of different kinds ({', '.join(sorted(str(c) for c in cells))})")
            return None
        layers = tuple(places[n, False] | ({"reverse": places[n, True]} if two_ways else {}) for n in numbers)
        first, last = places[0, False], places[numbers[-1], False]
        gives = self.shapes[last["weight_hh"]][1] * (2 if two_ways else 1)
        return Stack(name, str(cells.pop()), layers, self.shapes[first["weight_ih"]][1], gives)

    def cell(self, label: str, roles: Mapping[str, str]) -> str | None:
        """ "lstm" or "gru" from the rows of weight_hh (G*H, R); None with a reason."""
        ih, hh, hr = (self.shapes[roles[role]] if role in roles else None for role in ("weight_ih", "weight_hh", "weight_hr"))
        if hh is None or ih is None or len(hh) != 2 or len(ih) != 2 or (hr is not None and len(hr) != 2):
            self.reasons.append(f"{roles['weight_hh']}: shape {hh} with weight_ih {ih}; recurrent weights are matrices")
            return None
        hidden = hr[1] if hr is not None else hh[1]
        if hidden and hh[0] == 4 * hidden:
            return "lstm"
        if hidden and hh[0] == 3 * hidden:
            return "gru"
        if hh[0] == hidden:
            return "rnn"
        self.reasons.append(f"{roles['weight_hh']}: shape {hh} is neither an LSTM's (4H, H) nor a GRU's (3H, H) nor a plain RNN's (H, H)")
        return None

    # -- matrices --

    def matrices(self) -> list[Matrix]:
        """2-D tensors that could be a table or a linear layer, with the bias their name calls for."""
        found = []
        for name, shape in self.shapes.items():
            likely = MATRIX.search(name) or TABLE.search(name)
            if len(shape) == 2 and name not in self.parsed and likely and not NEITHER.search(name):
                found.append(Matrix(name, shape[0], shape[1], self.bias_of(name)))
        return found

    def bias_of(self, name: str) -> str | None:
        match = MATRIX.search(name)
        if not match:
            return None
        word = {"w": "b", "W": "B"}.get(match["word"], "bias")
        bias = name[: match.start("word")] + word + name[match.end("word") :]
        return bias if self.shapes.get(bias) == self.shapes[name][:1] else None

    def place(self, name: str) -> int | None:
        """Where a tensor stands in the network, as far as the file tells: nn.Sequential's number, or the order of definition."""
        if self.numbered:
            return int(name.split(".", 1)[0])
        return self.index[name] if self.ordered else None

    # -- sections --

    def pair(self, stacks: list[Stack], encoders: list[Stack], decoders: list[Stack], matrices: list[Matrix]) -> Draft | None:
        others = [s for s in stacks if s not in encoders and s not in decoders]
        self.reasons.extend(f"{s.name.rstrip('._')}: belongs neither to the encoder nor to the decoder by its name" for s in others)
        own = [m for m in matrices if ENCODER.search(m.name) and not DECODER.search(m.name)]
        encoder = self.section("encoder", encoders, own, head=False)
        decoder = self.section("decoder", decoders, [m for m in matrices if m not in own])
        if not encoder or not decoder:
            return None
        decode = self.hints.decode
        if not decode:
            self.reasons.append(
                "an encoder with a decoder: the file cannot say which tokens start and end decoding; "
                "give the recipe `source: {decode: {start: …, end: …, max_length: …}}`"
            )
        values = decode.model_dump() if decode else {"start": UNKNOWN, "end": UNKNOWN, "max_length": UNKNOWN}
        return {"encoder": encoder, "decoder": decoder, "decode": values}

    def section(self, name: str, stacks: list[Stack], matrices: list[Matrix], *, head: bool = True) -> Draft | None:
        chain = self.chain(stacks)
        if not chain:
            return None
        table = self.table(chain, matrices)
        rest = [m for m in matrices if m is not table]
        linears = self.head(chain, rest, table) if head else []
        found = next((stack.cell for stack in chain if stack.cell != "rnn"), "rnn")
        cell = self.hints.cell if self.hints.cell and found == "gru" else found
        if self.hints.cell and found != "gru":
            self.reasons.append(f"source.cell: {self.hints.cell} was asked for, but the {name} layers are {found}")
        draft: Draft = {"cell": cell}
        if table:
            draft["embedding"] = table.name
        draft["layers"] = [layer for stack in chain for layer in self.carried(stack)]
        if linears:
            draft["head"] = self.activated(linears)
        elif head and self.hints.activations:
            self.reasons.append(
                f"source.activations: {len(self.hints.activations)} given, but no linear layer after the recurrent ones was recognised"
            )
        if head and self.hints.readout:
            draft["readout"] = self.hints.readout
        return draft

    def carried(self, stack: Stack) -> Iterator[Draft]:
        """A stack's layers. A plain RNN is carried through; the file cannot say what its activation is."""
        for layer in stack.layers:
            if stack.cell != "rnn":
                yield layer
                continue
            name = layer["weight_ih"]
            self.reasons.append(f"{name}: a plain RNN, tanh or relu: the file cannot say which; write it as the layer's `activation`")
            ways = {"reverse": {**layer["reverse"], "activation": UNKNOWN}} if "reverse" in layer else {}
            yield {**layer, **ways, "cell": "rnn", "activation": UNKNOWN}

    def chain(self, stacks: list[Stack]) -> list[Stack] | None:
        """All stacks in the one order in which they join, or None with the reason."""
        shown = ", ".join(f"{s.name.rstrip('._/:') or 'cell'} {s.cell} ({s.reads} -> {s.gives})" for s in stacks)
        if all(s.cell == "rnn" for s in stacks):
            self.reasons.append(f"{shown}: a plain RNN has no gates to make binary")
            return None
        if len({s.cell for s in stacks} - {"rnn"}) > 1:
            self.reasons.append(f"recurrent layers of different kinds: {shown}; write `source:` by hand, with a `cell:` for each layer")
            return None
        if len(stacks) > 1 and sum(bool(ONE_WAY.search(s.name)) for s in stacks) > 1:
            self.reasons.append(
                f"recurrent layers that look like two directions held apart: {shown}; write the backward ones under `reverse:`"
            )
            return None
        found = orders(stacks, None)
        if len(found) != 1:
            how = f"join in {len(found)} different orders" if found else "do not join by their widths"
            self.apart = True
            self.reasons.append(f"recurrent layers that {how}: {shown}; write `source:` by hand, or ignore those not needed")
            return None
        return list(found[0])

    def table(self, chain: list[Stack], matrices: list[Matrix]) -> Matrix | None:
        """The embedding: width of the first layer's input, no bias, and a name or a place that says so."""
        first, gives = chain[0], chain[-1].gives
        fitting = [m for m in matrices if m.reads == first.reads and not m.bias]
        named = [m for m in fitting if TABLE.search(m.name)]
        if len(named) > 1:
            self.reasons.append(f"several tensors could be the embedding: {', '.join(m.name for m in named)}; write `source:` by hand")
            return None
        if named:
            return named[0]
        before = self.place(first.layers[0]["weight_ih"])
        unnamed = [m for m in fitting if not OUTPUT.search(m.name)]
        places = {m.name: self.place(m.name) for m in unnamed}
        # A matrix ahead of the first layer, as wide as its input, is a table: a linear layer there would have to be square.
        ahead = [m for m in unnamed if before is not None and (places[m.name] or 0) < before and m.gives != m.reads]
        only = [m for m in unnamed if m.gives != m.reads and m.reads != gives]
        if len(ahead) == 1 or len(unnamed) == len(only) == 1:
            return (ahead or only)[0]
        doubtful = [m for m in unnamed if m in ahead or m in only or places[m.name] is None]
        self.reasons.extend(
            f"{m.name} ({m.gives}, {m.reads}): could be the embedding or a linear layer; write `source:` by hand" for m in doubtful
        )
        return None

    def head(self, chain: list[Stack], matrices: list[Matrix], table: Matrix | None) -> list[Matrix]:
        """The linear layers after the last recurrent one, in their one order; what does not join is left over and reported as such."""
        width = chain[-1].gives
        linears = [m for m in matrices if not (TABLE.search(m.name) and not OUTPUT.search(m.name) and not m.bias)]
        if not linears:
            return []
        found = orders(linears, width)
        shown = ", ".join(f"{m.name} ({m.gives}, {m.reads})" for m in linears)
        if len(found) != 1:
            how = f"join in {len(found)} different orders" if found else f"do not join to the last recurrent layer's {width} outputs"
            self.reasons.append(f"linear layers that {how}: {shown}; write `source:` by hand, or ignore those not needed")
            return []
        self.reasons.extend(reason for m in found[0] if (reason := self.elsewhere(m, chain, table)))
        return list(found[0])

    def elsewhere(self, linear: Matrix, chain: list[Stack], table: Matrix | None) -> str | None:
        """Why a linear layer that fits the head might stand before or between the recurrent layers instead."""
        entry = table.reads if table else None
        gaps = [(entry, chain[0])] + [(a.gives, b) for a, b in itertools.pairwise(chain)]
        if not any(linear.gives == b.reads and width in (None, linear.reads) for width, b in gaps):
            return None
        place, last = self.place(linear.name), self.place(chain[-1].layers[-1]["weight_ih"])
        if place is not None and last is not None:
            if place > last:
                return None
        elif OUTPUT.search(linear.name):
            return None
        return (
            f"{linear.name} ({linear.gives}, {linear.reads}): could stand before or between the recurrent layers as well as after them; "
            "export the network to ONNX, which says it, or write `source:` by hand"
        )

    def activated(self, linears: list[Matrix]) -> list[Draft]:
        given = self.hints.activations
        if given is not None and len(given) != len(linears):
            self.reasons.append(
                f"source.activations: {len(given)} given for {len(linears)} linear layers: {', '.join(m.name for m in linears)}"
            )
            given = None
        if given is None and len(linears) > 1:
            self.reasons.append(
                f"the file cannot say which activations stand between the linear layers {', '.join(m.name for m in linears)}; "
                f"give the recipe `source: {{activations: [{', '.join(['…'] * (len(linears) - 1) + ['none'])}]}}`, or an ONNX export"
            )
        activations: Sequence[str] = given if given is not None else [UNKNOWN] * (len(linears) - 1) + ["none"]
        return [
            {"weight": m.name} | ({"bias": m.bias} if m.bias else {}) | ({"activation": a} if a != "none" else {})
            for m, a in zip(linears, activations, strict=True)
        ]
