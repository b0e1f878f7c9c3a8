"""`rnn2bin bench`: the native runtime's time a step against other runtimes running the float network of the same shape.

Protocol (docs/benchmarks.md): one pinned core, one thread everywhere, contenders interleaved in random order, the median of paired ratios
with a bootstrap interval; bytes of weights touched a step against the read bandwidth measured in the same run at the same working set.
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rnn2bin import packed, runtime
from rnn2bin.bench import rivals
from rnn2bin.bench.inputs import SEQUENCE, Call, Inputs, calls_of, mean_steps
from rnn2bin.errors import UsageError
from rnn2bin.runtime import library
from rnn2bin.runtime.native_backend import Handle, Model
from rnn2bin.spec import LayerSpec, RnnSpec, SectionSpec

BLOCKS, STEPS = 15, 1024
Steps = Callable[[], int]  # runs some steps, says how many
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}


@dataclass(frozen=True)
class Settings:
    """How long and against whom. `steps` at least, for each contender in each of the `blocks`."""

    against: tuple[str, ...] = ("torch", "ort", "openvino")
    blocks: int = BLOCKS
    steps: int = STEPS
    seed: int = 0
    clock: str = "wall"  # or "thread": processor time of the calling thread, which alone works here; for machines with other work on them


class Contender(Protocol):
    """What is timed of our own."""

    def run(self) -> int:
        """One call; says how many steps."""

    def touched(self) -> Touched:
        """What the calls read."""


@dataclass(frozen=True)
class Touched:
    """Of one step of one sequence: the share of weights that open gates ask for, and the bytes that were read for it."""

    density: float
    bytes: float


@contextmanager
def one_core() -> Iterator[None]:
    """Pinned to one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def bench(path: Path, data: Inputs | None = None, settings: Settings = Settings()) -> dict[str, Any]:
    """The JSON document of `rnn2bin bench`. `data` None: a random sequence. Raises UsageError where the native runtime is not built."""
    if library.library() is None:
        raise UsageError("bench: measures the native runtime, which was not built; install a C compiler and reinstall")
    with one_core():
        rows = [row for compute in ("auto", "fp16", "int8") for row in rows_of(path, compute, data, settings)]
        return {"machine": machine(), "rows": rows}


def rows_of(path: Path, compute: str, data: Inputs | None, settings: Settings, *, batch: int = 1) -> list[dict[str, Any]]:
    """Sequences, in calls of at most 100 steps where they may be cut, and a stream (a step a call) where the network runs as one and
    `batch` is 1."""
    model = runtime.load_native(path, packed.read_config(path), compute=compute)
    section = model.spec.main
    streams = section.windowed if section.graph else model._info.streams
    most = (section.graph.steps if section.graph else None) or SEQUENCE
    if data is None:
        data = Inputs.random(model.spec, max(settings.steps, most) * batch, settings.seed)
    rows = {"sequence": calls_of(data, model.spec, most=most, whole=not streams, batch=batch)}
    if streams and batch == 1:
        rows["stream"] = calls_of(data, model.spec, most=1)
    return [_row(model, compute, call, calls, batch, settings) for call, calls in rows.items()]


def contenders(
    model: runtime.Native, calls: Sequence[Call], batch: int, settings: Settings, *, stream: bool
) -> tuple[Contender, dict[str, Steps]]:
    """Ours and the rivals, whose calls have as many steps on the mean."""
    if isinstance(model, Model):
        others = rivals.contenders(model.spec.floating, settings.against, steps=mean_steps(calls), batch=batch)
        return Ours(model, calls, batch=batch), others
    from rnn2bin.bench import graphs

    return graphs.Ours(model, calls, stream=stream), graphs.rivals(model, calls, settings.against)


def _row(model: runtime.Native, compute: str, call: str, calls: Sequence[Call], batch: int, settings: Settings) -> dict[str, Any]:
    """Times are of one step of the whole batch; weights and bytes of one step of one sequence."""
    ours, others = contenders(model, calls, batch, settings, stream=call == "stream")
    times = interleaved({"native": ours.run, **others}, settings, clock=CLOCKS[settings.clock])
    touched = ours.touched()
    layer, mine = model.spec.entry.layers[0], times["native"]
    weights = model.config.get("weights", "fp16")
    bandwidth = read_bandwidth(model_bytes(model.spec, weights, compute=compute))
    return {
        "cell": layer.cell,
        "hidden_size": layer.hidden_size,
        "layers": len(model.spec.entry.layers),
        "call": call,
        "steps_per_call": mean_steps(calls),
        "batch": batch,
        "compute": compute,
        "weights": weights,
        "density": touched.density,
        "us_per_step": float(np.median(mine)),
        "us_per_step_min": float(np.min(mine)),
        "bytes_touched_per_step": touched.bytes,
        "read_gb_per_s": bandwidth,
        "bandwidth_share": batch * touched.bytes / float(np.median(mine)) / 1e3 / bandwidth,
        "rivals": {name: against(mine, theirs, settings.seed) for name, theirs in times.items() if name != "native"},
    }


class Ours:
    """The native runtime on `calls`, again from the first where they end."""

    def __init__(self, model: Model, calls: Sequence[Call], *, batch: int = 1) -> None:
        longest = max(len(call.x) for call in calls)
        self.spec, self.handle, self.calls = model.spec, Handle(model, batch, longest), calls
        self.y = np.empty((1 if model._info.per_sequence else longest, batch, model._info.output_size), np.float32)
        self.at = 0
        self._given = [(call.x.ctypes.data, len(call.x), call.first) for call in calls]
        self._run, self._reset, self._out = model._native.r2b_run, model._native.r2b_reset, self.y.ctypes.data

    def run(self) -> int:
        """One call."""
        address, steps, first = self._given[self.at]
        if first:
            self._reset(self.handle.address)
        self._run(self.handle.address, address, steps, None, self._out)
        self.at = (self.at + 1) % len(self._given)
        return steps

    def touched(self) -> Touched:
        found = self.handle.counters()
        return Touched(found.weights / found.steps / dense_weights(self.spec.floating), found.bytes / found.steps)


def interleaved(
    contenders: dict[str, Steps], settings: Settings, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Name -> µs a step in each block. Every block runs every contender once, in an order of its own, after a warm-up."""
    order, found = list(contenders), {name: np.empty(settings.blocks) for name in contenders}
    shuffle = random.Random(settings.seed).shuffle
    for run in contenders.values():
        run()
    for block in range(settings.blocks):
        shuffle(order)
        for name in order:
            run, done = contenders[name], 0
            began = clock()
            while done < settings.steps:
                done += run()
            found[name][block] = (clock() - began) / done * 1e6
    return found


def against(ours: np.ndarray, theirs: np.ndarray, seed: int) -> dict[str, Any]:
    """Rival time / ours: median of the blocks' ratios, with a bootstrap interval."""
    ratios = theirs / ours
    picks = np.random.default_rng(seed).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return {"us_per_step": float(np.median(theirs)), "ratio": float(np.median(ratios)), "ci95": [float(low), float(high)]}


def dense_weights(spec: RnnSpec) -> int:
    """Weights a step touches with every gate open: all matrices, but those that tokens have folded into a table."""
    section: SectionSpec = spec.entry
    total = sum(layer_weights(layer) for layer in section.layers)
    for layer in (section.layers[index] for index in section.token_layers):
        total -= layer.directions * sum(math.prod(shape) for name, shape in layer.tensors().items() if name.endswith("weight_ih"))
    head = sum(linear.in_features * linear.out_features for linear in section.head)
    return total + (head if section.readout == "all" else 0)


def layer_weights(layer: LayerSpec) -> int:
    """Those of all directions' matrices."""
    return layer.directions * sum(math.prod(shape) for shape in layer.tensors().values() if len(shape) == 2)


def model_bytes(spec: RnnSpec, weights: str, *, compute: str) -> int:
    """The working set: what the weights take that steps read."""
    return dense_weights(spec) * (2 if weights == "fp16" and compute == "fp16" else 1)


def read_bandwidth(size: int, repeats: int = 20) -> float:
    """GB/s of reading `size` bytes again and again, the best of `repeats`."""
    native, size = library.library(), max(size, 1 << 16)
    assert native is not None
    memory, times, best = np.ones(size // 8, np.uint64), max(1, (1 << 24) // size), float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        native.r2b_read(memory.ctypes.data, size, times)
        best = min(best, time.perf_counter() - began)
    return size * times / best / 1e9


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "isa": library.isa(),
        "versions": {name: number for name in ("torch", "numpy", "onnxruntime", "openvino") if (number := _version(name))},
        "read_gb_per_s": {f"{size >> 10} KB": round(read_bandwidth(size), 1) for size in (1 << 19, 1 << 22, 1 << 24, 1 << 26)},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def render(found: dict[str, Any]) -> str:
    """A table for people."""
    lines = [f"{found['machine']['cpu']}, {found['machine']['isa']}; read bandwidth {found['machine']['read_gb_per_s']} GB/s"]
    for row in found["rows"]:
        shape = f"{row['layers']} x {row['cell']} {row['hidden_size']}"
        lines.append(
            f"{shape}  {row['call']:8} batch {row['batch']} {row['compute']}  density {row['density']:.3f}  "
            f"{row['us_per_step']:.2f} µs a step  {row['bytes_touched_per_step'] / 1e3:.0f} kB, "
            f"{row['bandwidth_share']:.0%} of the bandwidth"
        )
        for name, rival in row["rivals"].items():
            low, high = rival["ci95"]
            lines.append(f"    {name:16} {rival['us_per_step']:9.2f} µs   {rival['ratio']:.2f}x  [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)
