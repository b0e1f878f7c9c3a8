"""`convert --plan`: what a conversion would do, need and take, before it starts. Nothing is written.

Sizes follow from shapes; time is measured on a few real training steps and one real measurement of this network and this data.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnn2bin import data, student, tasks
from rnn2bin.cells.network import Network, State
from rnn2bin.distill import anneal, answers, calibrate, checkpoints, losses, native, rate, states
from rnn2bin.distill import trainer as distiller
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import ResourceError
from rnn2bin.gates.estimators import BINARY, FLOAT
from rnn2bin.loaders import render as render_spec
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Recipe
from rnn2bin.spec import LayerSpec

WARM_UP, PROBE_STEPS = 2, 6
CALIBRATION_PROBE = 2
PROBE_SECONDS = 20.0  # a slow network is probed with fewer steps, at least two
PROBE_SEQUENCES, PROBE_WINDOW = 256, 256
CHECKPOINTS = checkpoints.KEPT + 1  # one more while it is written
REPORT_BYTES = 1 << 20  # report.html and report.json
FIXED_BYTES = 1 << 16  # of a checkpoint: random states, trainer state, history

Plan = dict[str, Any]


def plan(model: str | Path, recipe: Recipe, given: str | Path | Sequence[str] | None, out: str | Path | None = None) -> Plan:
    """What `convert` would do with these, as plain data; `render` makes text of it. Raises what `convert` would raise before training."""
    with torch.random.fork_rng(devices=[]):  # networks are made and noise is drawn: a plan leaves no trace
        return _plan(model, recipe, given, out)


def _plan(model: str | Path, recipe: Recipe, given: str | Path | Sequence[str] | None, out: str | Path | None) -> Plan:
    from rnn2bin import pipeline

    folder = Path(out) if out is not None else Path(Path(model).name + ".rnn2bin")
    began = time.perf_counter()
    job = pipeline.prepare(model, recipe, given)
    network = student.of_recipe(job.teacher, recipe, task=job.task.name)
    pipeline.check_budget(job, network)
    disk = disk_of(job, network, folder)
    preparing = time.perf_counter() - began
    return {
        "model": {name: job.loaded.provenance[name] for name in ("file", "format", "sha256", "bytes")},
        "out": str(folder),
        "sections": sections(network),
        "parameters": sum(p.numel() for p in job.teacher.parameters()),
        "task": task_of(job),
        "data": data_of(job),
        "size": {"source_bytes": job.loaded.provenance["bytes"], "packed_bytes": disk.packed},
        "disk": {"needed_bytes": disk.needed, "free_bytes": disk.free, "enough": disk.enough, "at": str(disk.at)},
        "memory": {"training_bytes": memory(job, network)},
        "steps": {"expected": recipe.train.steps, "at_most": recipe.max_steps, "evaluate_every": recipe.train.evaluate_every},
        "search": search_of(recipe),
        "time": time_of(job, network, preparing),
        "notes": list(job.notes),
    }


def search_of(recipe: Recipe) -> Plan | None:
    """What a conversion with two limits may train after the first network; None for any other."""
    if not recipe.searched:
        return None
    from rnn2bin.search import descent

    first = recipe.budget.density
    assert first is not None
    return {
        "first_density": first,
        "trainings_at_most": descent.FURTHER,
        "steps": descent.recipe_of(recipe, first).train.steps,
        "densities": [round(first * descent.RATIO**k, 4) for k in range(descent.FURTHER + 1)],
    }


# ---------------------------------------------------------------------------------------------- what is there


def sections(network: Network) -> dict[str, Plan]:
    """Section -> its embedding, layers with their gates, readout and linear layers, or what stands around the layers."""
    found = {}
    cells = network.cells()
    for name, spec in network.spec.sections.items():
        layers = []
        for index, layer in enumerate(spec.layers):
            binary = cells[f"{name}.layers.{index}.fwd"].binary
            layers.append(
                {
                    "cell": layer.cell,
                    "input_size": layer.input_size,
                    "hidden_size": layer.hidden_size,
                    "proj_size": layer.proj_size,
                    "copies": layer.copies,
                    "shared": layer.shared,
                    "directions": layer.directions,
                    "gates": {g: "binary" if b else "soft" for g, b in zip(layer.kind.gate_names, binary, strict=True)},
                }
            )
        found[name] = {
            "embedding": vars(spec.embedding) if spec.embedding else None,
            "layers": layers,
            "readout": None if spec.graph else spec.readout,
            "head": [vars(linear) for linear in spec.head],
            "around": render_spec.around(spec.graph) if spec.graph else [],
        }
    return found


def task_of(job: Any) -> Plan:
    """Task and metric, and what decided them."""
    recipe, task = job.recipe, job.task
    named = "named in the recipe"
    how = named if recipe.task != "auto" else _why(job)
    return {
        "name": task.name,
        "how": how,
        "metric": task.metric,
        "metric_how": named if recipe.metric != "auto" else f"the metric of task {task.name}",
        "higher_is_better": task.higher_is_better,
    }


def _why(job: Any) -> str:
    part = job.parts.train
    if job.parts.data_free:
        return "no data given: sequences sampled from the network itself"
    if job.task.name == "transduce":
        return "the network is an encoder–decoder"
    if part.stream:
        return "the data are text"
    if job.task.name == "next-token":
        return "tokens without targets, and one output for every token"
    if job.task.name == "match":
        return "the data have no targets: the network's own outputs are reproduced"
    if job.task.name == "regress":
        return "targets are floats"
    return f"targets are whole numbers, {'one a sequence' if part.targets.ndim == 1 else 'one a step'}"


def data_of(job: Any) -> Plan:
    parts = {name: getattr(job.parts, name) for name in ("train", "valid", "test")}
    return {"data_free": job.parts.data_free, **{name: {"sequences": len(part), "steps": steps_in(part)} for name, part in parts.items()}}


def steps_in(part: data.Part) -> int:
    """Tokens or time steps in a part, pads apart."""
    if part.lengths is not None:
        return int(part.lengths.sum())
    return part.inputs.shape[0] * part.inputs.shape[1]


# ---------------------------------------------------------------------------------------------- what it needs


@dataclass(frozen=True)
class Disk:
    """Bytes of the packed directory's model, of everything at its largest, what is free, and where that was looked up."""

    packed: int
    needed: int
    free: int
    at: Path

    @property
    def enough(self) -> bool:
        return self.free >= self.needed


def disk_of(job: Any, network: Network, out: Path) -> Disk:
    control, searched = job.recipe.report.float_same_compute, search_of(job.recipe)
    beside = int(control) + (searched["trainings_at_most"] if searched else 0) + rate.ladder(job.recipe).most * rate.wanted(job.recipe)
    return space(out, packed=packed_bytes(job, network), checkpoint=checkpoint_bytes(network, job.recipe), beside=beside)


def space(out: Path, *, packed: int, checkpoint: int, beside: int) -> Disk:
    """Checkpoints and the packed directory, at the moment when most lies there; less what an interrupted run left. `beside`: trainings
    (the float control, those of a search, short runs for the rate) whose last checkpoints lie beside the student's."""
    from rnn2bin import pipeline

    work = pipeline.work_folder(out)
    there = sum(f.stat().st_size for f in work.rglob("*") if f.is_file()) if work.is_dir() else 0
    needed = (CHECKPOINTS + beside * checkpoints.KEPT) * checkpoint + packed + REPORT_BYTES
    at = next(p for p in out.absolute().parents if p.is_dir())
    return Disk(packed, max(packed + REPORT_BYTES, needed - there), shutil.disk_usage(at).free, at)


def check_disk(disk: Disk) -> None:
    """ResourceError where less is free than the conversion needs."""
    if not disk.enough:
        raise ResourceError(
            f"{disk.at}: {size(disk.free)} free, {size(disk.needed)} needed for checkpoints and the packed network; "
            "free space, or choose an --out on another disk"
        )


def packed_bytes(job: Any, network: Network) -> int:
    """fp16 weights, their table of names and shapes, and config.json."""
    from rnn2bin import pack, pipeline

    state = network.state_dict()
    header = {name: {"dtype": "F16", "shape": list(t.shape), "data_offsets": [0, 2 * t.numel()]} for name, t in state.items()}
    config = pack.config_of(network, provenance=pipeline.provenance_of(job, job.loaded.provenance["file"]), task=pipeline.task_of(job))
    weights = 2 * sum(t.numel() for t in state.values())
    return weights + len(json.dumps(header)) + len(json.dumps(config, indent=2))


def checkpoint_bytes(network: torch.nn.Module, recipe: Recipe) -> int:
    """fp32 weights, the best ones so far, Adam's two moments, the average if any, and of a Network the carried states of teacher and
    student."""
    weights = sum(t.numel() for t in network.state_dict().values())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    cells = network.spec.cell_names() if isinstance(network, Network) else ()
    sizes = sum(sum(layer.state_sizes) for _, layer in cells) * recipe.train.batch_size
    averages = 1 if recipe.train.averaging else 0
    return 4 * (2 * weights + (2 + averages) * trained + 2 * sizes) + FIXED_BYTES


def memory(job: Any, network: Network) -> int:
    """Estimate of what training adds to the process: weights of both networks, the best ones so far, their average if any,
    gradients, Adam, the data, and a window's activations.

    What a cell keeps of each step and row until the backward pass, and what that needs beside it for the cell it is at: `_kept`,
    `_working`; logits are held about six times.
    """
    recipe, part = job.recipe, job.parts.train
    trained = sum(p.numel() for p in network.parameters())
    fixed = sum(p.numel() for p in job.teacher.parameters())
    windowed = part.stream or job.task.windowed
    steps = min(part.inputs.shape[1], recipe.train.window) if windowed else part.inputs.shape[1]
    rows = recipe.train.batch_size if part.stream else min(recipe.train.batch_size, len(part))
    cells, mode = network.cells().values(), anneal.mode_at(recipe, 1.0)
    in_c = {cell: native.takes(cell, cell.part("candidate").bias, cell.modes(mode)) for cell in cells}
    kept = sum(_kept(cell.layer, in_c=in_c[cell]) for cell in cells)
    working = max(_working(cell.layer, in_c=in_c[cell]) for cell in cells)
    activations = steps * rows * (kept + working + 6 * network.spec.main.output_size)
    held = sum(t.numel() * t.element_size() for p in _each(job) for t in (p.inputs, p.targets) if t is not None)
    copies = 6 if recipe.train.averaging else 5
    known = answers.size(part, job.teacher) if answers.wanted(part, job.teacher, task=job.task, recipe=recipe) else 0
    return 4 * (fixed + copies * trained + activations) + held + known


def _kept(layer: LayerSpec, *, in_c: bool) -> int:
    """Values of one step and row. The kernels in C keep products, the candidate and the states, and work the rest out again; windows in
    torch about four values a gate and decision, and four a decision (0.7 to 2.6 times that where cells declare their equations, decision
    035). Both keep their input and its product."""
    gates, hidden = len(layer.kind.gates), layer.hidden_size
    of_input = layer.input_size + (gates + 1) * hidden
    if in_c:
        memories = 1 if layer.kind.is_lstm else 2  # a GRU's candidate differs from decision to decision
        return of_input + (gates + 2) * hidden + memories * layer.width
    return of_input + (4 * gates + 4) * layer.width


def _working(layer: LayerSpec, *, in_c: bool) -> int:
    """The same of the backward pass while it is at this cell."""
    blocks = len(layer.kind.gates) + 1
    return 2 * blocks * layer.hidden_size + layer.width if in_c else 6 * blocks * layer.width


def _each(job: Any) -> Iterator[data.Part]:
    return iter((job.parts.train, job.parts.valid, job.parts.test))


# ---------------------------------------------------------------------------------------------- how long it takes


def time_of(job: Any, network: Network, preparing: float) -> Plan:
    """Seconds of the whole conversion: `seconds` when gates binarize within train.steps, `seconds_at_most` at the hard stop."""
    recipe = job.recipe
    probed, per_step, asking = probe_training(job, network)
    per_measurement, report = probe_measurements(job, network)
    once = preparing + probe_calibration(job, network) + report
    if answers.wanted(job.parts.train, job.teacher, task=job.task, recipe=recipe):
        batches = recipe.train.steps / answers.passes(job.parts.train, task=job.task, recipe=recipe)  # of one pass
        per_step, once = per_step - asking, once + asking * batches
    per_update = per_step * recipe.train.accumulation

    def total(steps: int) -> float:
        return steps * per_update + math.ceil(steps / recipe.train.evaluate_every) * per_measurement

    control = total(recipe.train.steps) if recipe.report.float_same_compute else 0.0
    searched = search_of(recipe)
    further = searched["trainings_at_most"] * total(searched["steps"]) if searched else 0.0
    ladder = rate.ladder(recipe)
    short = rate.steps(recipe) * per_update + per_measurement if rate.wanted(recipe) else 0.0
    return {
        "seconds": once + ladder.usual * short + total(recipe.train.steps) + control,
        "seconds_at_most": once + ladder.most * short + total(recipe.max_steps) + further + control,
        "seconds_per_step": per_update,
        "seconds_per_measurement": per_measurement,
        "seconds_report": report,
        "probe_steps": probed,
        "basis": f"estimated from {probed} probe steps on this machine",
    }


def probe_training(job: Any, network: Network) -> tuple[int, float, float]:
    """(timed steps, seconds of one, of these the teacher's): real batches forward and backward through both networks and an optimizer,
    half of them annealing and half straight-through. The student is not changed: its copy is trained."""
    recipe, task = job.recipe, job.task
    trained = student.of_recipe(job.teacher, recipe, task=task.name)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe.learning_rate, fused=True)
    train = recipe.train
    feed = data.Batches(
        job.parts.train,
        batch_size=train.batch_size,
        window=train.window,
        seed=recipe.seed,
        length=WARM_UP + PROBE_STEPS,
        windowed=task.windowed,
    )
    walk = anneal.training_walk(recipe)
    carried: tuple[State | None, State | None] = (None, None)
    seconds: list[float] = []
    asking: list[float] = []
    for k in range(WARM_UP + PROBE_STEPS):
        mode = anneal.mode_at(recipe, k % 2)
        began = time.perf_counter()
        batch = feed[k]
        prepared = tasks.prepare(task, batch, job.teacher, walk=walk)
        if batch.first or not task.windowed:
            carried = (None, None)
        asks = time.perf_counter()
        target = distiller.asked(job.teacher, prepared, walk=walk, state=carried[0])
        asking += [time.perf_counter() - asks] if k >= WARM_UP else []
        output = prepared.forward(trained, mode=mode, walk=walk, state=carried[1])
        carried = (target.state, states.detached(output)) if task.windowed else (None, None)
        losses.total(task, recipe, prepared, output, target, student=trained, mode=mode).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds += [time.perf_counter() - began] if k >= WARM_UP else []
        if len(seconds) >= 2 and sum(seconds) > PROBE_SECONDS:
            break
    return len(seconds), sum(seconds) / len(seconds), sum(asking) / len(asking)


def probe_calibration(job: Any, network: Network) -> float:
    """Seconds of fitting levels and thresholds before training; done here on a few batches, so that the probe trains what a run trains."""
    found = itertools.islice(distiller.calibration_batches(job.parts.train, job.recipe, job.task), CALIBRATION_PROBE)
    seconds = _seconds(lambda: calibrate.calibrate(network, job.teacher, job.task, found))
    return seconds * max(1.0, distiller.CALIBRATION_BATCHES / CALIBRATION_PROBE)


def probe_measurements(job: Any, network: Network) -> tuple[float, float]:
    """Seconds of one measurement during training, and of the report at the end, each from a few sequences and scaled by steps."""
    selection = distiller.selection_part(job.parts.valid)
    small = few(selection)
    teacher, soft = Candidate(job.teacher, FLOAT, run_cell), Candidate(network, anneal.soft_mode_at(job.recipe, 1.0), run_cell)
    hard, oracle = Candidate(network, BINARY, run_cell), Candidate(network, BINARY)
    compare(job.task, small, teacher, {"hard": hard})  # warm-up
    during = _seconds(lambda: compare(job.task, small, teacher, {"hard": hard, "soft": soft}, judges_teacher=False))
    report = _seconds(lambda: compare(job.task, small, teacher, {"soft": soft, "hard": oracle}))
    if job.recipe.report.controls:
        report += 3 / 2 * during  # a second pass: three controls where a measurement has two
    return during * _share(selection, small), report * _share(job.parts.test, small)


def few(part: data.Part) -> data.Part:
    """One batch of a measurement; of a stream all rows, for a few hundred steps."""
    if part.stream:
        return data.Part(part.inputs[:, :PROBE_WINDOW], stream=True)
    return part.take(torch.arange(min(PROBE_SEQUENCES, len(part))))


def _share(whole: data.Part, small: data.Part) -> float:
    return steps_in(whole) / steps_in(small)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------- as text


def render(found: Plan) -> str:
    """The plan for people."""
    size_, disk, steps, took = found["size"], found["disk"], found["steps"], found["time"]
    task, held = found["task"], found["data"]
    short = "" if disk["enough"] else ": NOT ENOUGH"
    rows = [
        ("model", f"{found['model']['file']} ({found['model']['format']}, {size(size_['source_bytes'])}, {found['parameters']:,} weights)"),
        *((name, line) for name, section in found["sections"].items() for line in _section_lines(section)),
        ("task", f"{task['name']} ({task['how']})"),
        ("metric", f"{task['metric']}, {'higher' if task['higher_is_better'] else 'lower'} is better ({task['metric_how']})"),
        *((name, f"{held[name]['sequences']:,} sequences, {held[name]['steps']:,} steps") for name in ("train", "valid", "test")),
        ("packed", f"{size(size_['packed_bytes'])} (fp16 weights and config)"),
        (
            "disk",
            f"{size(disk['needed_bytes'])} needed, {size(disk['free_bytes'])} free at {disk['at']}{short}",
        ),
        ("memory", f"about {size(found['memory']['training_bytes'])} for training"),
        ("steps", f"{steps['expected']:,}, at most {steps['at_most']:,}; measured every {steps['evaluate_every']:,}"),
        *([("search", _search_line(found["search"]))] if found["search"] else []),
        ("time", f"about {clock(took['seconds'])}, at most {clock(took['seconds_at_most'])} ({took['basis']})"),
        ("out", found["out"]),
        *(("note", note) for note in found["notes"]),
    ]
    return "\n".join(f"{name:8} {line}" for name, line in rows) + "\nnothing was written"


def _search_line(search: Plan) -> str:
    densities = [f"{density:g}" for density in search["densities"]]
    return (
        f"at density {densities[0]}, then {', '.join(densities[1:])} while the drop allowed is kept on the validation part: "
        f"at most {search['trainings_at_most']} more trainings of {search['steps']:,} steps, each from the network before"
    )


def _section_lines(section: Plan) -> list[str]:
    table = section["embedding"]
    lines = []
    if table:
        lines.append(f"{table['num_embeddings']} tokens, {'one-hot' if table['one_hot'] else str(table['embedding_dim']) + ' wide'}")
    lines += [_layer_line(index, layer) for index, layer in enumerate(section["layers"])]
    for linear in section["head"]:
        after = "" if linear["activation"] == "none" else f", {linear['activation']}"
        lines.append(f"linear {linear['in_features']} -> {linear['out_features']}{after}")
    return [*lines, *section["around"]] if section["around"] else [*lines, f"reads out: {section['readout']}"]


def _layer_line(index: int, layer: Plan) -> str:
    ways = "both directions" if layer["directions"] == 2 else "one direction"
    projected = f" (projected to {layer['proj_size']})" if layer["proj_size"] else ""
    more = f"; {layer['copies']} decisions a gate" if layer["copies"] > 1 else ""
    more += f"; {layer['shared']} units read one row of a gate" if layer["shared"] > 1 else ""
    kinds = [f"{kind}: {', '.join(of)}" for kind in ("binary", "soft") if (of := [g for g, k in layer["gates"].items() if k == kind])]
    return f"layer {index}: {layer['cell']} {layer['input_size']} -> {layer['hidden_size']}{projected}, {ways}; {'; '.join(kinds)}{more}"


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def clock(seconds: float) -> str:
    """Seconds, minutes or hours, with two places that mean something."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
