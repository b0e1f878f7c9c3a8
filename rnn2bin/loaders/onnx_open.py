"""What an ONNX file leaves open, and what tells it: the numbers that it compares an input with, the widths of a step that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rnn2bin.loaders.onnx_proto import Graph, Operation
from rnn2bin.loaders.onnx_trace import MOVES, Tracer, Value

WIDEST = 4096  # of the widths tried
GROWTH = 1.25  # from one width tried to the next
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")

Windows = tuple[tuple[int, ...], ...]  # the shapes that convolutions and pools gave


@dataclass
class WindowTracer(Tracer):
    """A tracer that keeps the shapes that convolutions and pools give."""

    windows: list[tuple[int, ...]] = field(default_factory=list)

    def apply(self, op: str, *args: Any, **options: Any) -> list[Value]:
        made = super().apply(op, *args, **options)
        if op.endswith(("Conv", "Pool")):
            self.windows.append(tuple(made[0].data[0].shape))
        return made


@dataclass(frozen=True)
class Widths:
    """The widths of a step on which a file runs: `least` to `most`, and `fitting`, the least that its convolutions read as often as the
    most: one less is a window fewer, and what is more stands in no whole window."""

    least: int
    most: int
    fitting: int

    @property
    def only(self) -> bool:
        return self.least == self.most


def widths(run: Callable[[int], Windows | None], sizes: Iterable[int]) -> Widths | None:
    """What widths fit; None where those tried tell no range (none runs, or all above one do, or those that run are no neighbours), or no
    window says which of it. `run`: the windows at a width, None where it does not run. `sizes`: widths to try besides, as of tensors."""
    tried = sorted(set(_scale()) | {n for n in sizes if 1 <= n <= WIDEST})
    hits = [width for width in tried if run(width) is not None]
    if not hits or hits[-1] == tried[-1] or hits != [width for width in tried if hits[0] <= width <= hits[-1]]:
        return None
    below = max((width for width in tried if width < hits[0]), default=0)
    above = min(width for width in tried if width > hits[-1])
    least = _turn(below, hits[0], lambda width: run(width) is not None)
    most = _turn(hits[-1], above, lambda width: run(width) is None) - 1
    if least == most:
        return Widths(least, most, most)
    windows = run(most)
    if not windows:
        return None
    fitting = _turn(least - 1, most, lambda width: (run(width) or [None])[0] == windows[0])
    return Widths(least, most, fitting)


def _scale() -> Iterator[int]:
    width = 1.0
    while width <= WIDEST:
        yield int(width)
        width = max(width * GROWTH, width + 1)


def _turn(below: int, at: int, holds: Callable[[int], bool]) -> int:
    """The least width in (below, at] from which on a property holds; at `at` it does."""
    while at - below > 1:
        middle = (below + at) // 2
        below, at = (below, middle) if holds(middle) else (middle, at)
    return at


def compared(graph: Graph, name: str) -> list[int]:
    """The whole numbers that an input is compared with."""
    same, found = {name}, []
    constants = {key: tensor for key, tensor in graph.tensors.items() if tensor.numel() == 1}
    for node in graph.nodes:
        if node.op in MOVES and node.inputs[:1] and node.inputs[0] in same:
            same |= set(node.outputs)
        if node.op == "Constant" and (value := _scalar(node)) is not None:
            constants[node.outputs[0]] = value
        if node.op in COMPARISONS and set(node.inputs) & same:
            found += [float(constants[other]) for other in node.inputs if other in constants]
    return sorted({int(number) for number in found if number == int(number)})


def _scalar(node: Operation) -> Any:
    value = node.attributes.get("value", node.attributes.get("value_int"))
    if isinstance(value, int):
        import torch

        return torch.tensor(value)
    return value if value is not None and value.numel() == 1 else None
