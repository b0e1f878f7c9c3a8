"""Networks that are graphs: calls through Python, as a user makes them, and torch with the same nodes around its own float layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnn2bin.bench import Touched, layer_weights
from rnn2bin.bench.inputs import Call
from rnn2bin.cells.network import State, run_nodes
from rnn2bin.runtime.graph_backend import Layers, Model
from rnn2bin.spec import LayerSpec

Steps = Callable[[], int]


class Ours:
    """The hybrid on `calls`, again from the first where they end. Within a sequence a call carries its state to the next; `stream`: step by
    step."""

    def __init__(self, model: Model, calls: Sequence[Call], *, stream: bool) -> None:
        self.model, self.calls, self.at = model, calls, 0
        self.state: State | None = None
        self._stream = model.stream() if stream else None

    def run(self) -> int:
        """One call."""
        call = self.calls[self.at]
        self.at = (self.at + 1) % len(self.calls)
        if self._stream:
            if call.first:
                self._stream.reset()
            self._stream.step(call.x[0, 0])
        else:
            _, self.state = self.model(call.x, None if call.first else self.state)
        return len(call.x)

    def touched(self) -> Touched:
        """Of the layers, over all calls once more; what stands around them is read whole and not counted."""
        dense, weights, read, steps, layers = 0, 0, 0, 0, Layers(self.model, None)
        for at, call in enumerate(self.calls):
            if call.first:
                layers = Layers(self.model, None)
            with torch.no_grad():
                self.model.once(torch.from_numpy(call.x), layers)
            steps += call.x.shape[0] * call.x.shape[1]
            if at + 1 < len(self.calls) and not self.calls[at + 1].first:
                continue  # the counters are those of all calls of the sequence so far
            for index, handles in layers.parts.items():
                for found in (handle.counters() for handle in handles):
                    dense += found.steps * layer_weights(self.model.spec.main.layers[index].floating)
                    weights += found.weights
                    read += found.bytes
        return Touched(weights / dense, read / steps)


def rivals(model: Model, calls: Sequence[Call], against: tuple[str, ...]) -> dict[str, Steps]:
    """Name -> one call. Torch alone, and only where nn.LSTM and nn.GRU are what the layers are; none where the graph makes lengths."""
    section = model.spec.floating.main
    plain = all(y.cell in ("lstm", "gru") and not (y.clip or y.cell_clip or y.proj_clip) for y in section.layers)
    lengths = any(node.op == "Recurrent" and any(node.inputs[3:]) for node in model.nodes)
    if "torch" not in against or not plain or lengths:
        return {}
    torch.set_num_threads(1)
    return {"torch fp32": _Torch(model, calls).run}


class _Torch:
    """The float network of the same shape: the hybrid's own nodes and weights around nn.LSTM and nn.GRU."""

    def __init__(self, model: Model, calls: Sequence[Call]) -> None:
        self.model, self.calls, self.at = model, [(torch.from_numpy(call.x), call.first) for call in calls], 0
        self.layers = [_module(layer) for layer in model.spec.floating.main.layers]
        self.states: list[Any] = [None] * len(self.layers)

    @torch.no_grad()
    def run(self) -> int:
        (x, first), model = self.calls[self.at], self.model
        self.at = (self.at + 1) % len(self.calls)
        if first:
            self.states = [None] * len(self.layers)
        values = model.constants | model.section.graph_inputs(x, None)
        run_nodes(model.nodes, model.ends, values, self._recurrent)
        model.section.graph_output(values[model.graph.output], logits=False)
        return len(x)

    def _recurrent(self, operands: list[Tensor | None], *, layer: int) -> tuple[Tensor, ...]:
        x, h0, c0 = [*operands, None, None][:3]
        module, state, section = self.layers[layer], self.states[layer], self.model.section
        assert x is not None
        if layer in section.spec.token_layers:
            x = section.rows(x)
        if state is None and (h0 is not None or c0 is not None):
            state = _start(module, x, h0, c0)
        y, self.states[layer] = module(x, state)
        after = self.states[layer]
        return (y, *after) if isinstance(after, tuple) else (y, after)


def _start(module: nn.LSTM | nn.GRU, x: Tensor, h0: Tensor | None, c0: Tensor | None) -> Any:
    ways, batch = 1 + module.bidirectional, x.shape[1]
    h = x.new_zeros(ways, batch, module.proj_size or module.hidden_size) if h0 is None else h0.expand(ways, batch, -1).contiguous()
    if isinstance(module, nn.GRU):
        return h
    return h, x.new_zeros(ways, batch, module.hidden_size) if c0 is None else c0.expand(ways, batch, -1).contiguous()


def _module(layer: LayerSpec) -> nn.LSTM | nn.GRU:
    kind = nn.LSTM if layer.cell == "lstm" else nn.GRU
    return kind(layer.input_size, layer.hidden_size, bidirectional=layer.directions == 2, proj_size=layer.proj_size).eval()
