"""Layers of a graph that read tokens through nothing but their embedding: such a layer gets the tokens themselves, so that weights times
embedding is a table, and a step reads none of its input matrix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from rnn2bin.graph_paths import axes_after, way_back
from rnn2bin.spec import GraphSpec, Node, SectionSpec


def with_token_layers(section: SectionSpec) -> SectionSpec:
    """The section, its layers that read the rows of `input` (T,B,E) as they are, or with masked steps left out, reading tokens (T,B)."""
    graph = section.graph
    if graph is None or section.embedding is None or len(names := [name for n in graph.nodes for name in n.outputs]) > len(set(names)):
        return section
    ways = {node.attributes["layer"]: _way(graph, node.inputs[0]) for node in graph.nodes if node.op == "Recurrent"}
    found = {layer: way for layer, way in ways.items() if way is not None}
    for layer, way in found.items():
        graph = _by_tokens(graph, layer, way)
    return replace(section, graph=replace(graph, token_layers=tuple(found)))


def needed(nodes: Sequence[Node], output: str) -> tuple[Node, ...]:
    """The nodes that lead to `output`, in their order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def _way(graph: GraphSpec, name: str) -> list[Node] | None:
    """The nodes between `input` and a value that is nothing but its rows, time first; None where it is something else."""
    source, way = way_back(graph, name)
    if source != "input":
        return None
    return way if axes_after(way, "BTE" if graph.batch_first else "TBE") == "TBE" else None


def _by_tokens(graph: GraphSpec, layer: int, way: Sequence[Node]) -> GraphSpec:
    """The graph with tokens on the way to `layer`; rows too where others read them."""
    taken = {name for node in graph.nodes for name in node.outputs} | graph.tensors.keys()
    mirror = {"input": "tokens"}
    for node in way:
        tried = (f"{node.outputs[0]}_tokens{k or ''}" for k in itertools.count())
        mirror[node.outputs[0]] = next(name for name in tried if name not in taken)
    reads = next(node for node in graph.nodes if node.op == "Recurrent" and node.attributes["layer"] == layer)
    shared = _shared(graph, way, reads)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node is reads:
            node = replace(node, inputs=(mirror[node.inputs[0]], *node.inputs[1:]))
        elif node in way:
            # What `Compact` says of the mask is the same of both: one of them says it.
            rest = [f"{mirror[node.outputs[0]]}_{k}" for k in range(1, len(node.outputs))] if node in shared else node.outputs[1:]
            attributes = {"perm": node.attributes["perm"][:-1]} if node.op == "Transpose" else node.attributes
            outputs = (mirror[node.outputs[0]], *rest)
            nodes.append(replace(node, inputs=(mirror[node.inputs[0]], *node.inputs[1:]), outputs=outputs, attributes=attributes))
            if node not in shared:
                continue
        nodes.append(node)
    return replace(graph, nodes=needed(nodes, graph.output))


def _shared(graph: GraphSpec, way: Sequence[Node], reads: Node) -> list[Node]:
    """Nodes on the way whose rows others read than what leads to `reads` alone."""
    alone: list[Node] = [reads]
    shared: list[Node] = []
    for node in reversed(way):
        others = any(node.outputs[0] in one.inputs and one not in alone for one in graph.nodes) or node.outputs[0] == graph.output
        (shared if others else alone).append(node)
    return shared
