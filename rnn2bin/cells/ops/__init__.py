"""The operations around recurrent layers, each a function of tensors and plain attributes, with the meaning ONNX gives its name (opset 17).

An operation that ONNX does not have says what it does. A file a kind; `table.py` has the names.
"""

from rnn2bin.cells.ops import axes, elementwise, products, shapes, steps  # noqa: F401  each enters its operations into the table
from rnn2bin.cells.ops.table import MISFITS, MOST_ELEMENTS, OPS

__all__ = ["MISFITS", "MOST_ELEMENTS", "OPS"]
