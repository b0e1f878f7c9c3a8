"""Networks that are graphs: calls through Python, as a user makes them, and torch with the same nodes around its own float layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnn2bin.bench import Touched, layer_weights
from rnn2bin.cells.network import Lookup, State, run_nodes
from rnn2bin.runtime.graph_backend import Layers, Model
from rnn2bin.spec import LayerSpec

Steps = Callable[[], int]


class Ours:
    """The hybrid on `calls`, each (T,B,…), again from the start where they end. A network that may be cut carries its state from one to the
    next; `stream`: step by step."""

    def __init__(self, model: Model, calls: list[np.ndarray], *, stream: bool) -> None:
        self.model, self.calls, self.at = model, calls, 0
        self.state: State | None = None
        self._step = model.stream().step if stream else None

    def run(self) -> int:
        """One call."""
        x = self.calls[self.at]
        self.at = (self.at + 1) % len(self.calls)
        if self._step:
            self._step(x[0, 0])
        else:
            _, after = self.model(x, self.state)
            self.state = after if self.model.spec.main.windowed else None
        return len(x)

    def touched(self) -> Touched:
        """Of the layers, over all calls once more; what stands around them is read whole and not counted."""
        dense, weights, read, steps, layers = 0, 0, 0, 0, Layers(self.model, None)
        for at, x in enumerate(self.calls):
            if not self.model.spec.main.windowed:
                layers = Layers(self.model, None)
            with torch.no_grad():
                self.model.once(torch.from_numpy(x), layers)
            steps += x.shape[0] * x.shape[1]
            if self.model.spec.main.windowed and at + 1 < len(self.calls):
                continue  # the counters are those of all calls so far
            for index, handles in layers.parts.items():
                for found in (handle.counters() for handle in handles):
                    dense += found.steps * layer_weights(self.model.spec.main.layers[index].floating)
                    weights += found.weights
                    read += found.bytes
        return Touched(weights / dense, read / steps)


def rivals(model: Model, calls: list[np.ndarray], against: tuple[str, ...]) -> dict[str, Steps]:
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

    def __init__(self, model: Model, calls: list[np.ndarray]) -> None:
        self.model, self.calls, self.at = model, [torch.from_numpy(x) for x in calls], 0
        self.layers = [_module(layer) for layer in model.spec.floating.main.layers]
        self.states: list[Any] = [None] * len(self.layers)

    @torch.no_grad()
    def run(self) -> int:
        x, model = self.calls[self.at], self.model
        self.at = (self.at + 1) % len(self.calls)
        if not model.spec.main.windowed:
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
            found = section.embed(x)
            x = found.rows(found.dtype) if isinstance(found, Lookup) else found
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
