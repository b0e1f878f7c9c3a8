"""`convert` for any nn.Module: split the batches, distil, pack, and report what it cost on the packed files."""

from __future__ import annotations

import copy
import hashlib
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rnn2bin import evaluation, machine, modules, pack, pipeline, plan, recipe_yaml
from rnn2bin.cost import Read
from rnn2bin.distill import anneal
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import DataError
from rnn2bin.evaluation import controls as control
from rnn2bin.evaluation import html, stored
from rnn2bin.evaluation import watch as watching
from rnn2bin.evaluation.bootstrap import paired_drop
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.evaluation.worst import WORST
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize, sample
from rnn2bin.modules import Call, Cells
from rnn2bin.modules.training import (
    Forward,
    Gated,
    Job,
    Loss,
    Measured,
    Metric,
    ModuleTrainer,
    check_batch,
    forward,
    measure,
    variances,
)
from rnn2bin.recipe import Recipe


@dataclass(frozen=True)
class ModuleResult(pipeline.Result):
    """A pipeline.Result; `source` is the float module as it was given, the skeleton that loading needs."""

    source: nn.Module = field(repr=False, kw_only=True)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The packed module, loaded."""
        return modules.load_module(self.path, self.source)


@dataclass(frozen=True)
class Batches:
    """Train is iterated again and again; valid and test are held."""

    train: Iterable[Any]
    valid: list[Any]
    test: list[Any]


def convert(
    module: nn.Module,
    *,
    recipe: Recipe,
    data: Any,
    out: str | Path | None = None,
    loss: Loss | None = None,
    metric: Metric | Any = None,
    forward: Forward = forward,
    resume: bool = False,
    force: bool = False,
    progress: pipeline.Progress | None = None,
    callbacks: Sequence[Any] = (),
) -> ModuleResult:
    """Distil `module` into its binary-gated copy, packed into `out` (default: the class's name + ".rnn2bin"). `module` is not changed.

    `data`: an iterable of batches (tensors, tuples or dicts; see `training.forward`), split by seed into train, valid and test with
    the recipe's shares, or a dict of three iterables under these names. `loss(output, batch)` is added to the match of the teacher's
    outputs. `metric(module, batches)` chooses the checkpoint and is reported; higher is better unless its `higher_is_better` is False.
    Without one it is the mean squared error in units of the teacher's variance.
    An interrupted run goes on with `resume` and the same arguments, bit for bit where the batches come in the same order again: those of
    lists, tuples and iterators do; a loader that shuffles must do so by a seed of its own.
    Raises UnsupportedError, DataError, RecipeError, UsageError, DivergedError, BudgetError, ResourceError, InterruptedRunError.
    """
    folder = Path(out) if out is not None else Path(type(module).__name__ + ".rnn2bin")
    if not resume:
        pack.check_free(folder, force=force)
    student = modules.binarize(module, recipe=recipe)
    batches = split(data, recipe)
    provenance = _provenance(module, recipe, batches)
    if resume:
        digests = {name: provenance[name] for name in ("source_sha256", "data_sha256")}
        done = pipeline.finished(folder, recipe=recipe, force=force, **digests)
        if done:
            return ModuleResult(folder, done, source=module)
        pack.check_free(folder, force=force)
    teacher = copy.deepcopy(module).eval().requires_grad_(False).cpu()
    job = Job(teacher, forward, loss, metric, variances(teacher, batches.valid, forward), recipe)
    plan.check_disk(
        plan.space(
            folder,
            packed=sum(t.nbytes for t in student.state_dict().values() if isinstance(t, Tensor)),
            checkpoint=plan.checkpoint_bytes(student, recipe),
            beside=int(recipe.report.float_same_compute),
        )
    )
    work = pipeline.check_work(folder, _key(job, provenance, batches), resume=resume, force=force)
    with pipeline.keeping(work):
        watch: dict[str, Any] = {"progress": progress, "callbacks": callbacks}
        report = _convert(job, module, student, batches, folder, work, provenance=provenance, resume=resume, force=force, **watch)
        pipeline.discard(work)
    return ModuleResult(folder, report, source=module)


def _key(job: Job, provenance: dict[str, Any], batches: Batches) -> str:
    """What a run that is gone on with must have in common; a function's name is all that can be told of it."""
    train = _digest(batches.train) if isinstance(batches.train, list) else "loader"
    names = [getattr(f, "__qualname__", type(f).__qualname__) for f in (job.run, job.loss, job.metric)]
    recipe = job.recipe.model_dump_json(exclude={"report"})
    return " ".join([provenance["source_sha256"], provenance["data_sha256"], train, *names, recipe])


def _convert(
    job: Job,
    module: nn.Module,
    student: nn.Module,
    batches: Batches,
    folder: Path,
    work: Path,
    *,
    provenance: dict[str, Any],
    resume: bool,
    force: bool,
    progress: pipeline.Progress | None,
    callbacks: Sequence[Any],
) -> pipeline.Report:
    recipe = job.recipe
    began = time.perf_counter()
    trained = _train(job, student, batches, work, resume=resume, progress=progress, callbacks=callbacks)
    tuned = _float_control(job, module, batches, work, resume=resume) if recipe.report.float_same_compute else None
    seconds = trained.seconds_before + time.perf_counter() - began
    with pack.staging(folder, force=force) as staged:
        task = {"name": "module", "metric": job.metric_name}
        modules.write(student, staged, levels=recipe.gates.levels, provenance=provenance, task=task)
        (staged / "recipe.yaml").write_text(recipe_yaml.dump(recipe), encoding="utf-8")
        report = _report(job, module, staged, batches.test, trained, tuned=tuned)
        report["cost"] |= _cost(trained, seconds)
        report["size"] = evaluation.sizes(sum(t.nbytes for t in module.state_dict().values() if isinstance(t, Tensor)), staged)
        report["training"] = [vars(point) for point in trained.history]
        report["provenance"] = {**provenance, "command": None, **pipeline.made(staged, recipe), "recipe": recipe.model_dump(mode="json")}
        stored.write(staged, report)
        pipeline.refuse_over_budget(report, recipe)
    return report


# --- data ----------------------------------------------------------------------------------------------------------------


def split(data: Any, recipe: Recipe) -> Batches:
    """The three parts; raises DataError with every reason. One iterable is read once, so that a shuffling loader cannot mix the parts."""
    if data is None:
        raise DataError("data: a module is converted on batches; give data=, an iterable of them")
    if isinstance(data, Mapping):
        wrong = sorted({"train", "valid", "test"} ^ set(data))
        if wrong:
            raise DataError(*(f"data: {name} is {'no part' if name in data else 'missing'}; give train, valid, test" for name in wrong))
        # An iterator would be empty the second time; a list is shuffled by the recipe's seed.
        once = iter(data["train"]) is data["train"] or isinstance(data["train"], (list, tuple))
        return _checked(Batches(list(data["train"]) if once else data["train"], list(data["valid"]), list(data["test"])))
    if isinstance(data, (str, Path, Tensor)):
        raise DataError(f"data: a module takes an iterable of batches, not a {type(data).__name__}")
    whole = list(data)
    random.Random(recipe.seed).shuffle(whole)
    valid, test = (max(1, round(len(whole) * share)) for share in (recipe.data.valid, recipe.data.test))
    if len(whole) < valid + test + 1:
        raise DataError(f"data: {len(whole)} batches are too few to hold {valid} + {test} out; give more, or smaller ones")
    first = len(whole) - valid - test
    return _checked(Batches(whole[:first], whole[first : first + valid], whole[first + valid :]))


def _checked(batches: Batches) -> Batches:
    empty = [name for name in ("train", "valid", "test") if isinstance(part := getattr(batches, name), list) and not part]
    if empty:
        raise DataError(*(f"data: the {name} part holds no batch" for name in empty))
    for name in ("train", "valid", "test"):
        part = getattr(batches, name)
        for index, batch in enumerate(part if isinstance(part, list) else (), 1):
            check_batch(batch, f"batch {index} of the {name} part")
    return batches


# --- training ------------------------------------------------------------------------------------------------------------


def _train(
    job: Job,
    student: nn.Module,
    batches: Batches,
    work: Path,
    *,
    resume: bool,
    progress: pipeline.Progress | None = None,
    callbacks: Sequence[Any] = (),
    float_student: bool = False,
) -> anneal.Trained:
    """In place; checkpoints lie in `work` while it runs."""
    weights = job.recipe.loss
    twin = modules.surgery(job.teacher).requires_grad_(False) if weights.hidden_weight() or weights.gate else None
    torch.manual_seed(job.recipe.seed)
    trainer = ModuleTrainer(student, job=job, twin=twin, train=batches.train, valid=batches.valid, out=work, float_student=float_student)
    trained = anneal.fit(trainer, resume=resume, report=progress, callbacks=callbacks)
    student.eval().cpu()
    job.teacher.cpu()
    return trained


def _float_control(job: Job, module: nn.Module, batches: Batches, work: Path, *, resume: bool) -> nn.Module:
    """The float module, trained on with the same data, losses and steps."""
    twin = modules.surgery(module)
    _train(job, twin, batches, work / pipeline.FLOAT_CONTROL, resume=resume, float_student=True)
    return twin


# --- report --------------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at every call of a module's cells: open rates, density, histograms of gate values."""

    def __init__(self, module: nn.Module, mode: Discretize = BINARY) -> None:
        self.cells, self.mode = Cells(module), mode
        self.names = {id(cell): name for name, cell in self.cells.cells().items()}
        self.density = DensityCounter(cast(Any, self.cells))
        self.ones: dict[str, Tensor] = {}
        self.steps: dict[str, float] = {}
        self.histograms: dict[tuple[str, str], Tensor] = {}
        self.first: str | None = None

    def seen(self, call: Call) -> None:
        name, mask, pre = self.names[id(call.cell)], call.mask(), call.trace.pre
        self.first = self.first or name
        ones = ((pre > 0).double() * mask).mean(-1).sum((0, 1)).cpu()
        self.ones[name] = self.ones.get(name, torch.zeros_like(ones)) + ones
        self.steps[name] = self.steps.get(name, 0.0) + float(mask.sum())
        if call.whole and self.mode == BINARY:  # the count takes the state before the first step as zero
            inputs = (call.x != 0).sum(-1).double()
            self.density.add_cell(Read(name, call.cell, call.trace, inputs, call.lengths, rested=True))
        real = pre[mask[..., 0, 0] > 0]  # (N,G,H)
        for k, gate in enumerate(call.cell.layer.kind.gate_names):
            counts = watching.histogram(sample(call.cell.modes(self.mode)[k], real[:, k]).float().cpu())
            self.histograms[name, gate] = self.histograms.get((name, gate), torch.zeros(watching.BINS)) + counts

    def rates(self) -> dict[str, list[float]]:
        """Share of ones of each gate; a cell that never ran has none open."""
        gates = {name: len(cell.binary) for name, cell in self.cells.cells().items()}
        return {name: (self.ones[name] / self.steps[name]).tolist() if self.steps.get(name) else [0.0] * gates[name] for name in gates}

    @property
    def tokens(self) -> float:
        return self.steps[self.first] if self.first else 0.0


def _report(
    job: Job, module: nn.Module, folder: Path, test: list[Any], trained: anneal.Trained, *, tuned: nn.Module | None
) -> pipeline.Report:
    """The measured fields, on the packed module itself: bits by the oracle."""
    packed, twin = modules.load_module(folder, module), modules.surgery(module).eval()
    bits, soft, floats = Watch(packed), Watch(packed, trained.soft_mode), Watch(twin, FLOAT)
    job = replace(job, device="cpu")
    found = measure(
        job,
        test,
        {
            "teacher": Gated(job.teacher),
            "twin": Gated(twin, FLOAT, run_cell, floats.seen),
            "soft_student": Gated(packed, trained.soft_mode, run_cell, soft.seen),
            "binary": Gated(packed, BINARY, None, bits.seen),
        },
    )
    others = _controls(job, module, packed, bits.rates()) if job.recipe.report.controls else {}
    if tuned is not None:
        others["float_same_compute"] = Gated(tuned.eval(), FLOAT, run_cell)
    controls = measure(job, test, others) if others else {}
    report: pipeline.Report = {
        "schema_version": evaluation.SCHEMA_VERSION,
        "task": "module",
        "metric": {"name": job.metric_name, "higher_is_better": job.higher_is_better},
        "teacher": found["teacher"].to_dict(),
        "soft_student": found["soft_student"].to_dict(),
        "binary": found["binary"].to_dict(),
        "native": None,
        "drop": _drop(job, found["teacher"], found["binary"]),
        "controls": {name: measured.to_dict() for name, measured in controls.items()},
        "gates": evaluation.gate_table(cast(Any, Cells(packed)), bits.rates()),
        "density": bits.density.result() if bits.density.cells else None,
        "parity": None,
        "worst": _worst(found),
        "figures": _figures(floats, soft).to_dict(),
        "cost": {"teacher_tokens_per_second": bits.tokens / max(found["teacher"].seconds, 1e-9)},
    }
    if job.metric is None:
        report["metric"]["label"] = "squared error in units of the teacher’s variance"
    return report


def _controls(job: Job, module: nn.Module, packed: nn.Module, rates: dict[str, list[float]]) -> dict[str, Gated]:
    """As `evaluation.controls`, for a module."""
    strict = job.recipe.model_copy(update={"gates": job.recipe.gates.model_copy(update={"levels": "strict"})})
    cut = modules.binarize(module, recipe=strict).eval()
    drawn = control.random_walk(cast(Any, Cells(packed)), rates, seed=job.recipe.seed)
    return {
        "threshold_only": Gated(cut, BINARY),
        "sharpened_sigmoid": Gated(cut, Discretize("sigmoid", temperature=control.SHARP)),
        "random_gates": Gated(packed, BINARY, drawn),
    }


def _drop(job: Job, teacher: Measured, binary: Measured) -> dict[str, Any]:
    """Paired over batches for the default metric, whose value is relative already; a user's metric is one number, without an interval."""
    if job.metric is None:
        import numpy as np

        found = paired_drop(np.array(teacher.errors), np.array(binary.errors), higher_is_better=False, seed=job.recipe.seed)
        return {"value": found.value, "relative": found.value, "ci95": list(found.ci95), "n": found.n}
    value = (teacher.metric - binary.metric) * (1 if job.higher_is_better else -1)
    relative = value / abs(teacher.metric) if teacher.metric else (None if value else 0.0)
    return {"value": value, "relative": relative, "ci95": None, "n": len(binary.errors)}


def _figures(before: Watch, after: Watch) -> html.Figures:
    both = {at: (before.histograms[at].numpy(), counts.numpy()) for at, counts in after.histograms.items()}
    return watching.figures_of(both)


def _worst(found: dict[str, Measured]) -> list[dict[str, Any]]:
    """The held-out batches whose outputs the binary module changed most: what a batch holds is the user's own."""
    errors = found["binary"].errors
    order = sorted(range(len(errors)), key=lambda k: -errors[k])[:WORST]
    shown = lambda name, k: f"loss {found[name].losses[k]:.4g}"
    return [
        {
            "index": k,
            "input": f"held-out batch {k}",
            "target": None,
            "teacher": shown("teacher", k),
            "binary": shown("binary", k),
            "difference": f"{errors[k]:.4g} squared error in units of the teacher’s variance",
            "metric": None,
            "steps": None,
        }
        for k in order
        if errors[k] > 0
    ]


def _cost(trained: anneal.Trained, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "tokens": trained.tokens,
        "tokens_per_second": trained.tokens / seconds,
        "binarized": trained.binarized,
    }


def _provenance(module: nn.Module, recipe: Recipe, batches: Batches) -> dict[str, Any]:
    return {
        "source": type(module).__name__,
        "source_sha256": _digest(module.state_dict()),
        "data_sha256": _digest([batches.valid, batches.test]),
        "seed": recipe.seed,
        "versions": machine.versions(),
        "data_free": False,
        "levels": recipe.gates.levels,
        "notes": [],
    }


def _digest(content: Any) -> str:
    """SHA-256 of every tensor in a structure, in order."""
    found = hashlib.sha256()
    for tensor in _tensors(content):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (Mapping, tuple, list)):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(value)
