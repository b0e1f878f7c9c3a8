"""Accuracy lost, density, controls and the report: from a teacher, a packed directory and held-out data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rnn2bin import pack, runtime, student, tasks
from rnn2bin.cells.network import Network, Output, valid_steps
from rnn2bin.data import Part
from rnn2bin.distill.window import run_cell
from rnn2bin.evaluation import controls as control
from rnn2bin.evaluation.bootstrap import paired_drop
from rnn2bin.evaluation.density import DensityCounter, around
from rnn2bin.evaluation.html import Figures, Heatmap, Histogram
from rnn2bin.evaluation.parity import NativeNetwork, parity
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize, sample
from rnn2bin.measure import Candidate, compare
from rnn2bin.packed import read_config
from rnn2bin.recipe import Gates
from rnn2bin.runtime.torch_backend import Model

SCHEMA_VERSION = 1
BINS = 40
HEATMAP_STEPS, HEATMAP_UNITS = 96, 64
WORST = 5


@dataclass
class Watch:
    """Looks at every output once: density and open rates of the binary network, histograms of gates, the first sequence's bits."""

    student: Network
    soft_mode: Discretize
    density: DensityCounter
    before: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    after: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    heat: list[tuple[str, Tensor]] = field(default_factory=list)
    heat_tokens: Tensor | None = None

    def seen(self, name: str, prepared: tasks.Prepared, out: Output) -> None:
        if name == "binary":
            self.density.add(prepared, out)
            if not self.heat:
                self._first_sequence(prepared, out)
        elif name == "teacher":
            self._histogram(self.before, out, FLOAT)
        elif name == "soft_student":
            self._histogram(self.after, out, self.soft_mode)

    def _cells(self, out: Output):
        for (prefix, cell), pre, lengths in zip(self.student.cells().items(), out.pre, out.lengths, strict=True):
            yield prefix, cell, pre, lengths

    def _histogram(self, into: dict[tuple[str, str], Tensor], out: Output, mode: Discretize) -> None:
        for prefix, cell, pre, lengths in self._cells(out):
            real = pre if lengths is None else pre[valid_steps(lengths, pre.shape[0])[..., 0]]
            for k, gate in enumerate(cell.layer.kind.gate_names[: real.shape[-2]]):  # the teacher's may be fewer
                values = sample(cell.modes(mode)[k], real[..., k, :]).float().cpu()
                counts = torch.histc(values, BINS, 0.0, 1.0)
                into[prefix, gate] = into.get((prefix, gate), torch.zeros(BINS)) + counts

    def _first_sequence(self, prepared: tasks.Prepared, out: Output) -> None:
        aligned = True  # whether the cells' steps are the input's
        for prefix, cell, pre, lengths in self._cells(out):
            decoder = prefix.startswith("decoder.")
            aligned &= decoder or (len(pre) == len(prepared.inputs) and lengths is prepared.lengths)
            steps = min(int(lengths[0]) if lengths is not None else pre.shape[0], HEATMAP_STEPS)
            for k, gate in enumerate(cell.layer.kind.gate_names):
                if cell.binary[k]:
                    bits = (pre[:steps, 0, k, :HEATMAP_UNITS] > 0).int().cpu()
                    # z = 1 keeps: drawn as the others, "open" is what costs
                    self.heat.append((f"{prefix} {gate}", 1 - bits if gate == "z" else bits))
        if aligned and not prepared.inputs.is_floating_point():
            self.heat_tokens = prepared.inputs[:HEATMAP_STEPS, 0].cpu()

    def figures(self, names: tuple[str, ...] | None) -> Figures:
        edges = torch.linspace(0, 1, BINS + 1).numpy()
        histograms = [
            Histogram(prefix.rpartition(".")[0], _direction(prefix), gate, edges, before.numpy(), self.after[prefix, gate].numpy())
            for (prefix, gate), before in self.before.items()
        ]
        main = self.student.spec.decode is None
        rows = [(label, bits.numpy()) for label, bits in self.heat if main or label.startswith("encoder")]
        tokens = None if self.heat_tokens is None else [names[int(t)] if names else str(int(t)) for t in self.heat_tokens]
        steps = min((len(bits) for _, bits in rows), default=0)
        heat = Heatmap(tokens[:steps] if tokens else None, [(label, bits[:steps]) for label, bits in rows]) if rows else None
        return Figures(histograms, heat)


def _direction(prefix: str) -> str:
    return "backward" if prefix.endswith("bwd") else "forward"


def evaluate_parts(
    *,
    teacher: Network,
    model: Model,
    task: tasks.Task,
    part: Part,
    soft_mode: Discretize,
    gates: Gates,
    with_controls: bool = True,
    extra: dict[str, Candidate] | None = None,
    vocabulary: tuple[str, ...] | None = None,
    seed: int = 0,
    native: runtime.Native | None = None,
) -> tuple[dict[str, Any], Figures]:
    """The measured fields of report.json, and the figures of report.html. `binary` is the packed model on the torch backend: bits;
    `native` the same files on the C runtime, compared with it step by step too (`parity`)."""
    watch = Watch(model.network, soft_mode, DensityCounter(model.network))
    # Controls need the open rates, so they run in a second pass over the same part.
    first = compare(
        task,
        part,
        Candidate(teacher, FLOAT, run_cell),
        {
            "soft_student": Candidate(model.network, soft_mode, run_cell),
            "binary": Candidate(model.network, BINARY),
            **({"native": Candidate(cast(Network, NativeNetwork(native)), BINARY)} if native else {}),
        },
        seen=watch.seen,
    )
    rates = {name: watch.density.open_rate(name) for name in model.network.cells()}
    others = control.controls(teacher, model.network, gates, rates, seed=seed) if with_controls else {}
    second = compare(task, part, Candidate(teacher, FLOAT, run_cell), {**others, **(extra or {})}) if others or extra else {}
    report = {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "metric": {"name": task.metric, "higher_is_better": task.higher_is_better},
        "teacher": first["teacher"].to_dict(),
        "soft_student": first["soft_student"].to_dict(),
        "binary": first["binary"].to_dict(),
        "native": first["native"].to_dict() if native else None,
        "drop": drop(task, first["teacher"], first["binary"]),
        "controls": {name: m.to_dict() for name, m in second.items() if name != "teacher"},
        "gates": gate_table(model.network, rates),
        "density": {**watch.density.result(), "around": around(model.network)},
        "parity": parity(model.network, native, part) if native else None,
        "worst": worst(task, part, first["teacher"], first["binary"], vocabulary),
    }
    return report, watch.figures(vocabulary)


def drop(task: tasks.Task, teacher: tasks.Measurement, binary: tasks.Measurement) -> dict[str, Any]:
    """Paired bootstrap over held-out sequences; positive is worse."""
    found = paired_drop(
        teacher.totals.double().numpy(),
        binary.totals.double().numpy(),
        weights=teacher.counts.double().numpy(),
        higher_is_better=task.higher_is_better,
    )
    return {"value": found.value, "relative": found.relative, "ci95": list(found.ci95), "n": found.n}


def gate_table(network: Network, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """`open_rate` of z is the share of updated units (bit 0): what costs."""
    levels = student.level_summary(network)
    return [
        {
            "layer": prefix.rpartition(".")[0],
            "direction": _direction(prefix),
            "gate": gate,
            "binary": cell.binary[k],
            "copies": cell.layer.copies,
            "open_rate": 1 - rates[prefix][k] if gate == "z" else rates[prefix][k],
            "levels": levels[prefix][k],
        }
        for prefix, cell in network.cells().items()
        for k, gate in enumerate(cell.layer.kind.gate_names)
    ]


def worst(
    task: tasks.Task, part: Part, teacher: tasks.Measurement, binary: tasks.Measurement, names: tuple[str, ...] | None
) -> list[dict[str, Any]]:
    """The sequences on which the binary network loses most against the teacher."""
    of = lambda m: m.totals.double() / m.counts.double().clamp_min(1)
    lost = (of(teacher) - of(binary)) * (1 if task.higher_is_better else -1)
    rows = []
    for index in lost.argsort(descending=True, stable=True)[:WORST].tolist():
        if lost[index] <= 0:
            break
        rows.append(
            {
                "index": index,
                "input": _shown(part, index, names),
                "teacher": f"{float(of(teacher)[index]):.4g}",
                "binary": f"{float(of(binary)[index]):.4g}",
                "difference": f"{float(lost[index]):.4g}",
            }
        )
    return rows


def _shown(part: Part, index: int, names: tuple[str, ...] | None) -> str:
    """A sequence in a line: its tokens, or its shape."""
    from rnn2bin.data import TEXT_BLOCK

    if part.stream:
        block, row = divmod(index, len(part))
        tokens = part.inputs[row, block * TEXT_BLOCK : block * TEXT_BLOCK + 60]
    elif part.tokens:
        length = int(part.lengths[index]) if part.lengths is not None else part.inputs.shape[1]
        tokens = part.inputs[index, : min(length, 60)]
    else:
        return f"sequence {index}: {tuple(part.inputs[index].shape)}"
    return "".join(names[int(t)] for t in tokens) if names and all(len(n) == 1 for n in names) else " ".join(str(int(t)) for t in tokens)


def load_model(path: Path) -> Model:
    from rnn2bin.runtime import torch_backend

    return torch_backend.load(path)


def load_native(path: Path) -> runtime.Native | None:
    """The packed model on the C runtime; None where that was not built, or leaves the network to torch."""
    config = read_config(path)
    return runtime.load_native(path, config) if runtime.runs_natively(config) else None


def sizes(source_bytes: int, folder: Path) -> dict[str, int]:
    return {"source_bytes": source_bytes, "packed_bytes": pack.packed_bytes(folder)}
