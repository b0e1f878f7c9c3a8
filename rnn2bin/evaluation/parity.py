"""The native runtime against the oracle: the same metric on the same data, and step by step from the same state.

Binary gates are discontinuous: a difference in the last place of a pre-activation next to zero flips a decision, and free-running states
part from there on. So each step starts both from the oracle's state; decisions must be equal wherever |pre-activation| > MARGIN, flips
inside are counted, and values are compared where no decision of the step flipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn2bin.cells.network import Network, Output, Section, State
from rnn2bin.data import Part, evaluation_batches
from rnn2bin.runtime.native_backend import Handle, Model

MARGIN = 1e-4  # sums of up to thousands of float32 products in another order differ by less
STEPS, ROWS = 64, 32


class NativeNetwork:
    """A native model with a network's signature, for `measure.compare`; how gates are made discrete and cells walk is its own."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        decoder_input: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
        logits: bool = False,
        **_: Any,
    ) -> Output:
        y, after = self.model.call(x, state, lengths=lengths, decoder_input=decoder_input, decoder_lengths=decoder_lengths, logits=logits)
        return Output(y, after, [], [], [], [])

    def generate(self, x: Tensor, *, lengths: Tensor | None = None, **_: Any) -> Tensor:
        return self.model.generate(x, lengths=lengths)


def parity(network: Network, model: Model, part: Part) -> dict[str, Any]:
    """`max_abs` difference of states, `steps` of sequences that were compared, `flips_in_margin`, `flips_outside`: a fault if not 0."""
    batch = next(iter(evaluation_batches(part.take(torch.arange(min(ROWS, len(part)))))))
    found = {"max_abs": 0.0, "steps": 0, "flips_in_margin": 0, "flips_outside": 0}
    state = _compare(
        network.entry, model, batch.inputs[:STEPS].nan_to_num(0) if batch.inputs.is_floating_point() else batch.inputs[:STEPS], None, found
    )
    if network.spec.decode:
        start = torch.full_like(batch.inputs[:1], network.spec.decode.start)
        tokens = network.generate(batch.inputs)[: STEPS - 1]
        _compare(network.get_submodule("decoder"), model, torch.cat([start, tokens]), state, found, decoder=True)  # type: ignore[arg-type]
    return found


@torch.no_grad()
def _compare(section: Section, model: Model, x: Tensor, state: State | None, found: dict[str, Any], *, decoder: bool = False) -> State:
    """Walks the oracle over x (T,B,…), and the native runtime one step from each of its states."""
    handle = Handle(model, x.shape[1])
    for x_t in x:
        out = section(x_t.unsqueeze(0), state)
        handle.reset()
        if state is not None:
            handle.write([[tuple(s.numpy() for s in both) for both in layer] for layer in state])
        step = np.ascontiguousarray(x_t.unsqueeze(0).numpy(), np.int64 if section.spec.embedding else np.float32)
        handle.decode(step, None, None) if decoder else handle.run(step, None, None)
        _count(section, handle, out, found)
        state = out.state
        found["steps"] += x.shape[1]
    assert state is not None
    return state


def _count(section: Section, handle: Handle, out: Output, found: dict[str, Any]) -> None:
    """Adds one step. Rows are compared in value until a decision flips in them: what is above reads another value then."""
    same = torch.ones(handle.batch, dtype=torch.bool)
    pres = iter(out.pre)
    for index, (layer, after) in enumerate(zip(section.spec.layers, handle.read(), strict=True)):
        flipped = torch.zeros(handle.batch, dtype=torch.bool)
        for direction in range(layer.directions):
            pre, ours = next(pres)[0], torch.from_numpy(handle.gates(index, direction))
            binary = torch.tensor(section.cell(index, ("fwd", "bwd")[direction]).binary).view(1, -1, 1)
            flips = ((pre > 0) != (ours > 0)) & binary & same.view(-1, 1, 1)
            outside = flips & (pre.abs() > MARGIN)
            found["flips_outside"] += int(outside.sum())
            found["flips_in_margin"] += int(flips.sum()) - int(outside.sum())
            flipped |= flips.flatten(1).any(1)
        same &= ~flipped
        for theirs, values in zip(out.state[index], after, strict=True):
            for a, b in zip(theirs, values, strict=True):
                gap = (a - torch.from_numpy(b)).abs()[same]
                found["max_abs"] = max(found["max_abs"], float(gap.max()) if gap.numel() else 0.0)
