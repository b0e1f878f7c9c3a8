"""Recurrent cells in a TensorFlow 1 graph: anchored at their kernels, then proven by value.

A cell's part of the graph is run on random input, and the nodes that equal our equations are its new state. What computes something else
(layer normalisation, other gate activations) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders.assemble import BLOCKS, split_direction
from rnn2bin.loaders.graph import Direction
from rnn2bin.loaders.graphdef import GraphNode
from rnn2bin.loaders.tensorflow_ops import FREEZE, SAME, NotConstantError, Ref, Value, Values
from rnn2bin.spec import CELL_ACTIVATIONS, LayerSpec

if TYPE_CHECKING:
    from torch import Tensor

INNER = 64  # nodes behind a kernel among which a cell's new state is looked for
BORDER = frozenset({"NextIteration", "Exit", "TensorArrayWriteV3", "TensorArrayWriteV2", "Enter", "Merge", "Switch"})


@dataclass(frozen=True)
class Cell:
    """A recurrent cell found in the graph, by what it reads and makes in one step (or, `whole`, in all of them).

    `kernels`: the constants it multiplies by; cells of one unrolled layer share them. `options`: the LayerSpec's activation and clips.
    """

    kind: str
    name: str
    kernels: tuple[str, ...]
    direction: Direction
    x: Ref
    h: Ref
    c: Ref | None
    new_h: Ref
    new_c: Ref | None
    options: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    @property
    def sizes(self) -> tuple[Any, ...]:
        return (self.kind, self.options, self.whole, self.direction.weight_ih.shape, self.direction.weight_hh.shape)


@dataclass(frozen=True)
class Variable:
    """What a loop carries: its value before the first step, and after each."""

    before: Ref
    after: Ref


class Cells:
    """Finds the cells of a graph."""

    def __init__(self, nodes: dict[str, GraphNode]) -> None:
        self.nodes, self.values = nodes, Values(nodes)
        self.readers: dict[Ref, list[GraphNode]] = {}
        for node in nodes.values():
            for ref in node.inputs:
                self.readers.setdefault(ref, []).append(node)

    def find(self) -> Iterator[Cell]:
        blocks = {
            "LSTMBlockCell": self.lstm_block,
            "BlockLSTM": self.lstm_block,
            "BlockLSTMV2": self.lstm_block,
            "GRUBlockCell": self.gru_block,
        }
        for node in self.nodes.values():
            if node.op.startswith("CudnnRNN"):
                raise UnsupportedError(
                    f"{node.op} ({node.name}): its weights are one opaque buffer; save the network with CudnnCompatibleLSTMCell or "
                    "CudnnCompatibleGRUCell, which hold named kernels"
                )
            if node.op in ("While", "StatelessWhile", "PartitionedCall", "StatefulPartitionedCall"):
                raise UnsupportedError(
                    f"{node.op} ({node.name}): TensorFlow 2 control flow; export the network as ONNX (tf2onnx), or freeze it with "
                    "tf.compat.v1.disable_v2_behavior()"
                )
            if node.op in blocks:
                yield blocks[node.op](node)
            elif node.op == "MatMul":
                found = self.lstm(node) or self.gru(node)
                if found:
                    yield found

    def skip(self, ref: Ref) -> Ref:
        """Past what leaves a value as it is."""
        while (node := self.nodes.get(ref[0])) is not None and node.op in (*SAME, "Enter", "RefEnter"):
            ref = node.inputs[0]
        return ref

    def next(self, ref: Ref, *ops: str) -> GraphNode | None:
        """The one reader of a value that is one of these operations."""
        found = [node for node in self.readers.get(ref, []) if node.op in ops]
        return found[0] if len(found) == 1 else None

    def joined(self, ref: Ref) -> tuple[Ref, Ref] | None:
        """(x, h), where `ref` is both side by side."""
        node = self.nodes.get(self.skip(ref)[0])
        if node is None or node.op not in ("ConcatV2", "Concat") or len(node.inputs) != 3:
            return None
        x, h = node.inputs[:2] if node.op == "ConcatV2" else node.inputs[1:]
        return self.skip(x), self.skip(h)

    def product(self, node: GraphNode) -> tuple[Tensor, Tensor, Ref] | None:
        """Kernel, bias and the sum of a product with a constant matrix, where it is one."""
        kernel = self.values.constant(node.inputs[1])
        added = self.next((node.name, 0), "BiasAdd", "Add", "AddV2")
        if kernel is None or kernel.ndim != 2 or added is None or node.attributes.get("transpose_b") or node.attributes.get("transpose_a"):
            return None
        bias = next((b for b in (self.values.constant(one) for one in added.inputs) if b is not None and b.ndim == 1), None)
        return None if bias is None or len(bias) != kernel.shape[1] else (kernel, bias, (added.name, 0))

    def split(self, ref: Ref, count: int) -> GraphNode | None:
        node = self.next(ref, "Split")
        return node if node is not None and node.attributes.get("num_split") == count else None

    def other(self, node: GraphNode, ref: Ref) -> Ref:
        """The operand of a product of two that is not `ref`."""
        return node.inputs[1] if node.inputs[0] == ref else node.inputs[0]

    def lstm(self, node: GraphNode) -> Cell | None:
        """BasicLSTMCell and LSTMCell: [x, h] K + b, split into i, j (candidate), f, o; f + forget bias; with peepholes i, f, o + w·c."""
        operands, product = self.joined(node.inputs[0]), self.product(node)
        parts = self.split(product[2], 4) if product else None
        if operands is None or product is None or parts is None:
            return None
        kernel, bias, _ = product
        (x, h), hidden = operands, kernel.shape[1] // 4
        gates = [self.added((parts.name, k), hidden) for k in (0, 2, 3)]
        forget = gates[1][0]
        opened = self.next(forget, "Sigmoid")
        kept = self.next((opened.name, 0), "Mul") if opened else None
        if opened is None or kept is None or gates[0][1] or gates[2][1]:
            raise self.unknown("LSTM", node)
        c = self.skip(self.other(kept, (opened.name, 0)))
        updated = self.next((kept.name, 0), "Add", "AddV2")
        recurrent, projection, proj_clip = self.projection(h, hidden)
        direction = _lstm_direction(
            kernel, bias, kernel.shape[0] - recurrent, "ijfo", gates[1][1], projection, [peephole for _, _, peephole in gates]
        )
        clips = {"cell_clip": self.clip((updated.name, 0)) if updated else 0.0, "proj_clip": proj_clip}
        return self.proven(_kind(direction), node, direction, x, h, c, (node.inputs[1],), clips)

    def added(self, ref: Ref, hidden: int) -> tuple[Ref, float, Tensor | None]:
        """What is added to a gate's pre-activation: the sum, a number, and what multiplies the cell (H,), where there is such."""
        number, peephole = 0.0, None
        while (node := self.next(ref, "Add", "AddV2")) is not None:
            other = self.other(node, ref)
            constant, product = self.values.constant(other), self.nodes.get(self.skip(other)[0])
            if constant is not None and constant.numel() == 1:
                number += float(constant)
            elif product is not None and product.op == "Mul":
                weights = [w for w in map(self.values.constant, product.inputs) if w is not None and w.shape == (hidden,)]
                peephole = weights[0] if len(weights) == 1 and peephole is None else None
            ref = (node.name, 0)
        return ref, number, peephole

    def clip(self, ref: Ref) -> float:
        """n where a value is clipped to [−n, n] by the one node that reads it, as tf.clip_by_value writes it; else 0."""
        least = self.next(ref, "Minimum")
        most = self.next((least.name, 0), "Maximum") if least else None
        return self.clipped_by(most)[1] if most else 0.0

    def clipped_by(self, node: GraphNode) -> tuple[Ref, float]:
        """What Maximum(Minimum(value, n), −n) clips, and n; the node's own value and 0 where it is something else."""
        inner = self.nodes.get(self.skip(node.inputs[0])[0])
        if node.op != "Maximum" or inner is None or inner.op != "Minimum":
            return (node.name, 0), 0.0
        high, low = self.values.constant(inner.inputs[1]), self.values.constant(node.inputs[1])
        if high is None or low is None or high.numel() != 1 or float(low) != -float(high) or float(high) <= 0:
            return (node.name, 0), 0.0
        return self.skip(inner.inputs[0]), float(high)

    def projection(self, h: Ref, hidden: int) -> tuple[int, Tensor | None, float]:
        """The width of what a loop carries as h; the (R,H) matrix that makes it of the cell's output, where there is one; what clips it."""
        carried = self.variable(h)
        if carried is None:
            return hidden, None, 0.0
        ref, clip = self.clipped_by(self.values.node(self.before_end(carried.after)[0]))
        node = self.values.node(ref)
        matrix = self.values.constant(node.inputs[1]) if node.op == "MatMul" else None
        if matrix is None or matrix.ndim != 2 or matrix.shape[0] != hidden:
            return hidden, None, 0.0
        return matrix.shape[1], matrix.t().contiguous(), clip

    def gru(self, node: GraphNode) -> Cell | None:
        """GRUCell: σ([x, h] K + b) split into r, u; tanh([x, r⊙h] K' + b'); u⊙h + (1−u)⊙c."""
        operands, product = self.joined(node.inputs[0]), self.product(node)
        opened = self.next(product[2], "Sigmoid") if product else None
        parts = self.split((opened.name, 0), 2) if opened else None
        if operands is None or product is None or parts is None:
            return None
        (x, h), hidden = operands, product[0].shape[1] // 2
        reset = next((n for k in (0, 1) if (n := self.candidate((parts.name, k), h)) is not None), None)
        inner = self.product(reset) if reset else None
        if reset is None or inner is None or inner[0].shape != (product[0].shape[0], hidden):
            raise self.unknown("GRU", node)
        direction = _gru_direction(product[0], inner[0], product[1], inner[1], product[0].shape[0] - hidden)
        return self.proven("gru_reset_before", node, direction, x, h, None, (node.inputs[1], reset.inputs[1]))

    def candidate(self, gate: Ref, h: Ref) -> GraphNode | None:
        """The product that reads [x, gate⊙h]."""
        for multiplied in self.readers.get(gate, []):
            if multiplied.op == "Mul" and h == self.skip(self.other(multiplied, gate)):
                for joined in self.readers.get((multiplied.name, 0), []):
                    if joined.op in ("ConcatV2", "Concat"):
                        return self.next((joined.name, 0), "MatMul")
        return None

    def lstm_block(self, node: GraphNode) -> Cell:
        whole = node.op != "LSTMBlockCell"
        x, c, h, w, wci, wcf, wco, b = node.inputs[1:] if whole else node.inputs
        kernel, bias = self.values.constant(w), self.values.constant(b)
        peepholes = [self.values.constant(one) for one in (wci, wcf, wco)] if node.attributes.get("use_peephole") else []
        if kernel is None or bias is None or kernel.ndim != 2:
            raise UnsupportedError(f"{node.op} ({node.name}): its kernel is no constant of the file; {FREEZE}")
        if any(one is None for one in peepholes):
            raise UnsupportedError(f"{node.op} ({node.name}): its peepholes are no constants of the file; {FREEZE}")
        order = "ifjo" if node.op == "BlockLSTMV2" else "ijfo"
        extra = 0.0 if node.op == "BlockLSTMV2" else node.attributes.get("forget_bias", 1.0)
        direction = _lstm_direction(kernel, bias, kernel.shape[0] - kernel.shape[1] // 4, order, extra, None, peepholes)
        clip = node.attributes.get("cell_clip", 0.0 if node.op == "BlockLSTMV2" else 3.0)  # their defaults
        kernels = (self.skip(w)[0],)
        skipped = (self.skip(x), self.skip(h), self.skip(c))
        options = {"cell_clip": float(max(clip, 0.0))}
        return Cell(_kind(direction), node.name, kernels, direction, *skipped, (node.name, 6), (node.name, 1), options, whole)

    def gru_block(self, node: GraphNode) -> Cell:
        x, h, *rest = node.inputs
        found = [self.values.constant(one) for one in rest]
        gates, candidate, b, b_candidate = found
        if gates is None or candidate is None or b is None or b_candidate is None or gates.ndim != 2:
            raise UnsupportedError(f"{node.op} ({node.name}): its kernels are no constants of the file; {FREEZE}")
        direction = _gru_direction(gates, candidate, b, b_candidate, gates.shape[0] - candidate.shape[1])
        kernels = tuple(self.skip(one)[0] for one in rest[:2])
        return Cell("gru_reset_before", node.name, kernels, direction, self.skip(x), self.skip(h), None, (node.name, 3), None)

    def variable(self, ref: Ref) -> Variable | None:
        """The loop variable whose value within a step (or, of an Exit, behind the last) `ref` is."""
        node = self.nodes.get(self.skip(ref)[0])
        merge = self.nodes.get(node.inputs[0][0]) if node is not None and node.op == "Switch" else None
        if merge is None or merge.op != "Merge" or len(merge.inputs) != 2:
            return None
        enter, again = (self.nodes.get(one[0]) for one in merge.inputs)
        if enter is None or again is None or enter.op != "Enter" or again.op != "NextIteration":
            return None
        return Variable(self.skip(enter.inputs[0]), again.inputs[0])

    def counts(self, ref: Ref) -> bool:
        """Whether a value is the number of the step."""
        found = self.variable(ref)
        first = self.values.constant(found.before) if found else None
        step = self.values.node(found.after) if found else None
        return (
            first is not None
            and step is not None
            and int(first) == 0
            and step.op in ("Add", "AddV2")
            and self.variable(step.inputs[0]) == found
        )

    def before_end(self, ref: Ref) -> tuple[Ref, Ref | None]:
        """Of what a step makes where the sequence has not ended, and zeros or the old state behind: the former, and the lengths."""
        ref = self.skip(ref)
        node = self.values.node(ref)
        if node.op not in ("Select", "SelectV2"):
            return ref, None
        ended = self.values.node(self.skip(node.inputs[0]))
        if ended.op != "GreaterEqual" or not self.counts(ended.inputs[0]):
            return ref, None
        return self.skip(node.inputs[2]), self.skip(ended.inputs[1])

    def behind(self, node: GraphNode) -> list[str]:
        """The nodes that a product leads to within its step, nearest first."""
        found, front = [node.name], [node]
        while front and len(found) < INNER:
            following = []
            for one in front:
                for k in range(4):
                    following += [r for r in self.readers.get((one.name, k), []) if r.name not in found and r.op not in BORDER]
            front = list({r.name: r for r in following}.values())
            found += [r.name for r in front]
        return found

    def proven(
        self,
        kind: str,
        node: GraphNode,
        direction: Direction,
        x: Ref,
        h: Ref,
        c: Ref | None,
        kernels: tuple[Ref, ...],
        clips: dict[str, float] | None = None,
    ) -> Cell:
        """The cell, with the nodes whose values equal its new state on random input."""
        import torch

        generator, clips = torch.Generator().manual_seed(0), clips or {}
        rows, columns = direction.weight_hh.shape
        hidden = rows // len(BLOCKS[kind])
        draw = lambda size: torch.randn(4, size, generator=generator)
        inputs = {x: draw(direction.weight_ih.shape[1]), h: draw(columns)}
        if c is not None:
            most = max(100.0, 10 * clips["cell_clip"])
            inputs[c] = draw(hidden) * torch.tensor([0.3, 1.0, 1.0, most])[:, None]  # a cell that is clipped shows it
        values = Values(self.nodes, {ref: Value(constant=t) for ref, t in inputs.items()})
        here = [found for name in self.behind(node) if (found := _constant_of(values, (name, 0))) is not None]
        for activation in CELL_ACTIVATIONS:
            options = {"activation": activation, **clips}
            wanted = _step(kind, direction, inputs[x], (inputs[h], *([inputs[c]] if c else [])), options)
            states = [next((ref for ref, t in here if _equal(t, want)), None) for want in wanted]
            if all(states):
                new_h, new_c = [*states, None][:2]
                assert new_h is not None
                return Cell(kind, node.name, tuple(self.skip(k)[0] for k in kernels), direction, x, h, c, new_h, new_c, options)
        raise self.unknown("LSTM" if c else "GRU", node)

    def unknown(self, kind: str, node: GraphNode) -> UnsupportedError:
        return UnsupportedError(
            f"{node.name}: looks like an {kind} cell, but does not compute what TensorFlow's {kind} cells compute; "
            "layer normalisation, other gate activations and the like are not converted"
        )


def _constant_of(values: Values, ref: Ref) -> tuple[Ref, Tensor] | None:
    try:
        found = values.value(ref).constant
    except (NotConstantError, UnsupportedError):
        return None
    return None if found is None else (ref, found)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    import torch

    return found.shape == wanted.shape and found.is_floating_point() and torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def _step(kind: str, d: Direction, x: Tensor, state: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """One step of the oracle with float gates: the new h, and an LSTM's new c."""
    import torch

    from rnn2bin.cells import network
    from rnn2bin.gates.estimators import FLOAT

    projected = 0 if d.projection is None else len(d.projection)
    layer = LayerSpec(kind, d.weight_ih.shape[1], len(d.weight_hh) // len(BLOCKS[kind]), proj_size=projected, **options)
    cell, parts = network.Cell(layer), split_direction(kind, d.weight_ih, d.weight_hh, d.bias_ih, d.bias_hh)
    more = {"projection.weight": d.projection, "gates.peephole": d.peephole}
    cell.load_state_dict(parts | {name: values for name, values in more.items() if values is not None})
    with torch.no_grad():
        return network.STEPS[kind](x, state, cell.weights(), cell.gate(FLOAT))[0]


def _kind(direction: Direction) -> str:
    return "lstm" if direction.peephole is None else "lstm_peephole"


def _lstm_direction(
    kernel: Tensor, bias: Tensor, width: int, order: str, extra: float, projection: Tensor | None, peepholes: Sequence[Tensor | None]
) -> Direction:
    """Kernel (I+R,4H) with blocks in `order` of i, j (the candidate), f, o -> PyTorch's i, f, g, o; the forget bias added. `peepholes`: of
    i, f, o."""
    import torch

    if width <= 0 or kernel.shape[1] % 4:
        raise UnsupportedError(f"an LSTM kernel of shape {tuple(kernel.shape)}")
    blocks = dict(zip(order, kernel.t().chunk(4), strict=True))
    biases = dict(zip(order, bias.chunk(4), strict=True))
    biases["f"] = biases["f"] + extra
    weight, bias = torch.cat([blocks[g] for g in "ifjo"]), torch.cat([biases[g] for g in "ifjo"])
    given = [one for one in peepholes if one is not None]
    peephole = torch.cat(given) if len(given) == 3 and any(bool(one.any()) for one in given) else None
    return Direction(weight[:, :width], weight[:, width:], bias, torch.zeros_like(bias), projection, peephole)


def _gru_direction(gates: Tensor, candidate: Tensor, bias: Tensor, bias_candidate: Tensor, width: int) -> Direction:
    """Kernels (I+H,2H) = [r, u] and (I+H,H) -> PyTorch's r, z, n; u keeps, as z does."""
    import torch

    if width <= 0:
        raise UnsupportedError(f"GRU kernels of shapes {tuple(gates.shape)} and {tuple(candidate.shape)}")
    weight, bias = torch.cat([gates.t(), candidate.t()]), torch.cat([bias, bias_candidate])
    return Direction(weight[:, :width], weight[:, width:], bias, torch.zeros_like(bias))
