"""The native runtime against the oracle: the same metric on the same data, and step by step from the same state.

Binary gates are discontinuous: a difference in the last place of a pre-activation next to zero flips a decision, and free-running states
part from there on. So each step starts both from the oracle's state; decisions must be equal wherever |pre-activation| > MARGIN, flips
inside are counted, and values are compared where no decision of the step flipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rnn2bin.cells.network import CellState, Network, Output, Run, Section, State, Trace, given_states, reverse, walk, zero_state
from rnn2bin.data import Part, evaluation_batches
from rnn2bin.gates.estimators import BINARY
from rnn2bin.measure import Candidate, rows_at_once
from rnn2bin.runtime.native_backend import Handle, Model
from rnn2bin.spec import DIRECTIONS

if TYPE_CHECKING:
    from rnn2bin.runtime import Native

MARGIN = 1e-4  # sums of up to thousands of float32 products in another order differ by less
STEPS, ROWS = 64, 32


class NativeNetwork:
    """A native model with a network's signature, for `measure.compare`; how gates are made discrete and cells walk is its own."""

    def __init__(self, model: Native) -> None:
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
        assert isinstance(self.model, Model)
        return self.model.generate(x, lengths=lengths)


def parity(network: Network, model: Native, part: Part) -> dict[str, Any]:
    """`max_abs` difference of states, `steps` of sequences that were compared, `flips_in_margin`, `flips_outside`: a fault if not 0."""
    found = {"max_abs": 0.0, "steps": 0, "flips_in_margin": 0, "flips_outside": 0}
    if not isinstance(model, Model):
        return _graph_parity(network, model, part, found)
    batch = next(iter(evaluation_batches(part.take(torch.arange(min(ROWS, len(part)))))))
    state = _compare(
        network.entry, model, batch.inputs[:STEPS].nan_to_num(0) if batch.inputs.is_floating_point() else batch.inputs[:STEPS], None, found
    )
    if network.spec.decode:
        start = torch.full_like(batch.inputs[:1], network.spec.decode.start)
        tokens = network.generate(batch.inputs)[: STEPS - 1]
        _compare(network.get_submodule("decoder"), model, torch.cat([start, tokens]), state, found, decoder=True)  # type: ignore[arg-type]
    return found


@torch.no_grad()
def _graph_parity(network: Network, model: Native, part: Part, found: dict[str, Any]) -> dict[str, Any]:
    part = part.take(torch.arange(min(ROWS, len(part))))
    batch = next(iter(evaluation_batches(part, batch_size=rows_at_once(Candidate(network, BINARY), part, ROWS))))
    x = batch.inputs[:STEPS] if network.spec.main.windowed else batch.inputs
    lengths = None if batch.lengths is None else batch.lengths.clamp_max(len(x))
    run = Run(network.entry, None, lengths, BINARY, walk)
    beside = _LayerByLayer(model, run, found)
    network.entry.run_graph(x.nan_to_num(0) if x.is_floating_point() else x, beside.recurrent, lengths=lengths)
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
            flipped |= _flipped(section, handle, (index, direction), next(pres)[0], same, found)
        same &= ~flipped
        for theirs, values in zip(out.state[index], after, strict=True):
            _gap(theirs, values, same, found)


def _flipped(section: Section, handle: Handle, cell: tuple[int, int], pre: Tensor, rows: Tensor, found: dict[str, Any]) -> Tensor:
    """Counts the flips of a cell (layer, direction) in its last step among `rows` (B,), the oracle's pre-activations being `pre` (B,G,n·H);
    gives the rows in which a decision flipped."""
    ours = torch.from_numpy(handle.gates(*cell))
    binary = torch.tensor(section.cell(cell[0], DIRECTIONS[cell[1]]).binary, dtype=torch.bool).view(1, -1, 1)
    flips = ((pre > 0) != (ours > 0)) & binary & rows.view(-1, 1, 1)
    outside = flips & (pre.abs() > MARGIN)
    found["flips_outside"] += int(outside.sum())
    found["flips_in_margin"] += int(flips.sum()) - int(outside.sum())
    return flips.flatten(1).any(1)


def _gap(theirs: CellState, ours: tuple[np.ndarray, ...], rows: Tensor, found: dict[str, Any]) -> None:
    """The largest difference of a cell's states after a step, among `rows` (B,)."""
    for a, b in zip(theirs, ours, strict=True):
        gap = (a - torch.from_numpy(b)).abs()[rows]
        found["max_abs"] = max(found["max_abs"], float(gap.max()) if gap.numel() else 0.0)


@dataclass
class _LayerByLayer:
    """A graph: the oracle runs it on whole sequences, and at every layer that it reaches each step is compared with the native layer's,
    from the oracle's state on what the oracle's layer reads. `steps` are those of the layer that has most."""

    model: Native
    run: Run
    found: dict[str, Any]

    def recurrent(self, operands: list[Tensor | None], *, layer: int) -> tuple[Tensor, ...]:
        """The oracle's layer, compared."""
        made = self.run.recurrent(operands, layer=layer)
        x, h0, c0, _ = [*operands, None, None, None][:4]
        assert x is not None
        spec, lengths = self.run.section.spec.layers[layer], self.run.real[-1]
        like = self.run.section.cell(layer, "fwd").part("candidate").bias
        start = given_states(spec, x.shape[1], h0, c0) or [zero_state(spec, x.shape[1], like)] * spec.directions
        for direction, trace in enumerate(self.run.traces[-spec.directions :]):
            rows = reverse(x, lengths) if direction else x
            self._cell(layer, direction, rows[:STEPS], trace, start[direction], lengths)
        seen = torch.full((x.shape[1],), len(x)) if lengths is None else lengths
        self.found["steps"] = max(self.found["steps"], int(seen.clamp_max(STEPS).sum()))
        return made

    def _cell(self, layer: int, direction: int, x: Tensor, trace: Trace, state: CellState, lengths: Tensor | None) -> None:
        """One direction over x (T,B,I) in its own order of time, from `state`."""
        spec = self.run.section.spec.layers[layer]
        handle = Handle(self.model, x.shape[1], layer=layer)
        for t, x_t in enumerate(x):
            handle.write([[tuple(s.numpy() for s in state)] * spec.directions])
            handle.run(np.ascontiguousarray(x_t.unsqueeze(0).numpy()), None, None)
            real = torch.ones(handle.batch, dtype=torch.bool) if lengths is None else t < lengths
            pre = trace.products[t] if trace.biases is None else replace(trace, products=trace.products[t : t + 1]).pre[0]
            same = real & ~_flipped(self.run.section, handle, (layer, direction), pre, real, self.found)
            state = tuple(s[t] for s in trace.states)
            _gap(state, handle.read()[0][direction], same, self.found)
