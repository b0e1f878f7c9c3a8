"""What an ONNX file is before it is run: one that no reading of its input helps with, and one that ends in a choice instead of scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from rnn2bin.loaders.onnx_proto import STANDARD, Graph, Operation

LAYERS = ("LSTM", "GRU", "RNN")
CONTROL = ("Loop", "Scan")  # layers may stand within them: those are refused by name
QUANTISED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QAttention"),
)
PASSING = ("Cast", "Squeeze", "Transpose", "Identity")  # what may stand behind a choice


def never_read(graph: Graph) -> str | None:
    """Why no layer of the file can be recognised, where that is plain from its operations; None where it may be."""
    counts = Counter(node.op for node in _nodes(graph))
    if found := [op for op in QUANTISED if counts[op]]:
        return f"its weights are quantised ({', '.join(found)}): convert the float file that it was made from"
    if any(counts[op] for op in (*LAYERS, *CONTROL)):
        return None
    if counts["Sigmoid"] > 1 and counts["Tanh"] > 1:
        return (
            f"no LSTM or GRU operation, but {counts['Sigmoid']} Sigmoid and {counts['Tanh']} Tanh: its exporter took the cells apart, "
            "which is not recognised; export it with nn.LSTM or nn.GRU over the whole sequence, or give its state dict"
        )
    return None


def _nodes(graph: Graph) -> Iterator[Operation]:
    for node in graph.nodes:
        yield node
        for value in node.attributes.values():
            if isinstance(value, Graph):
                yield from _nodes(value)


def scores(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph whose outputs are what an ArgMax at its end chooses from, and a line for each: an index has no gradient and no distance."""
    made = {name: node for node in graph.nodes for name in node.outputs}
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    passed: dict[int, Operation] = {}
    notes = []
    for output in graph.outputs:
        chain = _choice(output, made, readers)
        if chain:
            passed |= {id(node): _passing(node, chain[-1]) for node in chain}
            notes.append(f"file: its output {output} is the place of the largest value (ArgMax); here the values themselves")
    return replace(graph, nodes=tuple(passed.get(id(node), node) for node in graph.nodes)), notes


def _passing(node: Operation, choice: Operation) -> Operation:
    """What the node does to the scores, which have an axis behind that the places do not have, unless `choice` keeps it."""
    if node.op == "Transpose":
        perm = list(node.attributes["perm"])
        return node if choice.attributes.get("keepdims", 1) else replace(node, attributes={"perm": [*perm, len(perm)]})
    return replace(node, op="Identity", inputs=node.inputs[:1], attributes={})


def _fits(node: Operation, choice: Operation) -> bool:
    """Whether a Transpose behind the choice can be said of the scores."""
    perm = node.attributes.get("perm")
    if not isinstance(perm, list | tuple):
        return False
    return bool(choice.attributes.get("keepdims", 1)) or choice.attributes.get("axis", 0) in (-1, len(perm))


def _choice(output: str, made: dict[str, Operation], readers: Counter[str]) -> list[Operation]:
    """The nodes from an output back to the ArgMax that nothing else reads; none where there is no such ArgMax."""
    chain: list[Operation] = []
    name = output
    while (node := made.get(name)) is not None and node.domain in STANDARD and readers[name] == bool(chain):
        chain.append(node)
        if node.op == "ArgMax":
            return chain if all(_fits(one, node) for one in chain if one.op == "Transpose") else []
        if node.op not in PASSING:
            break
        name = node.inputs[0]
    return []
