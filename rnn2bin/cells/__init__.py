"""The equations of the cells, slow and obvious: the oracle that every other implementation is held against."""
