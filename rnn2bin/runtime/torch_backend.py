"""The torch backend: the oracle's equations with hard gates, on weights as they were packed (fp16, computed in fp32)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnn2bin import pack
from rnn2bin.cells.network import Network, State
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.packed import read_config
from rnn2bin.spec import RnnSpec


class Model:
    """A binary-gated network. `network` is the module inside; `config` what config.json says."""

    def __init__(self, network: Network, config: dict[str, Any]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = config

    @property
    def spec(self) -> RnnSpec:
        return self.network.spec

    @torch.no_grad()
    def __call__(
        self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None, decoder_input: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """x (T,B,I) float or (T,B) tokens -> y and the state after it.

        y is (T,B,O), or (B,O) where the network reads out one value a sequence: outputs of the head, or of the last layer. An
        encoder–decoder without `decoder_input` (U,B) runs free and gives the tokens (U,B), with no state. `lengths` (B,): real steps of
        each sequence; y is computed from zero states at pads. Raises UsageError where x does not fit.
        """
        check_input(x, self.spec)
        if x.is_floating_point():
            x = x.float()
        if self.spec.decode and decoder_input is None:
            return self.network.generate(x, lengths=lengths), None
        out = self.network(x, state, lengths=lengths, decoder_input=decoder_input)
        return out.y, out.state

    def generate(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Greedy decoding of an encoder–decoder: x (T,B) -> tokens (U,B)."""
        check_input(x, self.spec)
        return self.network.generate(x, lengths=lengths)

    def stream(self) -> Stream:
        """One sequence, step by step. Raises UnsupportedError for networks that must see the whole sequence first."""
        check_streams(self.spec)
        return Stream(self)


@dataclass
class Stream:
    """State of one sequence; `step` agrees bit for bit with a call on the whole sequence of a batch of one."""

    model: Model
    state: State | None = None

    def step(self, x_t: Tensor | int) -> Tensor:
        """One step: (I,) floats or a token -> (O,)."""
        x = torch.as_tensor(x_t)
        y, self.state = self.model(x.reshape(1, 1, *x.shape), self.state)
        return y.reshape(-1)

    def reset(self) -> None:
        """Back to the zero state."""
        self.state = None


def check_streams(spec: RnnSpec) -> None:
    """Refuse a network that does not run step by step (UnsupportedError)."""
    section = spec.main
    if spec.decode:
        raise UnsupportedError("stream: an encoder–decoder reads a whole sequence first; call the model or generate()")
    if any(layer.directions == 2 for layer in section.layers):
        raise UnsupportedError("stream: a bidirectional network needs the whole sequence; call the model on it")
    if section.graph and not section.windowed:
        raise UnsupportedError("stream: parts of this network need the whole sequence; call the model on it")
    if not section.graph and section.readout in ("mean", "max"):
        raise UnsupportedError(f"stream: the head reads the {section.readout} over time; call the model on the whole sequence")


def check_input(x: Tensor, spec: RnnSpec) -> None:
    """Refuse x of the wrong rank, type, width or vocabulary (UsageError)."""
    entry = spec.entry
    if entry.embedding:
        if x.ndim != 2 or x.is_floating_point():
            raise UsageError(f"input: wanted whole numbers of shape (T,B), not {x.dtype} {tuple(x.shape)}")
        if x.numel() and (int(x.min()) < 0 or int(x.max()) >= entry.embedding.num_embeddings):
            raise UsageError(f"input: tokens must lie in 0…{entry.embedding.num_embeddings - 1}; found {int(x.min())}…{int(x.max())}")
    elif x.ndim < 2 or tuple(x.shape[2:]) != entry.input_shape or not x.is_floating_point():
        wanted = ",".join(("T", "B", *map(str, entry.input_shape)))
        raise UsageError(f"input: wanted floats of shape ({wanted}), not {x.dtype} {tuple(x.shape)}")
    if x.shape[0] == 0:
        raise UsageError("input: no steps: T is 0")


def load(path: Path, *, device: str = "cpu") -> Model:
    """Raises UnsupportedError with every reason where config and weights do not fit."""
    config = read_config(path)
    return Model(pack.read_network(path, config).to(device), config)
