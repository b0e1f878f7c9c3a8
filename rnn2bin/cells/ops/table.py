"""The table of operations by name, and what every one of them is made with: operands, attributes, bounds.

Sizes come from files: what would fill the memory is refused (`bounded`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from rnn2bin.errors import UnsupportedError

Values = Sequence[Tensor | None]
Result = Tensor | tuple[Tensor, ...]
Operation = Callable[[Values, dict[str, Any]], Result]

# What operations raise, of Python and of torch, on operands that do not fit.
MISFITS = (RuntimeError, LookupError, ValueError, TypeError, AssertionError, ArithmeticError)
MOST_ELEMENTS = ContextVar("MOST_ELEMENTS", default=2**28)  # of a tensor, a gigabyte of float32; less while a file is read
OPS: dict[str, Operation] = {}


def dtype_of(name: str) -> torch.dtype:
    """int64, bool, or float32: torch's default, so that a whole graph may run in float64."""
    return {"float32": torch.get_default_dtype(), "int64": torch.int64, "bool": torch.bool}[name]


def operation(name: str) -> Callable[[Operation], Operation]:
    def enter(function: Operation) -> Operation:
        OPS[name] = function
        return function

    return enter


def given(values: Values, index: int) -> Tensor:
    """Operand `index`, which must be there."""
    value = values[index] if index < len(values) else None
    if value is None:
        raise UnsupportedError(f"an operation lacks its input {index}")
    return value


def maybe(values: Values, index: int) -> Tensor | None:
    return values[index] if index < len(values) else None


def numbers(values: Values, index: int, attributes: dict[str, Any], name: str) -> list[int] | None:
    """Whole numbers that an operation takes as an operand (newer opsets) or as an attribute (older ones)."""
    value = maybe(values, index)
    return [int(n) for n in value.flatten().tolist()] if value is not None else attributes.get(name)


def bounded(shape: Sequence[int]) -> list[int]:
    """The shape, where its elements can be held; UnsupportedError otherwise."""
    if any(n < 0 for n in shape) or math.prod(shape) > MOST_ELEMENTS.get():
        raise UnsupportedError(f"an operation wants a tensor of shape {tuple(shape)}; refused, it would exhaust the memory")
    return list(shape)
