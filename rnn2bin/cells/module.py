"""Float networks of any cell, to be trained from scratch: an nn.Module that saves itself with what it is, so that `rnn2bin convert` reads
the file without a recipe's `source`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rnn2bin.cells.network import Network, State, Walk, walk
from rnn2bin.errors import UnsupportedError
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec, check, from_dict, to_dict

HEADER = "rnn2bin"
GATE_BIAS: Mapping[str, float] = {"f": 1.0}


class FloatNetwork(nn.Module):
    """Tokens or floats -> layers of one cell -> a linear layer, where `outputs` are asked for. Walks as the oracle does, step by step
    through autograd: exact, and slow; `walk=rnn2bin.distill.window.run_cell` in a call is faster, with the same gradients.

    `cell`: a row of `kinds.CELLS`. `input_size` of floats, or of what `vocabulary` tokens are embedded in; `depth` of deep cells; `readout`
    as in `spec.READOUTS`. Weights start uniform in ±1/sqrt(H), gates' biases at `gate_bias` by their letter, 0 where there is none. Raises
    UnsupportedError for a cell that is not there or sizes that do not fit it.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        *,
        hidden_size: int,
        layers: int = 1,
        depth: int = 1,
        directions: int = 1,
        vocabulary: int | None = None,
        outputs: int | None = None,
        readout: str = "all",
        gate_bias: Mapping[str, float] = GATE_BIAS,
    ) -> None:
        super().__init__()
        stack, width = [], input_size
        for _ in range(layers):
            stack.append(LayerSpec(cell, width, hidden_size, directions, depth=depth))
            width = stack[-1].output_size
        section = SectionSpec(
            tuple(stack),
            EmbeddingSpec(vocabulary, input_size) if vocabulary else None,
            (LinearSpec(width, outputs),) if outputs else (),
            readout,
        )
        spec = RnnSpec({"main": section})
        check(spec)
        self.network = Network(spec)
        self._start(gate_bias)

    @property
    def spec(self) -> RnnSpec:
        return self.network.spec

    @torch.no_grad()
    def _start(self, gate_bias: Mapping[str, float]) -> None:
        for cell in self.network.cells().values():
            layer = cell.layer
            for name, p in cell.named_parameters():
                if p.ndim == 2:
                    p.uniform_(-(layer.hidden_size**-0.5), layer.hidden_size**-0.5)
                elif name == "gates.bias":
                    units = layer.kind.gates[: layer.kind.unit_gates]
                    starts = [gate_bias.get(gate.letter, 0.0) for gate in units]
                    p.copy_(torch.tensor(starts).repeat_interleave(layer.hidden_size))
                elif name == "global.bias":
                    p.fill_(gate_bias.get("g", 0.0))
        section = self.network.entry
        if section.spec.embedding:
            section.embedding.weight.normal_()

    def forward(
        self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None, logits: bool = True, walk: Walk = walk
    ) -> tuple[Tensor, State]:
        """x (T,B,I) or tokens (T,B), lengths (B,) -> y (T,B,O), or (B,O) by the readout, and the state [layer][direction]."""
        out = self.network(x, state, lengths=lengths, mode=FLOAT, walk=walk, logits=logits)
        return out.y, out.state

    def save(self, path: str | Path) -> None:
        """A .safetensors file of float32 weights, whose header says what they are."""
        tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in self.network.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt", HEADER: json.dumps(to_dict(self.spec))})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote. Raises UnsupportedError where it is another file."""
        try:
            with safe_open(path, framework="pt") as stored:
                described = (stored.metadata() or {}).get(HEADER)
                if described is None:
                    raise UnsupportedError(f"{path}: not a float network of rnn2bin: its header has no {HEADER}")
                spec = from_dict(json.loads(described))
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UnsupportedError(f"{path}: not a float network of rnn2bin ({error})") from None
        wanted, found = spec.tensors(), {name: tuple(t.shape) for name, t in tensors.items()}
        if wanted != found:
            misfits = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise UnsupportedError(f"{path}: tensors that are not its spec's: {', '.join(misfits[:5])}")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.network = Network(spec)
        made.network.load_state_dict(tensors)
        return made
