"""The equations of the cells, slow and obvious: the oracle that every other implementation is held against.

`FloatNetwork` is a float network of any of them, to be trained from scratch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnn2bin.cells.module import FloatNetwork

__all__ = ["FloatNetwork"]


def __getattr__(name: str) -> Any:
    """Its module is imported when it is asked for: the files of cells are imported from within it."""
    if name == "FloatNetwork":
        from rnn2bin.cells.module import FloatNetwork

        return FloatNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
