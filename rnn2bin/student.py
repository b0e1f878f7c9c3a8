"""Teacher -> student: the same network with binary gates, started from the teacher's weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rnn2bin.cells.network import Network
from rnn2bin.errors import RecipeError
from rnn2bin.recipe import Gates
from rnn2bin.spec import DIRECTIONS, LayerSpec, RnnSpec


def plan(spec: RnnSpec, gates: Gates) -> dict[str, tuple[bool, ...]]:
    """Cell prefix -> which of its gates are decisions. `gates.soft` names the others: `o`, or `main.layers.0.o` for one layer.

    Raises RecipeError for a name that fits no gate of this network.
    """
    used: set[str] = set()
    result = {}
    for prefix, layer in spec.cell_names():
        names = {gate: {gate, f"{prefix}.{gate}", f"{prefix.rpartition('.')[0]}.{gate}"} for gate in layer.kind.gate_names}
        result[prefix] = tuple(not names[gate] & set(gates.soft) for gate in names)
        used |= {n for gate in names for n in names[gate]}
    unknown = [name for name in gates.soft if name not in used]
    if unknown:
        raise RecipeError(*(f"gates.soft: {name!r} is no gate of this network; its gates: {_gate_list(spec)}" for name in unknown))
    if not any(any(b) for b in result.values()):
        raise RecipeError("gates.soft: every gate of this network is left soft; there is nothing to make binary")
    return result


def _gate_list(spec: RnnSpec) -> str:
    return ", ".join(f"{prefix.rpartition('.')[0]}.{gate}" for prefix, layer in spec.cell_names() for gate in layer.kind.gate_names)


def student(teacher: Network, gates: Gates) -> Network:
    """A trainable copy of the teacher whose gates are binary by `gates`; levels start strict, so that soft gates at temperature and slope 1
    compute exactly the teacher. With `gates.copies` every unit stands there several times."""
    wide = widened_spec(teacher.spec, gates.copies)
    binary = {prefix: bits for (prefix, _), bits in zip(wide.cell_names(), plan(teacher.spec, gates).values(), strict=True)}
    network = Network(wide, binary, levels=gates.levels).to(next(teacher.parameters()).device)
    missing, unexpected = network.load_state_dict(widened_weights(teacher, gates.copies), strict=False)
    assert not unexpected, unexpected
    assert all(".levels." in name for name in missing), missing
    return network


def widened_spec(spec: RnnSpec, copies: int) -> RnnSpec:
    """The same network with each recurrent unit `copies` times; a projection's output stays as wide as it is."""
    sections = {}
    for name, section in spec.sections.items():
        layers: list[LayerSpec] = []
        for layer in section.layers:
            width = layers[-1].output_size if layers else layer.input_size
            layers.append(replace(layer, hidden_size=layer.hidden_size * copies, input_size=width))
        head = section.head
        if head:
            read = head[0].in_features // section.layers[-1].output_size * layers[-1].output_size
            head = (replace(head[0], in_features=read), *head[1:])
        sections[name] = replace(section, layers=tuple(layers), head=head)
    return replace(spec, sections=sections)


def widened_weights(teacher: Network, copies: int) -> dict[str, Tensor]:
    """The teacher's weights for `widened_spec`: what a unit reads is copied, what reads it is shared out equally, so that the
    function stays what it was (Chen et al. 2016, Net2Net, arXiv 1511.05641). Copies lie side by side: unit j of copy k at k·H + j."""
    state = dict(teacher.state_dict())
    if copies == 1:
        return state
    for name, section in teacher.spec.sections.items():
        below: LayerSpec | None = None
        for index, layer in enumerate(section.layers):
            for direction in DIRECTIONS[: layer.directions]:
                cell = f"{name}.layers.{index}.{direction}"
                _widen_cell(state, cell, layer, below, copies)
            below = layer
        first = f"{name}.head.0.weight"
        if first in state and below is not None:
            state[first] = _share(state[first], below.directions, 1 if below.proj_size else copies)
    return state


def _widen_cell(state: dict[str, Tensor], cell: str, layer: LayerSpec, below: LayerSpec | None, copies: int) -> None:
    """The tensors of one direction of one layer, in place; `below` is the layer it reads."""
    for leaf in layer.tensors():
        tensor = state[f"{cell}.{leaf}"]
        if leaf == "projection.weight":
            state[f"{cell}.{leaf}"] = _share(tensor, 1, copies)
            continue
        if leaf.endswith("weight_hh") and not layer.proj_size:
            tensor = _share(tensor, 1, copies)
        if leaf.endswith("weight_ih") and below is not None and not below.proj_size:
            tensor = _share(tensor, below.directions, copies)
        blocks = len(layer.kind.gates) if leaf.startswith("gates.") else 1
        state[f"{cell}.{leaf}"] = torch.cat([block.repeat(copies, *[1] * (block.ndim - 1)) for block in tensor.chunk(blocks)])


def _share(weight: Tensor, groups: int, copies: int) -> Tensor:
    """Columns (R, groups·H) -> (R, groups·copies·H): each group of columns stands `copies` times, divided by `copies`."""
    columns = weight.unflatten(1, (groups, 1, -1)).expand(-1, -1, copies, -1) / copies
    return columns.flatten(1)


def folded(hidden: Tensor, layer: LayerSpec, copies: int) -> Tensor:
    """A student layer's output (…,D·R) -> the mean over copies, as wide as the teacher's. `layer` is the teacher's."""
    if copies == 1 or layer.proj_size:
        return hidden
    return hidden.unflatten(-1, (layer.directions, copies, layer.hidden_size)).mean(-2).flatten(-2)


@torch.no_grad()
def level_summary(network: Network) -> dict[str, list[dict[str, list[float]] | None]]:
    """Cell prefix -> for each gate the 10/50/90% quantiles of its levels, None where it is soft."""
    quantiles = torch.tensor([0.1, 0.5, 0.9])

    def of(levels: Tensor) -> list[float]:
        return [round(float(q), 4) for q in levels.cpu().quantile(quantiles)]

    result = {}
    for prefix, cell in network.cells().items():
        lo, hi = cell.level_values()
        result[prefix] = [{"lo": of(lo[k]), "hi": of(hi[k])} if binary else None for k, binary in enumerate(cell.binary)]
    return result
