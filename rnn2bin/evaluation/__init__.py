"""Accuracy lost, density, controls and the report: from a teacher, a packed directory and held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from rnn2bin import pack, runtime, student, tasks
from rnn2bin.cells.network import Network
from rnn2bin.data import Names, Part
from rnn2bin.distill.window import run_cell
from rnn2bin.evaluation import controls as control
from rnn2bin.evaluation.bootstrap import paired_drop
from rnn2bin.evaluation.density import DensityCounter, around
from rnn2bin.evaluation.parity import NativeNetwork, parity
from rnn2bin.evaluation.stored import SCHEMA_VERSION
from rnn2bin.evaluation.watch import Watch, direction
from rnn2bin.evaluation.worst import worst
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.measure import Candidate, compare
from rnn2bin.packed import read_config
from rnn2bin.recipe import Gates
from rnn2bin.runtime.torch_backend import Model

UNNAMED = Names()


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
    names: Names = UNNAMED,
    seed: int = 0,
    native: runtime.Native | None = None,
) -> dict[str, Any]:
    """The measured fields of report.json. `binary` is the packed model on the torch backend: bits;
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
    more = others | (extra or {})
    second = compare(task, part, Candidate(teacher, FLOAT, run_cell), more, judges_teacher=False) if more else {}
    report = {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "metric": {"name": task.metric, "higher_is_better": task.higher_is_better},
        "teacher": first["teacher"].to_dict(),
        "soft_student": first["soft_student"].to_dict(),
        "binary": first["binary"].to_dict(),
        "native": first["native"].to_dict() if native else None,
        "drop": drop(task, first["teacher"], first["binary"]),
        "controls": {name: m.to_dict() for name, m in second.items()},
        "gates": gate_table(model.network, rates),
        "density": {**watch.density.result(), "around": around(model.network)},
        "parity": parity(model.network, native, part) if native else None,
        "worst": worst(
            task, part, teacher=Candidate(teacher, FLOAT, run_cell), binary=Candidate(model.network, BINARY), measured=first, names=names
        ),
        "figures": watch.figures(names).to_dict(),
    }
    return report


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
    """`open_rate` of z is the share of updated units (bit 0): what costs. `copies`: decisions a unit takes; `shared`: units that read one
    row of the gate's weights."""
    levels = student.level_summary(network)
    return [
        {
            "layer": prefix.rpartition(".")[0],
            "direction": direction(prefix),
            "gate": gate,
            "binary": cell.binary[k],
            "copies": cell.layer.copies,
            "shared": cell.layer.shared,
            "open_rate": 1 - rates[prefix][k] if gate == "z" else rates[prefix][k],
            "levels": levels[prefix][k],
        }
        for prefix, cell in network.cells().items()
        for k, gate in enumerate(cell.layer.kind.gate_names)
    ]


def load_model(path: Path) -> Model:
    from rnn2bin.runtime import torch_backend

    return torch_backend.load(path)


def load_native(path: Path) -> runtime.Native | None:
    """The packed model on the C runtime; None where that was not built, or leaves the network to torch."""
    config = read_config(path)
    return runtime.load_native(path, config) if runtime.runs_natively(config) else None


def sizes(source_bytes: int, folder: Path) -> dict[str, int]:
    return {"source_bytes": source_bytes, "packed_bytes": pack.packed_bytes(folder)}
