"""What stands between two places of a graph where it does nothing but move whole rows about."""

from __future__ import annotations

from collections.abc import Sequence

from rnn2bin.spec import GraphSpec, Node

ALONG = ("Identity", "Dropout", "Transpose", "Compact")  # move whole rows about, so what is a row's may move instead
IN_PLACE = ("Identity", "Dropout", "Transpose")  # leave every row its step, once transpositions cancel


def way_back(graph: GraphSpec, name: str, *, through: Sequence[str] = ALONG) -> tuple[str, list[Node]]:
    """The value that `name` is made of by `through` alone, and the nodes between the two, in their order."""
    made = {out: node for node in graph.nodes for out in node.outputs}
    way: list[Node] = []
    while (node := made.get(name)) is not None and node.op in through and node.outputs[0] == name:
        way.insert(0, node)
        name = node.inputs[0]
    return name, way


def axes_after(way: Sequence[Node], axes: str) -> str | None:
    """Where axes such as "BTE" stand behind these nodes; None where rows, the last axis, would be taken apart."""
    for perm in (node.attributes.get("perm") or [2, 1, 0] for node in way if node.op == "Transpose"):  # none given: all reversed
        if perm[-1] != 2:
            return None
        axes = "".join(axes[at] for at in perm)
    return axes


def layers_below(graph: GraphSpec) -> dict[int, int]:
    """Layer -> the layer whose output it reads, step by step and as it is."""
    outputs = {node.outputs[0]: node.attributes["layer"] for node in graph.nodes if node.op == "Recurrent"}
    found = {}
    for node in graph.nodes:
        if node.op == "Recurrent":
            source, way = way_back(graph, node.inputs[0], through=IN_PLACE)
            if source in outputs and axes_after(way, "TBE") == "TBE":
                found[node.attributes["layer"]] = outputs[source]
    return found
