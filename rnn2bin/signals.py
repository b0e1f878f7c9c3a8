"""SIGINT and SIGTERM: the same request to stop, wherever a run is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, as SIGINT does. Outside the main thread nothing is changed: who runs us there decides."""
    before = _handle((signal.SIGTERM,), signal.default_int_handler)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def noted() -> Iterator[list[int]]:
    """Inside, the first signal only goes into the list; a second one does what it did outside."""
    seen: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: Any) -> None:
        seen.append(number)
        _restore(before)

    before.update(_handle(STOPPING, note))
    try:
        yield seen
    finally:
        _restore(before)


def _handle(numbers: tuple[signal.Signals, ...], handler: Any) -> dict[signal.Signals, Any]:
    """What was there before; nothing where this is not the main thread."""
    try:
        return {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        return {}


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
