"""Teacher -> student: the same network with binary gates, started from the teacher's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rnn2bin import sharing
from rnn2bin.cells.network import Network
from rnn2bin.errors import RecipeError
from rnn2bin.recipe import Gates, Recipe
from rnn2bin.spec import LayerSpec, RnnSpec, SectionSpec

OUTPUT_BIAS = 2.0  # of a new output gate: open at first, whatever its unit sees, and not so far from its threshold that it stays so


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


def of_recipe(teacher: Network, recipe: Recipe, *, task: str | None = None) -> Network:
    """The student that a recipe starts with; `task`: its name, where the recipe leaves that to the data."""
    weights, output, share = recipe.pack.weights, recipe.output_gate, recipe.share(task or recipe.task)
    return student(teacher, recipe.gates, priced=recipe.budget.counts, weights=weights, output=output, share=share)


def student(
    teacher: Network,
    gates: Gates,
    *,
    priced: bool = False,
    weights: str = "fp16",
    output: bool = False,
    share: int | Literal["auto"] = 1,
) -> Network:
    """A trainable copy of the teacher whose gates are binary by `gates`; levels start strict, so that soft gates at temperature and slope 1
    compute exactly the teacher, with any number of copies (with `weights: int8` but for their rounding).

    `priced`: weights have a price, which `gates.copies: auto` goes by. `output` gives GRUs an output gate that is open: as bits, and as
    nothing else, they compute the same as without. Where units `share` rows of gates, these are the nearest few to the teacher's, and the
    student is another network from the start."""
    spec = with_copies(with_outputs(teacher.spec) if output else teacher.spec, gates.decisions(priced=priced))
    spec = sharing.with_shared_rows(spec, share)
    network = Network(spec, plan(spec, gates), levels=gates.levels).to(next(teacher.parameters()).device)
    state = dict(teacher.state_dict())
    for (prefix, layer), (_, given) in zip(spec.cell_names(), teacher.spec.cell_names(), strict=True):
        if layer.cell != given.cell:
            state |= with_open_output(state, f"{prefix}.gates", layer.hidden_size)
        if layer.kind.unit_gates:
            bias = state[f"{prefix}.gates.bias"].view(-1, 1, layer.hidden_size)
            state[f"{prefix}.gates.bias"] = bias.repeat(1, layer.copies, 1).flatten()
        if layer.shared > 1:
            state |= sharing.shared_rows(state, f"{prefix}.gates", layer)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(".levels." in name for name in missing), missing
    if weights == "int8":
        network.round_weights()
    return network


def with_open_output(state: dict[str, Tensor], name: str, hidden_size: int) -> dict[str, Tensor]:
    """A GRU's gate rows with those of an output gate behind them."""
    found = {}
    for part, start in (("weight_ih", 0.0), ("weight_hh", 0.0), ("bias", OUTPUT_BIAS)):
        rows = state[f"{name}.{part}"]
        found[f"{name}.{part}"] = torch.cat([rows, rows.new_full((hidden_size, *rows.shape[1:]), start)])
    return found


def with_copies(spec: RnnSpec, copies: int) -> RnnSpec:
    """The same network, each unit with that many decisions for each gate."""
    layers = lambda section: tuple(replace(layer, copies=copies) if layer.kind.unit_gates else layer for layer in section.layers)
    return replace(spec, sections={name: replace(section, layers=layers(section)) for name, section in spec.sections.items()})


def with_outputs(spec: RnnSpec) -> RnnSpec:
    """The same network with an output gate for every GRU whose state no graph makes or reads: what a unit keeps and what it shows are two
    things then."""

    def cells(section: SectionSpec) -> tuple[LayerSpec, ...]:
        exposed = {
            node.attributes["layer"]
            for node in (section.graph.nodes if section.graph else ())
            if node.op == "Recurrent" and (any(node.inputs[1:3]) or any(node.outputs[1:]))
        }
        return tuple(
            replace(layer, cell="gru_output") if layer.cell == "gru" and index not in exposed else layer
            for index, layer in enumerate(section.layers)
        )

    return replace(spec, sections={name: replace(section, layers=cells(section)) for name, section in spec.sections.items()})


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
