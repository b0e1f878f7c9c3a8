"""One differentiable function for a whole window and layer, equal to the oracle and several times faster: a file for each family of cells,
named as in `cells/`.

What depends on the recursion runs step by step, in place; everything else (input product, surrogate derivatives, weight gradients) is one
product or one elementwise pass over the whole window. Gradients are written by hand and held against the oracle's autograd in the tests.

Every file has a `run(cell, x, state, *, modes, noise)` -> Trace, which `distill.window` calls; `parts.py` is what they share, `inputs.py`
what happens before the first step.
"""
