"""Reader of ONNX graphs: which axes of the input are batch and time, which inputs are states, which output is the network's.

A file that takes one step a call and hands its state in and out is a sequence network too: what stands around its layers is run on all
steps of all sequences at once, the layers on the sequences. That this gives what stepping the file gives is tried, not assumed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.loaders import onnx_recurrent  # noqa: F401  its operations are known then
from rnn2bin.loaders.assemble import Assembly
from rnn2bin.loaders.graph import MOST_ELEMENTS, SINGLE, GraphBuilder, close
from rnn2bin.loaders.onnx_ends import never_read, scores
from rnn2bin.loaders.onnx_open import Widths, Windows, WindowTracer, compared, widths
from rnn2bin.loaders.onnx_proto import Graph, Input, read_graph
from rnn2bin.loaders.onnx_trace import Tracer, Value
from rnn2bin.recipe import Source

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = ((29, 17), (64, 128), (400, 640))  # T of the two probes, tried in turn where the file leaves it open
BATCHES = (2, 3)  # B of the two probes
KNOWN = {"inputs", "input_shape", "output"}


@dataclass(frozen=True)
class Layout:
    """Which axes of the file's input are the batch and the time; without either the input has rows, all steps of all sequences on axis 0.
    `features`: the sizes of the other axes, in order."""

    batch: int | None
    time: int | None
    features: tuple[int, ...]

    @property
    def rows(self) -> bool:
        return self.batch is None or self.time is None

    def shape(self, dims: Sequence[int | None], batch: int, steps: int) -> tuple[int, ...]:
        """Of the file's input at a probe; B·T rows."""
        if self.rows:
            return (batch * steps, *(n or 1 for n in dims[1:])) if len(dims) - 1 != len(self.features) else (batch * steps, *self.features)
        rest = iter(self.features)
        return tuple(batch if k == self.batch else steps if k == self.time else next(rest) for k in range(len(dims)))


def bounded(shape: Sequence[int]) -> Sequence[int]:
    """The shape of an input, where its numbers can be held."""
    if math.prod(shape) > MOST_ELEMENTS:
        raise UnsupportedError(f"an input of shape {tuple(shape)}; refused, it would exhaust the memory")
    return shape


class _Decided(UnsupportedError):
    """What no other reading of the file would change."""


class _NotRead(UnsupportedError):
    """The input is none that a layer reads: another may be."""


def read(path: Path, source: Source) -> Assembly:
    """Raises what `onnx_proto.read_graph` raises; a network that is not recognised comes back with the reasons and the file's tensors."""
    others = sorted(source.given - KNOWN)
    if others:
        raise UsageError(f"source: {', '.join(others)}: an ONNX file says itself how its parts join; it takes {', '.join(sorted(KNOWN))}")
    graph = read_graph(path)
    graph, notes = scores(graph)
    try:
        return _with(_read(graph, source), graph, notes)
    except UnsupportedError as error:
        if why := never_read(graph):
            return Assembly(None, graph.tensors, [why], tensors=graph.tensors)
        found = _closed(graph, source)
        if isinstance(found, Assembly):
            return _with(found, graph, notes)
        draft, reasons = found or (None, error.reasons)
        return Assembly(None, graph.tensors, list(dict.fromkeys(reasons)), draft=draft, tensors=graph.tensors)


def _with(found: Assembly, graph: Graph, notes: Sequence[str]) -> Assembly:
    return replace(found, files=list(graph.files), notes=[*found.notes, *notes])


def _closed(graph: Graph, source: Source) -> Assembly | tuple[dict[str, Any], list[str]] | None:
    """What the file itself tells of what it leaves open: the network, where only one value fits; else the `source:` to start from, which
    reads the file, and a line for each knob in it. None where nothing was found, or it does not read the file."""
    draft: dict[str, Any] = {}
    reasons: list[str] = []
    for one in graph.inputs:
        numbers = compared(graph, one.name) if one.integer and not one.dims and one.name not in source.inputs else []
        if len(numbers) == 1:
            draft.setdefault("inputs", {})[one.name] = numbers[0]
            reasons.append(
                f"the network depends on the input {one.name!r}, which the file compares with {numbers[0]}; where that is its value, give "
                f"--set source.inputs.{one.name}={numbers[0]}"
            )
    known = source.model_copy(update={"inputs": {**source.inputs, **draft.get("inputs", {})}})
    main = next((one for one in graph.inputs if not one.integer and len(one.dims) > 1 and one.dims[-1] is None), None)
    fit = _widths(graph, known, main) if main is not None and source.input_shape is None else None
    if fit is not None and main is not None:
        draft["input_shape"] = [fit.fitting]
        reasons.append(
            f"the input {main.name!r} {_written(main)} leaves open how wide one step is: {fit.least} to {fit.most} run, and {fit.fitting} "
            "is the least that its convolutions read as often as the most; where the model's description says so too, give "
            f"--set source.input_shape=[{fit.fitting}]"
        )
    if not draft:
        return None
    try:
        whole = _read(graph, known.model_copy(update={"input_shape": draft.get("input_shape", source.input_shape)}))
    except UnsupportedError:
        return None
    if fit is not None and main is not None and fit.only and list(draft) == ["input_shape"]:
        note = f"file: one step of {main.name} is {fit.least} wide, the only width that fits"
        return replace(whole, notes=[*whole.notes, note])
    return draft, reasons


def _widths(graph: Graph, source: Source, main: Input) -> Widths | None:
    sizes = {n for tensor in graph.tensors.values() for n in tensor.shape}
    return widths(lambda width: _windows(graph, source.model_copy(update={"input_shape": [width]}), main), sizes)


def _windows(graph: Graph, source: Source, main: Input) -> Windows | None:
    """What convolutions give where the file runs on steps of that shape, each call or sequence one step or many."""
    for layout in _layouts(main, source, carried=len(graph.inputs) > 1):
        if isinstance(layout, str):
            return None
        reading = _Reading(graph, source, main, layout, LENGTHS[0])
        tracer = WindowTracer(**vars(reading.tracer()))
        try:
            outputs = tracer.run(graph, reading.feeds(tracer))
        except UnsupportedError:
            continue
        if any(one.recurrent for one in outputs) and not (tracer.states and any(steps != 1 for steps, _ in tracer.steps) and layout.rows):
            return tuple(tracer.windows)
    return None


def _read(graph: Graph, source: Source) -> Assembly:
    names = [one.name for one in graph.inputs]
    unknown = [name for name in source.inputs if name not in names]
    if unknown:
        raise UnsupportedError(*(f"source: no input {name!r}; inputs: {', '.join(names)}" for name in unknown))
    if source.output is not None and source.output not in graph.outputs:
        raise UnsupportedError(f"source: no output {source.output!r}; outputs: {', '.join(graph.outputs)}")
    open_inputs = [one for one in graph.inputs if one.name not in source.inputs]
    mains = [one for one in open_inputs if len(one.dims) > 1 or (one.dims and len(open_inputs) == 1)]
    if not mains:
        raise UnsupportedError("no input of two or more axes: no sequence to read")
    problems: list[str] = []
    for main in mains:
        carried = len(open_inputs) > 1
        for layout, lengths in itertools.product(_layouts(main, source, carried=carried), _lengths(main)):
            if isinstance(layout, str):
                problems.append(layout)
                continue
            if layout.rows and lengths != LENGTHS[0]:  # they have no length
                continue
            try:
                return _Reading(graph, source, main, layout, lengths).assembly()
            except _Decided:
                raise
            except _NotRead as error:
                problems += error.reasons
                break
            except UnsupportedError as error:
                problems += error.reasons
        else:
            if main.dims[0] is not None:
                problems.append("the file names the size of the batch; where that is in the way, export it with a dynamic batch axis")
            break
    told = {re.sub(r"\d+", "", problem): problem for problem in reversed(problems)}  # the same with other sizes is no news
    raise UnsupportedError(*reversed(told.values()))


def _layouts(main: Input, source: Source, *, carried: bool) -> Iterator[Layout | str]:
    """The readings of the input's axes to try, likely ones first; a line where the file leaves open what it must say."""
    dims, rank = list(main.dims), len(main.dims)
    if source.input_shape is not None:
        at = rank - len(source.input_shape)
        if at < 1 or any(n not in (None, wanted) for n, wanted in zip(dims[at:], source.input_shape, strict=True)):
            yield f"source: input_shape {source.input_shape} does not fit the input {main.name!r} {_written(main)}"
            return
        dims[at:] = source.input_shape
        ways = [(0, 1), (1, 0)] if at == 2 else [(0, None)] if at == 1 else [(0, k) for k in range(1, at)]
        for batch, time in ways:
            yield _layout(dims, batch, time)
        return
    if rank == 1:
        yield Layout(None, 0, ())
        return
    one_step = carried and dims[1] == 1 and rank > 2
    if one_step and None not in dims[2:]:
        yield Layout(0, None, tuple(n for n in dims[2:] if n))
    if rank == 2 and not main.integer and dims[1] is not None:
        yield Layout(0, None, (dims[1],))
    times = [k for k in range(1, rank) if dims[k] is None] if rank > 2 else []
    for time in times or [1]:
        if None in [n for k, n in enumerate(dims) if k not in (0, time)]:
            yield (
                f"the input {main.name!r} {_written(main)} leaves open how wide one step is; say it in the recipe: "
                "source: {input_shape: [WIDTH]}"
            )
            return
        yield _layout(dims, 0, time)
    if rank > 1 and None not in dims[2:]:
        yield _layout(dims, 1, 0)


def _layout(dims: Sequence[int | None], batch: int, time: int | None) -> Layout:
    return Layout(batch, time, tuple(n or 1 for k, n in enumerate(dims) if k not in (batch, time)))


def _lengths(main: Input) -> list[tuple[int, int]]:
    """T at the two probes. A length that the file names is tried free as well: many a file is only exported without its free axes."""
    stated = [n for n in main.dims if n is not None and n > 1]
    return [*LENGTHS, *((n, n) for n in stated)]


def _written(main: Input) -> str:
    return "(" + ", ".join(str(n or symbol or "?") for n, symbol in zip(main.dims, main.symbols, strict=True)) + ")"


@dataclass(frozen=True)
class _Reading:
    """One reading of the file: its input, which axes are what, and T at the probes."""

    graph: Graph
    source: Source
    main: Input
    layout: Layout
    lengths: tuple[int, int]

    def assembly(self) -> Assembly:
        tracer = self.tracer()
        outputs = tracer.run(self.graph, self.feeds(tracer))
        at = self.chosen(tracer, outputs)
        name, fixed = self.output(tracer, outputs[at]), self.lengths[0] == self.lengths[1]
        if self.main.integer and tracer.embedding is None:
            raise UnsupportedError(f"the input {self.main.name!r} holds whole numbers, which no embedding table (Gather) or OneHot reads")
        if tracer.states and not self.layout.rows and all(steps == 1 for steps, _ in tracer.steps):
            raise (_Decided if None in self.main.dims[1:] else UnsupportedError)(
                f"its layers take one step a call, and the input {self.main.name!r} {_written(self.main)} does not say how wide that is; "
                "say it in the recipe: source: {input_shape: [WIDTH]}"
            )
        found = tracer.builder.network(
            name,
            input_shape=() if self.main.integer else self.layout.features,
            batch_first=not self.layout.rows and self.layout.batch == 0,
            embedding=tracer.embedding,
            steps=self.lengths[0] if fixed and not self.layout.rows else None,
        )
        if self.layout.rows:
            self.compare(found, at, list(dict.fromkeys(tracer.states)))
        return replace(found, notes=self.notes(at, tracer))

    def tracer(self) -> Tracer:
        return Tracer(
            GraphBuilder(),
            rows=tuple(b * t for b, t in self.sizes()) if self.layout.rows else (),
            counted="tokens" if self.main.integer else "input",
            fixed_batch=self.main.dims[self.layout.batch] if self.layout.batch is not None else None,
        )

    def sizes(self) -> list[tuple[int, int]]:
        """(B, T) of each probe; a file of rows is tried with one row a step."""
        return [(b, 1 if self.layout.rows else t) for b, t in zip(BATCHES, self.lengths, strict=True)]

    def feeds(self, tracer: Tracer) -> dict[str, Value]:
        import torch

        generator = torch.Generator().manual_seed(0)
        shapes = [bounded(self.layout.shape(self.main.dims, b, t)) for b, t in self.sizes()]
        if self.main.integer:
            data = tuple(torch.randint(2, shape, generator=generator) for shape in shapes)
        else:
            data = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        return {one.name: self.value(one, tracer, data) for one in self.graph.inputs}

    def value(self, one: Input, tracer: Tracer, data: tuple[Tensor, ...]) -> Value:
        import torch

        if one.name in self.source.inputs:
            given = torch.as_tensor(self.source.inputs[one.name], dtype=torch.int64 if one.integer else torch.float32)
            if any(n is None for n in one.dims) or given.numel() != torch.Size(one.dims).numel():  # type: ignore[arg-type]
                raise UnsupportedError(f"source: input {one.name!r} has shape {_written(one)}; {given.numel()} numbers are given")
            return Value((given.reshape(one.dims),))  # type: ignore[arg-type]
        deps = frozenset({one.name})
        if one.name == self.main.name:
            name = self.entry(tracer, "tokens" if one.integer else "input")
            rows = self.entry(tracer, "input", wide=True) if one.integer else ""
            return Value(data, name, deps, one.name, rows)
        made = []
        for batch, steps in self.sizes():
            shape = [batch if n is None else n for n in one.dims]
            made.append(torch.full(bounded(shape), steps) if one.integer else torch.zeros(bounded(shape)))
        return Value(tuple(made), "lengths" if one.integer and len(one.dims) == 1 else None, deps, one.name)

    def entry(self, tracer: Tracer, name: str, *, wide: bool = False) -> str:
        """The builder's `input` or `tokens`, with the axes of the file; `wide`: the rows of an embedding, one axis more."""
        layout, rank = self.layout, len(self.main.dims)
        if layout.rows:
            sizes = [-1] if wide else self.layout.shape(self.main.dims, 1, 1)[1:]
            shape = tracer.builder.literal([-1, *sizes])
            if not wide:
                return (
                    tracer.builder.add("Reshape", name, shape)
                    if rank > 1 or self.main.integer
                    else tracer.builder.add("Flatten", name, axis=0)
                )
            return tracer.builder.add("Flatten", name, axis=2)
        if {layout.batch, layout.time} == {0, 1}:
            return name
        assert layout.batch is not None
        assert layout.time is not None
        order = [layout.batch, layout.time, *(k for k in range(rank) if k not in (layout.batch, layout.time))]
        return tracer.builder.add("Transpose", name, perm=[order.index(k) for k in range(rank)] + [rank] * wide)

    def chosen(self, tracer: Tracer, outputs: Sequence[Value]) -> int:
        """The output that the recipe names, or the first that a layer leads to and that can be made from the sequence alone."""
        if self.source.output is not None:
            candidates = [self.graph.outputs.index(self.source.output)]
        else:
            candidates = [k for k, one in enumerate(outputs) if one.recurrent or one.problems]
            candidates.sort(key=lambda k: bool(tracer.states) and outputs[k].last)  # states go out where states come in
        if not candidates:
            raise UnsupportedError("no LSTM or GRU layer leads to an output; there is no gate to make binary")
        best = next((k for k in candidates if outputs[k].name and not outputs[k].problems), candidates[0])
        found = outputs[best]
        if found.problems:
            raise (_Decided if tracer.unknown else UnsupportedError)(*found.problems)
        if not found.recurrent:
            raise UnsupportedError(f"no LSTM or GRU layer leads to the output {self.graph.outputs[best]!r}")
        if not any(self.main.name in deps for deps in tracer.read):
            raise _NotRead(f"no layer reads the input {self.main.name!r}")
        counts = {one.name for one in self.graph.inputs if one.integer and len(one.dims) == 1}
        others = found.deps - {self.main.name, *(counts & {*tracer.lengths})}
        if found.name is None or others:
            names = ", ".join(sorted(others or found.deps))
            raise UnsupportedError(
                f"the output {self.graph.outputs[best]!r} depends on more than one real input ({names}); a number that is always the same "
                "can be fixed in the recipe: source: {inputs: {NAME: NUMBER}}"
            )
        return best

    def output(self, tracer: Tracer, value: Value) -> str:
        """The output's name in the builder; from rows back to (T,B,O)."""
        assert value.name is not None
        builder = tracer.builder
        if not self.layout.rows:
            single = [axis for axis in range(value.data[0].ndim) if all(t.shape[axis] == 1 for t in value.data)]
            surplus = single[: max(0, value.data[0].ndim - 3)]
            return builder.add("Squeeze", value.name, axes=surplus) if surplus else value.name
        counted = builder.add("Slice", builder.add("Shape", tracer.counted), *(builder.literal([n]) for n in (0, 2, 0)))
        width = value.data[0].numel() // tracer.rows[0]
        return builder.add("Reshape", value.name, builder.add("Concat", counted, builder.literal([width]), axis=0))

    def notes(self, at: int, tracer: Tracer) -> list[str]:
        of = f" (of {', '.join(self.graph.outputs)})" if len(self.graph.outputs) > 1 else ""
        notes = [f"file: input {self.main.name} {_written(self.main)}, output {self.graph.outputs[at]}{of}"]
        if states := list(dict.fromkeys(tracer.states)):
            notes.append(f"file: carried states {', '.join(states)}: zero at first, carried here by the layers themselves")
        if self.layout.rows:
            notes.append("file: takes one step a call, or one sequence; here whole sequences, with the same outputs (tried)")
        notes += [f"file: input {name} fixed at {number}" for name, number in self.source.inputs.items()]
        return notes

    # --- does the sequence network give what the file gives step by step? ---

    def compare(self, found: Assembly, at: int, states: Sequence[str]) -> None:
        import torch

        from rnn2bin.cells.network import teacher_network

        assert found.spec is not None
        generator, batch, steps = torch.Generator().manual_seed(1), 2, 5
        shape = (steps, batch, *self.layout.features)
        x = torch.randint(2, shape, generator=generator) if self.main.integer else torch.randn(shape, generator=generator)
        ours = teacher_network(found.spec, found.weights)(x).y
        if self.graph_steps(x[0], states):
            theirs = torch.cat([self.stepped(x[:, b : b + 1], at, states) for b in range(batch)], 1)
        else:
            theirs = torch.stack([self.called(x[:, b], {})[at] for b in range(batch)], 1)
        if not close(ours, theirs.reshape(ours.shape), tolerance=SINGLE):
            raise UnsupportedError("run over a sequence, the network does not give what the file gives called step by step")

    def graph_steps(self, x: Tensor, states: Sequence[str]) -> bool:
        """Whether a call with N rows is one step of N sequences, and not N steps of one."""
        tracer = Tracer(GraphBuilder())
        tracer.run(self.graph, self.called_with(x, {}))
        return tracer.steps[0][0] == 1

    def stepped(self, x: Tensor, at: int, states: Sequence[str]) -> Tensor:
        """The file called for every step of x (T,1,…), each state going out and in again."""
        import torch

        carried: dict[str, Tensor] = {}
        outputs = []
        for x_t in x:
            made = self.called(x_t, carried)
            fed = {name: self.called_with(x_t, carried)[name].data[0] for name in states}
            back = [k for k in range(len(made)) if k != at]
            carried = {}
            for name, before in fed.items():
                k = next((k for k in back if made[k].shape == before.shape), None)
                if k is None:
                    raise UnsupportedError(f"no output gives the state {name!r} back")
                back.remove(k)
                carried[name] = made[k]
            outputs.append(made[at])
        return torch.stack(outputs)

    def called(self, rows: Tensor, carried: dict[str, Tensor]) -> list[Tensor]:
        """The file's outputs for `rows` (N,·) and states; zeros where none are given."""
        import torch

        outputs = Tracer(GraphBuilder()).run(self.graph, self.called_with(rows, carried))
        return [one.data[0] if one.data else torch.empty(0) for one in outputs]

    def called_with(self, rows: Tensor, carried: dict[str, Tensor]) -> dict[str, Value]:
        import torch

        shape = self.layout.shape(self.main.dims, len(rows), 1)
        feeds = {}
        for one in self.graph.inputs:
            if one.name == self.main.name:
                feeds[one.name] = Value((rows.reshape(shape),), None, frozenset({one.name}))
            elif one.name in self.source.inputs:
                feeds[one.name] = self.value(one, self.tracer(), ())
            else:
                size = bounded([len(rows) if n is None else n for n in one.dims])
                zero = torch.ones(size, dtype=torch.int64) if one.integer else torch.zeros(size)
                feeds[one.name] = Value((carried.get(one.name, zero),), None, frozenset({one.name}), one.name)
        return feeds
