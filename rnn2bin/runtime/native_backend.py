"""The native backend: the C runtime that touches only the weights whose gates are open. Reads and gives numpy arrays or torch tensors,
whichever it was handed, without copying them; imports no torch itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_int64
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rnn2bin import packed
from rnn2bin import spec as specs
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.runtime.library import COMPUTE, Counters, Info, last_error, library
from rnn2bin.spec import RnnSpec

Array = Any  # numpy array, or torch tensor
State = list[list[tuple[Array, ...]]]  # [layer][direction], each (h,) or (h, c) of shape (B, ·)


class Opened:
    """A packed directory that the C library has read: what every model of this backend is.

    `compute`: "fp16" reads every active weight; "int8" screens the gates' signs in 8 bits and gives the same bits; "auto" is the
    quicker: "int8" for GRUs and for weights on eight-bit grids, else "fp16". `threads` > 1 shares a batch out.
    """

    def __init__(self, path: Path, *, compute: str = "auto", threads: int = 1) -> None:
        native = library()
        assert native is not None
        if compute not in COMPUTE:
            raise UsageError(f"compute {compute!r} is none of {', '.join(COMPUTE)}")
        self.config = packed.read_config(path)
        self.spec: RnnSpec = specs.from_dict(self.config.get("spec") or {})
        self.threads = threads
        self._native = native
        self._handle = native.r2b_open(str(path).encode(), COMPUTE[compute])
        if not self._handle:
            raise UnsupportedError(f"{path}: {last_error()}")
        self._info = Info()
        native.r2b_describe(self._handle, byref(self._info))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._native.r2b_close(self._handle)

    def share(self, batch: int, work: Callable[[slice], Any]) -> list[Any]:
        """Runs `work` on slices of the batch, one a thread."""
        slices = self.slices(batch)
        if len(slices) == 1:
            return [work(slices[0])]
        with ThreadPoolExecutor(len(slices)) as pool:
            return list(pool.map(work, slices))

    def slices(self, batch: int) -> list[slice]:
        """What each thread has of a batch."""
        count = max(1, min(self.threads, batch))
        return [slice(a, b) for a, b in pairwise(batch * k // count for k in range(count + 1))]


class Model(Opened):
    """A binary-gated network that runs by skipping. One model may serve many threads; each stream and each call has its own state."""

    def __call__(
        self, x: Array, state: State | None = None, *, lengths: Array | None = None, decoder_input: Array | None = None
    ) -> tuple[Array, State | None]:
        """x (T,B,I) float or (T,B) tokens -> y and the state after it; see `torch_backend.Model`."""
        if self.spec.decode and decoder_input is None:
            return self.generate(x, lengths=lengths), None
        return self.call(x, state, lengths=lengths, decoder_input=decoder_input)

    def call(
        self,
        x: Array,
        state: State | None = None,
        *,
        lengths: Array | None = None,
        decoder_input: Array | None = None,
        decoder_lengths: Array | None = None,
        logits: bool = False,
    ) -> tuple[Array, State]:
        """A call with all that evaluation asks for: `decoder_lengths` (B,); `logits` leaves out a last sigmoid or softmax."""
        kind, values = _numpy(x)
        values = check_input(values, self.spec)
        batch = values.shape[1]
        job = _Job(
            values,
            None if state is None else [[tuple(_numpy(s)[1] for s in both) for both in layer] for layer in state],
            None if lengths is None else check_lengths(lengths, batch),
            None if decoder_input is None else _tokens(_numpy(decoder_input)[1], self.spec, batch),
            None if decoder_lengths is None else check_lengths(decoder_lengths, batch),
            logits,
        )
        pieces = self.share(batch, lambda rows: self._run(job.part(rows)))
        y = np.concatenate([p[0] for p in pieces], axis=pieces[0][0].ndim - 2) if len(pieces) > 1 else pieces[0][0]
        return kind(y), [[tuple(map(kind, s)) for s in layer] for layer in _joined([p[1] for p in pieces])]

    def generate(self, x: Array, *, lengths: Array | None = None) -> Array:
        """Greedy decoding of an encoder–decoder: x (T,B) -> tokens (U,B)."""
        if self.spec.decode is None:
            raise ValueError("generate() is for encoder–decoders")
        kind, values = _numpy(x)
        values = check_input(values, self.spec)
        lengths = None if lengths is None else check_lengths(lengths, values.shape[1])
        pieces = self.share(values.shape[1], lambda rows: self._generate(values[:, rows], _part(lengths, rows)))
        longest = max(len(p) for p in pieces)
        end = self.spec.decode.end
        return kind(np.concatenate([np.pad(p, ((0, longest - len(p)), (0, 0)), constant_values=end) for p in pieces], axis=1))

    def stream(self) -> Stream:
        """One sequence, step by step. Raises UnsupportedError for networks that must see the whole sequence first."""
        if not self._info.streams:
            raise UnsupportedError("stream: this network must see the whole sequence first; call the model on it")
        return Stream(self)

    def _run(self, job: _Job) -> tuple[np.ndarray, State]:
        steps, batch = job.x.shape[:2]
        outputs = job.x if job.given is None else job.given
        state = Handle(self, batch, max(steps, len(outputs)))
        if job.state is not None:
            state.write(job.state)
        if job.logits:
            state.leave_logits()
        y = np.empty((*((batch,) if self._info.per_sequence else outputs.shape[:2]), self._info.output_size), np.float32)
        state.run(job.x, job.lengths, y if job.given is None else None)
        if job.given is not None:
            state.decode(job.given, job.given_lengths, y)
        return y, state.read()

    def _generate(self, x: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
        x = np.ascontiguousarray(x)
        state = Handle(self, x.shape[1], max(len(x), 1))
        state.run(x, lengths, None)
        return state.generate(self._info.max_length)


@dataclass(frozen=True)
class _Job:
    """What a call reads, checked: x (T,B,·), states, lengths (B,), decoder tokens (U,B) and their lengths."""

    x: np.ndarray
    state: State | None
    lengths: np.ndarray | None
    given: np.ndarray | None
    given_lengths: np.ndarray | None
    logits: bool

    def part(self, rows: slice) -> _Job:
        """Some sequences of the batch, contiguous."""
        return _Job(
            np.ascontiguousarray(self.x[:, rows]),
            None if self.state is None else [[tuple(s[rows] for s in both) for both in layer] for layer in self.state],
            _part(self.lengths, rows),
            None if self.given is None else np.ascontiguousarray(self.given[:, rows]),
            _part(self.given_lengths, rows),
            self.logits,
        )


class Handle:
    """A C state of `batch` sequences: what streams and calls work on. Not for two threads at once. `layer`: that of a graph."""

    def __init__(self, model: Opened, batch: int, steps: int = 1, *, layer: int | None = None) -> None:
        self.model, self.batch = model, batch
        self.layers = range(model._info.layers) if layer is None else range(layer, layer + 1)
        self._native = model._native
        if layer is None:
            self.address = self._native.r2b_new_state(model._handle, batch, steps)
        else:
            self.address = self._native.r2b_new_layer_state(model._handle, layer, batch, steps)
        if not self.address:
            raise MemoryError(last_error())

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.r2b_free_state(self.address)

    def _places(self) -> list[list[list[tuple[int, int, int, int]]]]:
        size = lambda layer, d, which: self._native.r2b_state_size(self.model._handle, layer, d, which)
        return [
            [[(layer, d, which, n) for which in range(3) if (n := size(layer, d, which))] for d in range(2) if size(layer, d, 0)]
            for layer in self.layers
        ]

    def read(self) -> State:
        """[layer][direction] -> (h,), (h, c) or (h, c, r), each (B, ·); of the layers that this state is of."""
        return [[tuple(self._read(*place) for place in both) for both in layer] for layer in self._places()]

    def _read(self, layer: int, direction: int, which: int, size: int) -> np.ndarray:
        values = np.empty((self.batch, size), np.float32)
        self._native.r2b_get_state(self.address, layer, direction, which, values.ctypes.data)
        return values

    def write(self, state: State) -> None:
        """Raises UsageError where `state` is not one of this network for this batch."""
        places = self._places()
        if [[len(both) for both in layer] for layer in state] != [[len(both) for both in layer] for layer in places]:
            raise UsageError("state: not one of this network")
        for layer, wanted in zip(state, places, strict=True):
            for both, where in zip(layer, wanted, strict=True):
                for values, (index, direction, which, size) in zip(both, where, strict=True):
                    part = np.ascontiguousarray(values, np.float32)
                    if part.shape != (self.batch, size):
                        raise UsageError(f"state: wanted shape {(self.batch, size)}, not {part.shape}")
                    self._native.r2b_set_state(self.address, index, direction, which, part.ctypes.data)

    def run(self, x: np.ndarray, lengths: np.ndarray | None, y: np.ndarray | None) -> None:
        self._done(self._native.r2b_run(self.address, x.ctypes.data, len(x), _address(lengths), _address(y)))

    def decode(self, tokens: np.ndarray, lengths: np.ndarray | None, y: np.ndarray | None) -> None:
        self._done(self._native.r2b_decode(self.address, tokens.ctypes.data, len(tokens), _address(lengths), _address(y)))

    def leave_logits(self) -> None:
        """From here on outputs come without a last sigmoid or softmax."""
        self._native.r2b_leave_logits(self.address)

    def generate(self, most: int) -> np.ndarray:
        tokens, steps = np.empty((most, self.batch), np.int64), c_int64()
        self._done(self._native.r2b_generate(self.address, tokens.ctypes.data, byref(steps)))
        return tokens[: steps.value].copy()

    def gates(self, layer: int, direction: int) -> np.ndarray:
        """Pre-activations (B,G,n·H) of the last step of a cell."""
        spec = self.model.spec.main.layers[layer]
        pre = np.empty((self.batch, len(spec.kind.gates), spec.width), np.float32)
        self._done(self._native.r2b_get_gates(self.address, layer, direction, pre.ctypes.data))
        return pre

    def counters(self) -> Counters:
        """Sums since this state was made."""
        found = Counters()
        self._native.r2b_count(self.address, byref(found))
        return found

    def reset(self) -> None:
        self._native.r2b_reset(self.address)

    def _done(self, failed: int) -> None:
        if failed:
            raise UsageError(f"native: {last_error()}")


class Stream:
    """State of one sequence; `step` agrees bit for bit with a call on the whole sequence."""

    def __init__(self, model: Model) -> None:
        self.handle = Handle(model, 1)
        self._tokens, width = bool(model._info.tokens), model._info.input_size
        self._x = np.zeros(1 if self._tokens else width, np.int64 if self._tokens else np.float32)
        self._y = np.empty(model._info.output_size, np.float32)
        self._step = model._native.r2b_step
        self._arguments = (self.handle.address, self._x.ctypes.data, self._y.ctypes.data)

    def step(self, x_t: Array | int) -> Array:
        """One step: (I,) floats or a token -> (O,), a torch tensor where x_t is one (a Python int: where torch is loaded), else numpy."""
        if type(x_t) is int and self._tokens:
            self._x[0] = x_t
            kind = _kind_of_int()
        else:
            kind, values = _numpy(x_t)
            self._put(np.asarray(values))
        if self._step(*self._arguments):
            raise UsageError(f"input: {last_error()}")
        return kind(self._y.copy())

    def _put(self, values: np.ndarray) -> None:
        if self._tokens != (values.dtype.kind in "iu") or values.size != self._x.size or values.ndim > 1:
            wanted = "a token" if self._tokens else f"{self._x.size} floats"
            raise UsageError(f"input: a step takes {wanted}, not {values.dtype} {values.shape}")
        self._x[:] = values

    def reset(self) -> None:
        """Back to the zero state."""
        self.handle.reset()


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _kind_of_int() -> Callable[[np.ndarray], Array]:
    torch = sys.modules.get("torch")
    return torch.from_numpy if torch else _same


def _numpy(x: Array) -> tuple[Callable[[np.ndarray], Array], np.ndarray]:
    """What turns an output into the kind of `x`, and x as a numpy array that shares its memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch.from_numpy, x.detach().cpu().numpy()
    return _same, np.asarray(x)


def check_input(x: np.ndarray, spec: RnnSpec) -> np.ndarray:
    """x as the runtime reads it, float32 or int64. Refuses the wrong rank, type, width or vocabulary (UsageError)."""
    entry = spec.entry
    if entry.embedding:
        x = _tokens_of(x, entry.embedding.num_embeddings)
    elif x.ndim != 3 or tuple(x.shape[2:]) != entry.input_shape or x.dtype.kind != "f":
        raise UsageError(f"input: wanted floats of shape (T,B,{entry.input_shape[0]}), not {x.dtype} {x.shape}")
    if x.shape[0] == 0:
        raise UsageError("input: no steps: T is 0")
    return x.astype(np.int64 if entry.embedding else np.float32, copy=False)


def _tokens_of(x: np.ndarray, vocabulary: int) -> np.ndarray:
    if x.ndim != 2 or x.dtype.kind not in "iu":
        raise UsageError(f"input: wanted whole numbers of shape (T,B), not {x.dtype} {x.shape}")
    if x.size and (x.min() < 0 or x.max() >= vocabulary):
        raise UsageError(f"input: tokens must lie in 0…{vocabulary - 1}; found {int(x.min())}…{int(x.max())}")
    return x


def _tokens(x: np.ndarray, spec: RnnSpec, batch: int) -> np.ndarray:
    assert spec.main.embedding is not None
    x = _tokens_of(x, spec.main.embedding.num_embeddings)
    if len(x) == 0 or x.shape[1] != batch:
        raise UsageError(f"decoder_input: wanted shape (U,{batch}), not {x.shape}")
    return x.astype(np.int64, copy=False)


def check_lengths(lengths: Array, batch: int) -> np.ndarray:
    """lengths (B,) as the runtime reads them, int64. UsageError where they are not."""
    found = _numpy(lengths)[1]
    if found.shape != (batch,) or found.dtype.kind not in "iu":
        raise UsageError(f"lengths: wanted {batch} whole numbers, not {found.dtype} {found.shape}")
    return found.astype(np.int64, copy=False)


def _part(values: np.ndarray | None, rows: slice) -> np.ndarray | None:
    return None if values is None else np.ascontiguousarray(values[rows])


def _address(values: np.ndarray | None) -> int | None:
    return None if values is None else values.ctypes.data


def _joined(states: Sequence[State]) -> State:
    """States of slices of a batch -> of the whole."""
    if len(states) == 1:
        return states[0]
    return [
        [tuple(np.concatenate(parts) for parts in zip(*both, strict=True)) for both in zip(*layer, strict=True)]
        for layer in zip(*states, strict=True)
    ]


def load(path: Path, *, compute: str = "auto", threads: int = 1) -> Model:
    """Raises UnsupportedError where the directory is not a whole packed model."""
    return Model(path, compute=compute, threads=threads)
