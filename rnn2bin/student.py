"""Teacher -> student: the same network with binary gates, started from the teacher's weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rnn2bin.cells.network import Network
from rnn2bin.errors import RecipeError
from rnn2bin.recipe import Gates
from rnn2bin.spec import RnnSpec

COPIES = 4  # docs/decisions/006-copies.md


def plan(spec: RnnSpec, gates: Gates) -> dict[str, tuple[bool, ...]]:
    """Cell prefix -> which of its gates are decisions. `gates.soft` names the others: `o`, or `main.layers.0.o` for one layer.

    Raises RecipeError for a name that fits no gate of this network.
    """
    used: set[str] = set()
    result = {}
    for prefix, layer in spec.cell_names():
        places = ("", f"{prefix}.", f"{prefix.rpartition('.')[0]}.")
        names = {gate.name: {f"{place}{name}" for place in places for name in (gate.name, gate.letter)} for gate in layer.kind.gates}
        result[prefix] = tuple(not names[gate] & set(gates.soft) for gate in names)
        used |= {n for gate in names for n in names[gate]}
    unknown = [name for name in gates.soft if name not in used]
    if unknown:
        raise RecipeError(*(f"gates.soft: {name!r} is no gate of this network; its gates: {_gate_list(spec)}" for name in unknown))
    if not any(result.values()):
        cells = ", ".join(dict.fromkeys(layer.cell for _, layer in spec.cell_names()))
        raise RecipeError(f"its layers ({cells}) have no gates: there is nothing to make binary")
    if not any(any(b) for b in result.values()):
        raise RecipeError("gates.soft: every gate of this network is left soft; there is nothing to make binary")
    return result


def _gate_list(spec: RnnSpec) -> str:
    return ", ".join(f"{prefix.rpartition('.')[0]}.{gate}" for prefix, layer in spec.cell_names() for gate in layer.kind.gate_names)


def student(teacher: Network, gates: Gates, *, weights: str = "fp16") -> Network:
    """A trainable copy of the teacher whose gates are binary by `gates`; levels start strict, so that soft gates at temperature and slope 1
    compute exactly the teacher, with any number of copies (with `weights: int8` but for their rounding)."""
    spec = with_copies(teacher.spec, copies_of(gates))
    network = Network(spec, plan(teacher.spec, gates), levels=gates.levels).to(next(teacher.parameters()).device)
    state = dict(teacher.state_dict())
    for prefix, layer in spec.cell_names():
        if layer.kind.unit_gates:
            bias = state[f"{prefix}.gates.bias"].view(-1, 1, layer.hidden_size)
            state[f"{prefix}.gates.bias"] = bias.repeat(1, layer.copies, 1).flatten()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(".levels." in name for name in missing), missing
    if weights == "int8":
        network.round_weights()
    return network


def copies_of(gates: Gates) -> int:
    """How many decisions a unit takes for each gate."""
    if gates.copies == "auto":
        return 1 if gates.levels == "strict" else COPIES
    return gates.copies


def with_copies(spec: RnnSpec, copies: int) -> RnnSpec:
    """The same network, each unit with that many decisions for each gate."""
    layers = lambda section: tuple(replace(layer, copies=copies) if layer.kind.unit_gates else layer for layer in section.layers)
    return replace(spec, sections={name: replace(section, layers=layers(section)) for name, section in spec.sections.items()})


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
