"""The states that are carried from one window to the next, as tensors of a checkpoint and as parts of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnn2bin.cells.network import Output, State
from rnn2bin.spec import LayerSpec


def detached(output: Output) -> State:
    return [[tuple(t.detach() for t in direction) for direction in layer] for layer in output.state]


def flattened(carried: tuple[State | None, State | None]) -> dict[str, Tensor]:
    return {
        f"{who}.{layer}.{direction}.{k}": tensor.contiguous()
        for who, state in zip(("teacher", "student"), carried, strict=True)
        for layer, directions in enumerate(state or [])
        for direction, states in enumerate(directions)
        for k, tensor in enumerate(states)
    }


def joined(carried: list[tuple[State | None, State | None]]) -> tuple[State | None, State | None]:
    """The states of all processes' rows, in their order."""
    if len(carried) == 1:
        return carried[0]

    def of(states: list[Any]) -> State | None:
        if states[0] is None:
            return None
        return [
            [tuple(torch.cat(parts) for parts in zip(*one, strict=True)) for one in zip(*layer, strict=True)]
            for layer in zip(*states, strict=True)
        ]

    return of([one[0] for one in carried]), of([one[1] for one in carried])


def unflattened(
    tensors: dict[str, Tensor], teacher: tuple[LayerSpec, ...], student: tuple[LayerSpec, ...]
) -> tuple[State | None, State | None]:
    def of(who: str, layers: tuple[LayerSpec, ...]) -> State | None:
        if not any(name.startswith(who) for name in tensors):
            return None
        return [
            [tuple(tensors[f"{who}.{i}.{d}.{k}"] for k in range(len(layer.kind.states))) for d in range(layer.directions)]
            for i, layer in enumerate(layers)
        ]

    return of("teacher", teacher), of("student", student)
