"""TensorFlow 1 frozen graphs (.pb): recurrent loops and unrolled cells become layers, what stands around them a graph.

TensorFlow has no recurrent node: `dynamic_rnn` is a while loop around a cell's products, `static_rnn` the cell written out T times. Values
within a loop are made for all steps at once (`Value.lifted`), and reversing a sequence is put off (`Value.flipped`) until it is known
whether a layer's backward direction is all that reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders import graphdef
from rnn2bin.loaders.assemble import Assembly
from rnn2bin.loaders.graph import GraphBuilder
from rnn2bin.loaders.graphdef import BOOL, FLOATS, GraphNode
from rnn2bin.loaders.tensorflow_cells import Cell, Cells, Variable
from rnn2bin.loaders.tensorflow_ops import LIFTED, SAME, Ref, Value, Values
from rnn2bin.recipe import Source

if TYPE_CHECKING:
    from torch import Tensor

READS = ("TensorArrayReadV3", "TensorArrayReadV2")
WRITES = ("TensorArrayWriteV3", "TensorArrayWriteV2")
SCATTERS = ("TensorArrayScatterV3", "TensorArrayScatterV2")
GATHERS = ("TensorArrayGatherV3", "TensorArrayGatherV2")
DECISIONS = ("ArgMax", "TopKV2", "Cast", "Round", "Rint", "Greater", "GreaterEqual", "Less", "Equal", *SAME)  # after the last values
SILENT = ("Const", "NoOp", "Assert", "Placeholder", "PlaceholderWithDefault")
MOST_ENDS = 200
NOISE = ("RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2")
MASKING = frozenset(
    {"Floor", "Add", "AddV2", "Sub", "Mul", "RealDiv", "Div", "GreaterEqual", "Less", "Cast", "Identity", "Select", "SelectV2", "Enter"}
)


def read(path: Path, source: Source) -> Assembly:
    """The network that leads to the graph's one output. Raises UnsupportedError with the reason, UnsafeError as `graphdef.read`.

    `source.ignore` may name outputs that do not count.
    """
    from rnn2bin.cells.ops import MISFITS

    nodes = graphdef.read(path)
    try:
        return _Importer(nodes, source.ignore).network()
    except RecursionError:
        raise UnsupportedError("the graph is too deep to be followed") from None
    except (*MISFITS, AttributeError) as error:  # inputs and attributes are taken as there
        raise UnsupportedError(f"a node is not as TensorFlow writes it ({type(error).__name__}: {error}); freeze the graph again") from None


class _Importer(Values):
    """Adds to the builder what is not constant."""

    def __init__(self, nodes: dict[str, GraphNode], ignore: Sequence[str]) -> None:
        super().__init__(nodes)
        self.ignore, self.builder = ignore, GraphBuilder()
        self.random = any(node.op in NOISE for node in nodes.values())
        self.finder = Cells(nodes)
        self.cells = list(self.finder.find())
        self.outputs = {ref: cell for cell in self.cells for ref in (cell.new_h, cell.new_c) if ref is not None}
        self.last: dict[Ref, Value] = {}  # a cell's new state -> what it is behind the last step
        self.names: dict[int, tuple[Tensor, str]] = {}  # constants that the builder has
        self.embedding: Tensor | int | None = None

    def network(self) -> Assembly:
        output = self.output()
        needed = self.ancestors([output])
        placeholder = self.input_of(needed)
        shape = placeholder.attributes.get("shape") or ()
        whole = placeholder.attributes.get("dtype") not in FLOATS
        if whole:
            self.find_table(placeholder, needed)
        elif len(shape) < 2:
            raise UnsupportedError(f"Placeholder {placeholder.name}: its shape is not known; wanted (batch, time, features)")
        if whole and self.embedding is None:
            raise UnsupportedError(f"Placeholder {placeholder.name}: whole numbers that no table and no one-hot reads")
        self.made[placeholder.name, 0] = Value("tokens" if whole else "input")
        steps = next((n for n in (shape[1:2] + shape[:1] if len(shape) > 1 else ()) if n > 1), None)
        found = self.plain(self.value(output))
        if found.constant is not None:
            raise UnsupportedError(f"the output {output[0]} does not depend on the input")
        return self.builder.network(
            found.name, input_shape=() if whole else shape[2:], embedding=self.embedding, batch_first=None, steps=steps
        )

    # -- ends of the graph --

    def output(self) -> Ref:
        """The one value that is computed and that nothing reads; decisions (argmax and the like) behind it left out."""
        read = {ref[0] for node in self.nodes.values() for ref in node.inputs}
        ends = [node for node in self.nodes.values() if node.name not in read and node.op not in SILENT and not self.ignored(node.name)]
        refs = list(dict.fromkeys(self.decided((node.name, 0)) for node in ends))
        if len(refs) > MOST_ENDS:
            raise UnsupportedError(f"the graph has {len(refs)} ends; freeze it with the network's output alone")
        refs = [ref for ref in refs if self.outputs.keys() & {(n, k) for n in self.ancestors([ref]) for k in range(7)}]
        refs = [ref for ref in refs if not any(ref[0] in self.ancestors([other]) for other in refs if other != ref)]
        if not self.cells:
            raise UnsupportedError("no LSTM or GRU cell of TensorFlow 1 is in the graph; there is no gate to make binary")
        if len(refs) != 1:
            names = ", ".join(ref[0] for ref in refs) or "none"
            raise UnsupportedError(
                f"the graph has {len(refs)} outputs that a recurrent layer leads to ({names}); list all but one under source.ignore"
            )
        return refs[0]

    def ignored(self, name: str) -> bool:
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in self.ignore)

    def decided(self, ref: Ref) -> Ref:
        while self.node(ref).op in DECISIONS and self.node(ref).inputs:
            ref = self.node(ref).inputs[0]
        return ref

    def ancestors(self, refs: Iterable[Ref]) -> set[str]:
        found: set[str] = set()
        front = [ref[0] for ref in refs]
        while front:
            name = front.pop()
            if name not in found and name in self.nodes:
                found.add(name)
                front += [one for one, _ in self.nodes[name].inputs]
        return found

    def input_of(self, needed: set[str]) -> GraphNode:
        """The placeholder that the sequences come in by; those of lengths, dropout and first states are told by their use."""
        found = [self.nodes[name] for name in sorted(needed) if self.nodes[name].op == "Placeholder"]
        data = [node for node in found if self.role(node) == "data"]
        if len(data) != 1:
            names = ", ".join(node.name for node in data) or "none"
            raise UnsupportedError(f"the network reads {len(data)} inputs ({names}); rnn2bin converts networks of one input")
        return data[0]

    def role(self, node: GraphNode) -> str:
        shape, kind = node.attributes.get("shape"), node.attributes.get("dtype")
        readers = self.finder.readers.get((node.name, 0), [])
        if shape == () and kind == BOOL:
            return "phase"
        if shape in ((), None) and kind in FLOATS and self.chance(node, readers):
            return "chance"
        if kind in FLOATS and readers and all(reader.op == "Enter" for reader in readers):
            return "state"
        if kind not in FLOATS and shape is not None and len(shape) == 1:
            return "lengths"
        return "data"

    def chance(self, node: GraphNode, readers: Sequence[GraphNode]) -> bool:
        """Whether a number is how much dropout keeps (or drops)."""
        return any(one.op in ("RealDiv", "Div") and one.inputs[1][0] == node.name for one in readers) or self.drops(node, readers)

    def drops(self, node: GraphNode, readers: Sequence[GraphNode]) -> bool:
        return any(one.op in ("Sub", "GreaterEqual") and one.inputs[1][0] == node.name for one in readers)

    def find_table(self, placeholder: GraphNode, needed: set[str]) -> None:
        """The embedding that tokens are looked up in (`input` is then its rows), or one-hot vectors."""
        readers = [r for ref in self.copies((placeholder.name, 0)) for r in self.finder.readers.get(ref, []) if r.name in needed]
        tables = {}
        for node in readers:
            if node.op in ("Gather", "GatherV2", "ResourceGather"):
                table = self.constant(node.inputs[0])
                if table is not None and table.ndim == 2 and table.is_floating_point():
                    tables[node.name] = table
            if node.op == "OneHot":
                depth, on, off = (self.constant(ref) for ref in node.inputs[1:])
                if depth is not None and on is not None and off is not None and (float(on), float(off)) == (1.0, 0.0):
                    self.embedding = int(depth)
                    self.made[node.name, 0] = Value("input")
        sources = {self.finder.skip(self.nodes[name].inputs[0]) for name in tables}
        if len(sources) == 1:
            self.embedding = next(iter(tables.values()))
            self.made |= {(name, 0): Value("input") for name in tables}
        elif self.embedding is None and tables:
            self.embedding = min(len(table) for table in tables.values())

    def copies(self, ref: Ref) -> list[Ref]:
        """A value and what repeats it."""
        found = [ref]
        for one in found:
            found += [
                (r.name, 0)
                for r in self.finder.readers.get(one, [])
                if r.op in SAME or (r.op == "Cast" and r.attributes.get("DstT") not in FLOATS)
            ]
        return found

    # -- what is not constant --

    def constant(self, ref: Ref) -> Tensor | None:
        return self.finder.values.constant(ref)

    def of(self, node: GraphNode, ref: Ref) -> Value | tuple[Value, ...]:
        if ref in self.outputs:
            self.run(self.outputs[ref])
            return self.made[ref] if ref in self.made else self.refuse_cell_states(node)
        if node.op in ("Mul", "Select", "SelectV2") and (kept := self.without_dropout(node)) is not None:
            return self.value(kept)
        if node.op in ("Select", "SelectV2") and (inner := self.finder.before_end(ref))[1] is not None:
            return self.value(inner[0])
        if node.op == "Pack" and (layer := self.unrolled_outputs(node)) is not None:
            y = self.value(layer)
            axis = node.attributes.get("axis", 0)
            return self("Transpose", y, perm=[1, 0, 2]) if axis == 1 else y
        if node.op == "ReverseSequence":
            return self.flip(self.value(node.inputs[0]), node.attributes["seq_dim"])
        return super().of(node, ref)

    def other(self, node: GraphNode, ref: Ref) -> Value | tuple[Value, ...]:
        if node.op == "Placeholder":
            return self.fed(node)
        if node.op in READS:
            return self.step_of(node)
        if node.op in GATHERS:
            return self.steps_of(node)
        if node.op == "Exit":
            return self.state_of(node)
        if node.op == "Switch" and self.finder.variable(ref) is not None:
            raise UnsupportedError(
                f"{node.name}: a loop whose step reads what the step before made, other than through an LSTM or GRU cell"
            )
        raise UnsupportedError(f"{node.op} ({node.name}): an operation that rnn2bin does not read from TensorFlow graphs")

    def fed(self, node: GraphNode) -> Value:
        role = self.role(node)
        if role == "chance":
            return self.literal(0.0 if self.drops(node, self.finder.readers.get((node.name, 0), [])) else 1.0)
        if role == "phase":
            return self.literal(False)
        raise UnsupportedError(f"Placeholder {node.name}: read outside the recurrent layers; rnn2bin feeds the sequences alone")

    def add(self, op: str, values: Sequence[Value], count: int, attributes: dict[str, Any]) -> tuple[Value, ...]:
        lifted = any(v.lifted for v in values)
        if lifted and op not in LIFTED:
            raise UnsupportedError(f"{op} inside a loop, around its cells, is not read from TensorFlow graphs")
        turned = [v.flipped for v in values if v.flipped is not None]
        if turned and op == "Transpose":
            flipped: int | None = attributes["perm"].index(turned[0])
        elif turned and op == "Identity":
            flipped = turned[0]
        else:
            values, flipped = [self.plain(v) for v in values], None
        names = [self.builder.name(op) for _ in range(count)]
        self.builder.add_many(op, [self.named(v) for v in values], names, **attributes)
        return tuple(Value(name, lifted=lifted, flipped=flipped) for name in names)

    def named(self, value: Value) -> str:
        if value.constant is None:
            return value.name
        key = id(value.constant)
        if key not in self.names:
            self.names[key] = (value.constant, self.builder.constant(value.constant))  # kept, so that the id stays its own
        return self.names[key][1]

    def plain(self, value: Value) -> Value:
        """A value as the file has it: reversed where that was put off."""
        if value.flipped is None:
            return value
        name = self.builder.add("Slice", value.name, starts=[2**31], ends=[-(2**31)], axes=[value.flipped], steps=[-1])
        return replace(value, name=name, flipped=None)

    def without_dropout(self, node: GraphNode) -> Ref | None:
        """What a dropout passes on where it drops nothing: what its mask multiplies (or selects), not scaled."""
        if not self.random:
            return None
        masks = [self.mask(ref) for ref in node.inputs]
        if node.op == "Mul":
            return self.unscaled(node.inputs[masks.index(None)]) if set(masks) == {True, None} else None
        return self.unscaled(node.inputs[1]) if masks[0] else None

    def mask(self, ref: Ref) -> bool | None:
        """None for a value that depends on what the network reads; else whether random numbers make it."""
        front, seen, random = [ref[0]], set(), False
        while front:
            node = self.nodes.get(front.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            if node.op in NOISE:  # its operand is a shape
                random = True
            elif node.op in MASKING:
                front += [name for name, _ in node.inputs]
            elif node.op not in ("Const", "PlaceholderWithDefault") and not (node.op == "Placeholder" and self.role(node) == "chance"):
                return None
        return random

    def unscaled(self, ref: Ref) -> Ref:
        """What dropout divides by the share that it keeps."""
        node = self.node(self.finder.skip(ref))
        if node.op in ("RealDiv", "Div", "Mul"):
            for one, other in (node.inputs, node.inputs[::-1]):
                if self.mask(other) is False and (number := self.value(other).constant) is not None and number.numel() == 1:
                    return one
        return ref

    # -- loops --

    def step_of(self, node: GraphNode) -> Value:
        """What a loop reads at its step: all of them."""
        filled = self.node(self.finder.skip(node.inputs[2]))
        if filled.op not in SCATTERS or not self.finder.counts(node.inputs[1]):
            raise UnsupportedError(f"{node.name}: a loop that does not read its input step by step")
        whole = self.value(filled.inputs[2])
        return replace(whole if whole.flipped in (None, 0) else self.plain(whole), lifted=True)

    def steps_of(self, node: GraphNode) -> Value:
        """All that a loop has written."""
        found = self.exit_of(node.inputs[2])
        written = self.node(found.after) if found else None
        if written is None or written.op not in WRITES or not self.finder.counts(written.inputs[1]):
            raise UnsupportedError(f"{node.name}: reads what a loop wrote, but not step by step")
        value = self.value(written.inputs[2])
        if not value.lifted:
            raise UnsupportedError(f"{node.name}: a loop that writes what does not depend on its input")
        return replace(value, lifted=False)

    def exit_of(self, ref: Ref) -> Variable | None:
        node = self.nodes.get(self.finder.skip(ref)[0])
        return self.finder.variable(node.inputs[0]) if node is not None and node.op == "Exit" else None

    def state_of(self, node: GraphNode) -> Value:
        """A loop's last state."""
        found = self.finder.variable(node.inputs[0])
        after = self.finder.before_end(found.after)[0] if found else None
        cell = self.outputs.get(after) if after else None
        if cell is None or after is None:
            raise UnsupportedError(f"{node.name}: what a loop leaves is not the state of an LSTM or GRU cell")
        self.run(cell)
        return self.last[after]

    # -- layers --

    def run(self, cell: Cell) -> None:
        """Adds the layer that a cell belongs to."""
        if cell.new_h in self.made:
            return
        if cell.whole:
            self.whole(cell)
        elif self.finder.variable(cell.h) is not None:
            self.looped(cell)
        else:
            self.unrolled(cell)

    def refuse_cell_states(self, node: GraphNode) -> Value:
        raise UnsupportedError(f"{node.name}: the cell states of every step are read; rnn2bin keeps the last alone")

    def looped(self, cell: Cell) -> None:
        x, (starts, lengths) = self.value(cell.x), self.carried(cell)
        if not x.lifted:
            raise UnsupportedError(f"{cell.name}: what the cell reads does not come step by step")
        mate = self.mate(cell) if not any(starts) else None
        if mate is None:
            x = self.plain(replace(x, lifted=False))
            self.settle([cell], *self.recurrent([cell], x.name, starts, lengths))
            return
        pair = [cell, mate] if x.flipped is None else [mate, cell]
        if any(self.carried(mate)[0]):
            raise UnsupportedError(f"{mate.name}: one of two directions starts from a given state")
        self.settle(pair, *self.recurrent(pair, x.name, starts, lengths))

    def carried(self, cell: Cell) -> tuple[list[str], str]:
        """The first states ("" for zero) and the lengths of a cell in a loop; what it carries must be its own state."""
        starts, lengths = [], ""
        for before, after in ((cell.h, cell.new_h), (cell.c, cell.new_c)):
            if before is None or after is None:
                continue
            found = self.finder.variable(before)
            made, ends = self.finder.before_end(found.after) if found else (None, None)
            if found is None or made != after:
                raise UnsupportedError(f"{cell.name}: the loop changes the cell's state between its steps")
            starts.append(self.start(found.before))
            if ends is not None:
                node = self.node(ends)
                lengths = "" if node.op == "Placeholder" and self.role(node) == "lengths" else self.named(self.value(ends))
        return starts, lengths

    def start(self, ref: Ref) -> str:
        """A state before the first step as (1,B,H), or "" where it is zero (or fed, to read on from: then it is carried)."""
        node = self.node(ref)
        number = self.constant(node.inputs[1] if node.op == "Fill" else ref)
        fed = node.op == "Placeholder" and self.role(node) == "state"
        if fed or node.op == "ZerosLike" or (number is not None and not bool(number.any())):
            return ""
        return self.named(self("Unsqueeze", self.value(ref), axes=[0]))

    def mate(self, cell: Cell) -> Cell | None:
        """The cell that reads the same sequence the other way round."""
        root, turned = self.root(cell.x)
        found = [
            one for one in self.cells if one.sizes == cell.sizes and one.new_h not in self.made and self.root(one.x) == (root, not turned)
        ]
        return found[0] if len(found) == 1 and self.finder.variable(found[0].h) is not None else None

    def root(self, ref: Ref) -> tuple[Ref, bool]:
        """Where a loop's input comes from, layouts and reversals apart, and whether it was reversed."""
        turned = False
        while True:
            ref = self.finder.skip(ref)
            node = self.node(ref)
            if node.op in READS:
                filled = self.node(self.finder.skip(node.inputs[2]))
                if filled.op not in SCATTERS:
                    return ref, turned
                ref = filled.inputs[2]
            elif node.op in ("Transpose", "ReverseSequence", "ReverseV2"):
                turned ^= node.op != "Transpose"
                ref = node.inputs[0]
            else:
                return ref, turned

    def recurrent(self, cells: Sequence[Cell], x: str, starts: Sequence[str], lengths: str) -> tuple[str, str, str]:
        h0, c0 = [*starts, "", ""][:2]
        cell = cells[0]
        directions = [one.direction for one in cells]
        return self.builder.recurrent(cell.kind, x, directions, h0=h0, c0=c0, lengths=lengths, hint=cell.name, **cell.options)

    def settle(self, cells: Sequence[Cell], y: str, h: str, c: str) -> None:
        """Names what a layer's cells have made; the second reads backward, and the file has its output in that order."""
        size = cells[0].direction.weight_hh.shape[1]
        for at, cell in enumerate(cells):
            mine = Value(y)
            if len(cells) > 1:
                mine = self("Slice", mine, starts=[at * size], ends=[(at + 1) * size], axes=[2])
            self.made[cell.new_h] = replace(mine, lifted=not cell.whole, flipped=0 if at else None)
            self.last[cell.new_h] = self("Gather", Value(h), self.literal(at), axis=0)
            if cell.new_c is not None:
                self.last[cell.new_c] = self("Gather", Value(c), self.literal(at), axis=0)

    def whole(self, cell: Cell) -> None:
        """BlockLSTM: all steps in one node, time first."""
        x = self.plain(self.value(cell.x))
        assert cell.c is not None
        self.settle([cell], *self.recurrent([cell], x.name, [self.start(cell.h), self.start(cell.c)], ""))

    # -- unrolled layers --

    def unrolled(self, cell: Cell) -> None:
        """`static_rnn`: the same cell written out, each reading the state of the one before."""
        chain = self.chain(cell)
        starts = [self.start(chain[0].h)] + ([self.start(chain[0].c)] if chain[0].c is not None else [])
        x = self.family([one.x for one in chain])
        y, _, c = self.recurrent(chain[:1], x, starts, "")
        for at, one in enumerate(chain):
            last = one is chain[-1]
            self.made[one.new_h] = self("Gather", Value(y), self.literal(-1 if last else at), axis=0)
            self.last[one.new_h] = Value(y)
            if last and one.new_c is not None:
                self.made[one.new_c] = self("Gather", Value(c), self.literal(0), axis=0)

    def chain(self, cell: Cell) -> list[Cell]:
        """The cells of an unrolled layer in order."""
        before = {one.h: one for one in self.cells if one.kernels == cell.kernels}
        first = next((one for one in before.values() if one.h not in self.outputs), None)
        found = [first] if first else []
        while found and found[-1].new_h in before and len(found) < len(before):
            found.append(before[found[-1].new_h])
        if cell not in found or any(b.c != a.new_c for a, b in itertools.pairwise(found)):
            raise UnsupportedError(f"{cell.name}: cells that share a kernel, but do not follow one another")
        return found

    def family(self, refs: Sequence[Ref]) -> str:
        """What the steps of an unrolled layer read, as one value (T,B,I)."""
        node = self.node(refs[0])
        if node.op == "Unpack" and node.attributes["num"] == len(refs):
            whole, axis = self.value(node.inputs[0]), node.attributes.get("axis", 0)
            if [*refs] in ([(node.name, k) for k in range(len(refs))], [(node.name, k) for k in reversed(range(len(refs)))]):
                x = self("Transpose", whole, perm=[1, 0, 2]) if axis == 1 else whole
                return self.plain(x if refs[0][1] == 0 else self.flip(x, 0)).name
        if (layer := self.layer_of(refs)) is not None:
            return self.value(layer).name
        return self("Concat", *(self("Unsqueeze", self.value(ref), axes=[0]) for ref in refs), axis=0).name

    def layer_of(self, refs: Sequence[Ref]) -> Ref | None:
        """The whole output of an unrolled layer, where `refs` are its steps in order: under a reference of its own."""
        cells = [self.outputs.get(self.finder.skip(ref)) for ref in refs]
        first = cells[0]
        if first is None or self.finder.variable(first.h) is not None or first.whole:
            return None
        chain = self.chain(first)
        if [one.new_h for one in chain] != [self.finder.skip(ref) for ref in refs]:
            return None
        self.run(first)
        whole = (first.new_h[0], -1)
        self.made[whole] = self.last[first.new_h]
        return whole

    def unrolled_outputs(self, node: GraphNode) -> Ref | None:
        return self.layer_of(node.inputs)
