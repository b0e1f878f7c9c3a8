"""Units that share rows of gates: a gate's weights are a few rows; a unit reads one of them, times a scale, against its own thresholds.

A bit is the sign of a product, which many units can agree on up to sign and threshold. So the rows of a teacher's gate are put in clusters
by direction (k-means on lines through 0). Training goes on from there with rows, scales and thresholds; who reads which stays as it is.
docs/decisions/032-shared-rows.md has what it gains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rnn2bin.errors import RecipeError
from rnn2bin.spec import MOST_ROWS, LayerSpec, RnnSpec, SectionSpec

UNITS, LEAST_ROWS = 8, 16  # by itself: so many units a row, and so many rows a gate at least
ROUNDS = 30
SEED = 0  # of the clusters' first centres


def with_shared_rows(spec: RnnSpec, share: int | Literal["auto"]) -> RnnSpec:
    """The same network with `LayerSpec.shared` where its cells can. Raises RecipeError where a number is given and none can."""

    def layers(section: SectionSpec) -> tuple[LayerSpec, ...]:
        units = [units_of(layer, share) for layer in section.layers]
        return tuple(
            replace(layer, shared=n, shared_inputs=1 if index in section.token_layers else n)
            for index, (layer, n) in enumerate(zip(section.layers, units, strict=True))
        )

    shared = replace(spec, sections={name: replace(section, layers=layers(section)) for name, section in spec.sections.items()})
    if share not in (1, "auto") and shared == spec:
        cells = ", ".join(dict.fromkeys(layer.cell for _, layer in spec.cell_names()))
        raise RecipeError(f"gates.share: no units of this network ({cells}) can share rows of gates; leave it out")
    return shared


def units_of(layer: LayerSpec, share: int | Literal["auto"]) -> int:
    """How many units of a layer share a row."""
    if share == 1 or not layer.kind.may_share:
        return 1
    wanted = min(UNITS, layer.hidden_size // LEAST_ROWS) if share == "auto" else min(share, layer.hidden_size)
    return max(wanted, -(-layer.hidden_size // MOST_ROWS), 1)


@torch.no_grad()
def shared_rows(state: dict[str, Tensor], name: str, layer: LayerSpec) -> dict[str, Tensor]:
    """A layer's gates `name` with a row for every unit -> with those that its spec shares."""
    hidden, count = layer.hidden_size, layer.gate_rows(layer.shared)
    parts = ["weight_hh", *(["weight_ih"] if layer.shared_inputs > 1 else [])]
    rows = torch.cat([state[f"{name}.{part}"] for part in parts], 1)
    found = [lines(rows[at : at + hidden], count) for at in range(0, len(rows), hidden)]
    centres, row, scale = (torch.cat(one) for one in zip(*found, strict=True))
    widths = [state[f"{name}.{part}"].shape[1] for part in parts]
    shared = {f"{name}.{part}": piece.contiguous() for part, piece in zip(parts, centres.split(widths, 1), strict=True)}
    return shared | {f"{name}.row": row, f"{name}.scale": scale}


def lines(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows (H,C) -> centres (count,C), which of them each row is nearest to as a line (H,), and what times its centre has the row's own
    length (H,). Rows that are zero are dealt out in order, scale 1: a gate that is new has no direction yet."""
    generator = torch.Generator().manual_seed(SEED)
    zero = rows.norm(dim=1) == 0
    dealt = torch.arange(len(rows), device=rows.device) * count // len(rows)
    unit = normalize(rows, dim=1)
    centres = unit[torch.randperm(len(rows), generator=generator).to(rows.device)[:count]]
    for _ in range(ROUNDS):
        cosine = unit @ centres.t()
        nearest = torch.where(zero, dealt, cosine.abs().argmax(1))
        sides = cosine.gather(1, nearest[:, None]).sign() * unit
        total = torch.zeros_like(centres).index_add_(0, nearest, sides)
        centres = normalize(torch.where(total.norm(dim=1, keepdim=True) > 0, total, centres), dim=1)
    cosine = unit @ centres.t()
    nearest = torch.where(zero, dealt, cosine.abs().argmax(1))
    length = rows.norm(dim=1)
    weight = torch.zeros(count, device=rows.device).index_add_(0, nearest, length)
    members = torch.zeros(count, device=rows.device).index_add_(0, nearest, torch.ones_like(length))
    mean = weight / members.clamp_min(1)
    centres = centres * mean[:, None]
    sign = torch.where(cosine.gather(1, nearest[:, None])[:, 0] < 0, -1.0, 1.0)
    scale = torch.where(zero, torch.ones_like(length), sign * length / mean[nearest].clamp_min(1e-12))
    return centres, nearest.to(rows.dtype), scale
