"""The main job: source file -> packed directory, in one direction: load, binarize, distil, pack, evaluate."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rnn2bin import (
    data,
    evaluation,
    loaders,
    machine,
    measure,
    pack,
    packed,
    processes,
    recipe_yaml,
    signals,
    storage,
    student,
    tasks,
    tokenizer,
)
from rnn2bin.cells.network import Network, teacher_network
from rnn2bin.distill import anneal, answers, budget, calibrate, checkpoints, rate, sampling
from rnn2bin.distill import callbacks as watching
from rnn2bin.distill import trainer as distiller
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import BudgetError, DataError, InterruptedRunError, ResourceError, UnsupportedError, UsageError
from rnn2bin.evaluation import stored
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.measure import Candidate
from rnn2bin.packed import read_config
from rnn2bin.recipe import Budget, Recipe
from rnn2bin.spec import RnnSpec
from rnn2bin.stages import Stage, unwatched

Report = dict[str, Any]
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """What `convert` returns: where the packed directory is, its report, and the model on the default backend."""

    path: Path
    report: Report

    @property
    def model(self):
        from rnn2bin import runtime

        return runtime.load(self.path)


@dataclass(frozen=True)
class Job:
    """All that is known before training starts."""

    loaded: loaders.Loaded
    teacher: Network
    recipe: Recipe
    task: tasks.Task
    parts: data.Parts
    notes: tuple[str, ...] = ()


def prepare(
    source: str | Path,
    recipe: Recipe,
    given: str | Path | Sequence[str] | None,
    *,
    readout: str | None = None,
    vocabulary: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Job:
    """Read everything and refuse what does not fit, before any work. Raises the errors of load, data and tasks.

    `readout`, `vocabulary`, `labels`: what a packed directory says of the same source; instead of finding them by the data.
    """
    loaded = loaders.load(source, source=recipe.source)
    teacher = teacher_network(loaded.spec, loaded.weights)
    parts = data.load_parts(given, recipe, loaded.spec, vocabulary=vocabulary, labels=labels)
    if parts is None:
        parts = sampling.data_free(teacher, recipe, vocabulary=vocabulary)
    notes: list[str] = []
    if readout is not None and teacher.spec.decode is None and teacher.spec.main.graph is None:
        teacher = with_readout(teacher, readout)
    elif not loaded.readout_stated:
        teacher, note = _choose_readout(teacher, recipe, parts)
        notes += [note] if note else []
    task = tasks.resolve(recipe, teacher.spec, parts.train)
    for part in (parts.valid, parts.test):
        tasks.resolve(recipe, teacher.spec, part)
    return Job(loaded, teacher, recipe, task, parts.each(lambda part: tasks.settled(task, part)), tuple(notes))


def _choose_readout(teacher: Network, recipe: Recipe, parts: data.Parts) -> tuple[Network, str | None]:
    """One target a sequence, and a file that cannot say what the head reads: take the readout under which the teacher does best on the
    validation part."""
    targets, main = parts.valid.targets, teacher.spec.main
    values = targets is not None and targets.is_floating_point() and targets.shape[1:] == (main.output_size,)
    per_sequence = values or (targets is not None and targets.ndim == 1)
    if teacher.spec.decode or main.graph or main.readout != "all" or not per_sequence:
        return teacher, None
    one_direction = main.layers[-1].directions == 1
    names = ["last", "mean", "max"] if one_direction else ["final", "last", "mean", "max"]
    choices = [with_readout(teacher, name) for name in names]
    small = replace(distiller.selection_part(parts.valid), per_sequence=True)
    chosen = measure.infer_readout(lambda n: tasks.resolve(recipe, n.spec, small), small, choices)
    name = chosen.spec.main.readout
    note = f"readout {name!r}: not stated, chosen because the float network does best with it on the validation part"
    return chosen, f"{note} (source.readout says otherwise)"


def with_readout(network: Network, readout: str) -> Network:
    main = replace(network.spec.main, readout=readout)
    return teacher_network(RnnSpec({"main": main}), network.state_dict())


def convert(
    source: str | Path | torch.nn.Module,
    *,
    recipe: str | Path | Recipe = "anneal.yaml",
    data: Any = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    max_drop: float | None = None,
    max_density: float | None = None,
    resume: bool = False,
    force: bool = False,
    loss: Callable[..., torch.Tensor] | None = None,
    metric: Callable[..., float] | None = None,
    forward: Callable[..., Any] | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Convert a pretrained network to binary gates and write the packed directory `out` (default: the source's name + ".rnn2bin").

    `source`: a file, a Hugging Face directory, or any nn.Module with LSTM or GRU layers; a module takes `data` as an iterable of batches,
    and optionally `loss(output, batch)`, `metric(module, batches)` and `forward(module, batch)`. `data`: see docs/data.md.
    `max_drop`, `max_density`: what may be lost and read; with both the fastest network that keeps them is searched for (rnn2bin.search).
    `progress`: called with a dict after every step. `callbacks`: transformers' TrainerCallbacks, which may stop the training, or functions
    called with each measurement, a frozen `rnn2bin.distill.anneal.Point` (see rnn2bin.distill.callbacks).
    Raises the errors of rnn2bin.errors.
    """
    watchers = watching.checked(callbacks)
    chosen = recipe_yaml.resolve(recipe, overrides, seed=seed, max_drop=max_drop, max_density=max_density)
    if isinstance(source, torch.nn.Module):
        from rnn2bin import modules

        if processes.count() > 1:
            raise UsageError("convert: an nn.Module is converted by one process; start it without torchrun")
        given: dict[str, Any] = {"forward": forward} if forward is not None else {}
        given |= {"resume": resume, "force": force, "progress": progress, "callbacks": watchers}
        return modules.convert_module(source, recipe=chosen, data=data, out=out, loss=loss, metric=metric, **given)
    if loss is not None or metric is not None or forward is not None:
        raise UsageError("convert: loss, metric and forward go with an nn.Module; a file's task follows from the recipe and the data")
    folder = Path(out) if out is not None else Path(Path(source).name + ".rnn2bin")
    return run(source, chosen, data, folder, resume=resume, force=force, progress=progress, callbacks=watchers)


def work_folder(out: Path) -> Path:
    """Where checkpoints lie while a conversion runs; removed when it is done."""
    return out.with_name(out.name + ".work")


def check_out(out: Path, *, force: bool) -> None:
    """Before any work: is `out` free, or a packed directory to be replaced? Other models have a config.json too. Raises UsageError."""
    pack.check_free(out, force=force)
    if (out / pack.CONFIG).is_file():
        try:
            read_config(out)
        except UnsupportedError as error:
            raise UsageError(*error.reasons, f"{out}: is not a packed directory of this version; --force replaces nothing else") from None


STAMP, FLOAT_CONTROL = "job.json", "float"
OURS = (STAMP, STAMP + ".part", FLOAT_CONTROL)  # in a work folder, beside checkpoints, short runs and the trainings of a search


def check_work(out: Path, job_key: str, *, resume: bool, force: bool) -> Path:
    """The work folder, made or found again. Raises UsageError where an interrupted run lies there and neither --resume nor --force is
    given, where it belongs to another conversion, or where it is not ours; ResourceError where nothing can be written beside `out`."""
    work = work_folder(out)
    pack.check_writable(out)
    found = _stamp(work)
    if resume and found == job_key:
        return work
    if not force and found and resume:
        raise UsageError(f"{work}: belongs to a conversion with another model, recipe or data; --force starts over")
    if not force and found and checkpoints.newest(work):
        raise UsageError(f"{work}: an interrupted conversion lies here; --resume goes on with it, --force starts over")
    discard(work)
    with storage.failures(work, "nothing was changed; choose another --out"):
        work.mkdir(parents=True)
        storage.write_synced(work / STAMP, json.dumps({"key": job_key}))
    return work


def _stamp(work: Path) -> str | None:
    """The key of the conversion whose checkpoints lie in `work`; None where there is none to go on with. UsageError for anything else."""
    if not work.exists():
        return None
    ours = lambda name: name in OURS or name.startswith(("checkpoint-", "rung-", rate.FOLDER))
    if not work.is_dir() or not all(ours(path.name) for path in work.iterdir()):
        raise UsageError(f"{work}: checkpoints would go here, but it holds something else; move it, or choose another --out")
    try:
        key = json.loads((work / STAMP).read_text())["key"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{STAMP} is damaged"
    return str(key)


def discard(work: Path) -> None:
    """Remove a work folder; its stamp first, so that what a kill leaves of it is not gone on with."""
    with suppress(OSError):
        (work / STAMP).unlink()
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def keeping(work: Path) -> Iterator[None]:
    """What stops a run from outside, SIGINT, SIGTERM or a disk that takes no more, ends in one line that says how to go on."""
    try:
        with signals.raised():
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; {_how_to_go_on(work)}") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        if processes.lost(error):
            raise InterruptedRunError(f"another process is gone; {_how_to_go_on(work)}") from None
        reason = storage.failure(error)
        if reason is None:
            raise
        raise ResourceError(f"{work}: cannot write ({reason}); free space; {_how_to_go_on(work)}") from error


def _how_to_go_on(work: Path) -> str:
    newest = checkpoints.newest(work)
    return f"the same command with --resume goes on from {f'step {checkpoints.step_of(newest)}' if newest else 'the beginning'}"


def run(
    source: str | Path,
    recipe: Recipe,
    given: Any,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[watching.Callback] = (),
    stage: Stage = unwatched,
) -> Result:
    """`convert` for a file, with a resolved recipe."""
    progress = progress if processes.leads() else None
    stage("load")
    if not resume:
        processes.lead(lambda: check_out(out, force=force))
    job = processes.first(lambda: prepare(source, recipe, given))
    network = processes.first(lambda: student.of_recipe(job.teacher, recipe, task=job.task.name))
    done, work = processes.lead(lambda: _begin(job, network, out, resume=resume, force=force))
    if done:
        return Result(out, done)
    with keeping(work):
        command = command_of(source, given)
        watch: dict[str, Any] = {"progress": progress, "callbacks": callbacks, "stage": stage}
        report = _convert(job, network, out, work, command=command, resume=resume, force=force, **watch)
        processes.lead(lambda: discard(work))
    return Result(out, report)


def _begin(job: Job, network: Network, out: Path, *, resume: bool, force: bool) -> tuple[Report | None, Path]:
    """(the report, where nothing is left to do; the work folder), after every check that can be made before training."""
    from rnn2bin import plan

    recipe, data_sha256 = job.recipe, data.digest(job.parts)
    if resume:
        digests = {"source_sha256": job.loaded.provenance["sha256"], "data_sha256": data_sha256}
        done = finished(out, recipe=recipe, force=force, **digests)
        if done:
            return done, work_folder(out)
        check_out(out, force=force)
    plan.check_disk(plan.disk_of(job, network, out))
    # What is only reported does not change the training: a missed budget is raised with --resume, without training again.
    key = f"{job.loaded.provenance['sha256']} {data_sha256} {recipe.model_dump_json(exclude={'report'})}"
    return None, check_work(out, key, resume=resume, force=force)


def finished(out: Path, *, recipe: Recipe, force: bool, **digests: str) -> Report | None:
    """The report of `out` where it is what this very conversion wrote: a run killed after its last rename has nothing left to do.
    With `force` only where no checkpoints lie beside it: they are gone on with."""
    wanted = {**digests, "recipe": recipe.model_dump(mode="json"), "versions": machine.versions()}
    try:
        report: Report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if any(report["provenance"][name] != value for name, value in wanted.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    work = work_folder(out)
    if force and _stamp(work) is not None:
        return None
    discard(work)
    return report


def _convert(
    job: Job,
    network: Network,
    out: Path,
    work: Path,
    *,
    command: dict[str, Any],
    resume: bool,
    force: bool,
    progress: Progress | None,
    callbacks: Sequence[watching.Callback],
    stage: Stage,
) -> Report:
    recipe = job.recipe
    began = time.perf_counter()
    network, trained = distil(job, work, network=network, resume=resume, progress=progress, callbacks=callbacks, stage=stage)
    searched: Report | None = None
    if recipe.searched:
        from rnn2bin.search import descent

        network, trained, searched = descent.descend(job, network, trained, work, resume=resume, report=progress, callbacks=callbacks)
    fine_tuned = None
    if recipe.report.float_same_compute:
        steps = trained.steps if recipe.searched else None  # as long as all the trainings behind the student together
        fine_tuned = float_control(job, work, rate_found=trained.rate if trained.tried else None, steps=steps, resume=resume)
    seconds = trained.seconds_before + time.perf_counter() - began
    network.eval()

    def ship() -> Report:
        stage("pack")
        with pack.staging(out, force=force) as folder:
            provenance = provenance_of(job, command["model"])
            pack.write_model(network, folder, provenance=provenance, task=task_of(job))
            pack.write_runtime(folder)
            tokenizer.write(folder, job.parts.vocabulary)
            (folder / "recipe.yaml").write_text(recipe_yaml.dump(recipe), encoding="utf-8")
            recorded = {**provenance, "command": command, **made(folder, recipe)}
            stage("verify")
            report = write_report(job, folder, trained, provenance=recorded, seconds=seconds, fine_tuned=fine_tuned, searched=searched)
            refuse_over_budget(report, recipe)
        return report

    return processes.lead(ship)


def check_budget(job: Job, network: Network) -> None:
    """UnreachableError where no gates of the student `network` can read as little as the job's recipe wants."""
    first = next(distiller.calibration_batches(job.parts.train, job.recipe, job.task))
    budget.check(job.recipe.budget, network, job.teacher, job.task, first)


def distil(
    job: Job,
    work: Path,
    *,
    network: Network | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[watching.Callback] = (),
    stage: Stage = unwatched,
) -> tuple[Network, anneal.Trained]:
    """The student, calibrated and trained by the job's recipe; checkpoints lie in `work`."""
    network = student.of_recipe(job.teacher, job.recipe, task=job.task.name) if network is None else network
    recipe, tried = job.recipe, tuple[anneal.Tried, ...]()
    stage("calibrate")
    check_budget(job, network)
    calibrate.calibrate(network, job.teacher, job.task, distiller.calibration_batches(job.parts.train, recipe, job.task))
    train = answers.with_answers(job.parts.train, job.teacher, task=job.task, recipe=recipe)
    given: dict[str, Any] = {"task": job.task, "train": train, "valid": job.parts.valid, "resume": resume, "report": progress}
    stage("distill")
    if rate.wanted(recipe):
        recipe, tried = rate.find(network, job.teacher, recipe=recipe, out=work, **given)
    lower = job.recipe.train.learning_rate == "auto"
    trained = rate.train(network, job.teacher, recipe=recipe, out=work, lower=lower, callbacks=callbacks, **given)
    return network, replace(trained, tried=(*tried, *trained.tried))


def command_of(source: str | Path, given: Any) -> dict[str, Any]:
    """What `rnn2bin reproduce` reads again, as it was given."""
    items = [given] if isinstance(given, str | Path) else list(given or ())
    return {"model": str(source), "data": [str(item) for item in items]}


def made(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What came out, and what computed it."""
    return {"model_sha256": storage.sha256(folder / pack.WEIGHTS), "machine": machine.computing(recipe.train.precision)}


def float_control(job: Job, work: Path, *, rate_found: float | None = None, steps: int | None = None, resume: bool = False) -> Network:
    """The float network, fine-tuned with the same data, losses and steps: what of the student's metric is plain further training.

    `rate_found`, `steps`: those of the student, where its recipe does not say them. Without a budget, which brings a rate that would only
    harm a network that has no gates to close."""
    hidden = job.recipe.loss.hidden_weight(
        job.task.name, priced=job.recipe.budget.counts
    )  # what the student had: `auto` asks for the budget
    loss = job.recipe.loss.model_copy(update={"hidden": hidden})
    recipe = job.recipe.model_copy(update={"budget": Budget(), "loss": loss})
    if rate_found is not None and job.recipe.budget.density is None:
        recipe = rate.with_rate(recipe, rate_found)
    if steps is not None:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
    network = Network(job.teacher.spec)
    network.load_state_dict(job.teacher.state_dict())
    folder = work / FLOAT_CONTROL
    distiller.train(
        network,
        job.teacher,
        task=job.task,
        recipe=recipe,
        train=answers.with_answers(job.parts.train, job.teacher, task=job.task, recipe=recipe),
        valid=job.parts.valid,
        out=folder,
        resume=resume,
        float_student=True,
    )
    return network.eval()


def provenance_of(job: Job, source: str | Path) -> dict[str, Any]:
    return {
        "source": Path(source).name,
        "source_sha256": job.loaded.provenance["sha256"],
        "data_sha256": data.digest(job.parts),
        "seed": job.recipe.seed,
        "versions": machine.versions(),
        "data_free": job.parts.data_free,
        "levels": job.recipe.gates.levels,
        "notes": list(job.notes),
    }


def task_of(job: Job) -> dict[str, Any]:
    vocabulary, labels = (list(names) if names else None for names in (job.parts.vocabulary, job.parts.labels))
    return {"name": job.task.name, "metric": job.task.metric, "vocabulary": vocabulary, "labels": labels}


def write_report(
    job: Job,
    folder: Path,
    trained: anneal.Trained,
    *,
    provenance: dict[str, Any],
    seconds: float,
    fine_tuned: Network | None,
    searched: Report | None = None,
) -> Report:
    """report.json, report.html and the model card, measured on the packed files themselves."""
    model = evaluation.load_model(folder)
    extra = {"float_same_compute": Candidate(fine_tuned, FLOAT, run_cell)} if fine_tuned else {}
    report = evaluation.evaluate_parts(
        teacher=job.teacher,
        model=model,
        task=job.task,
        part=job.parts.test,
        soft_mode=trained.soft_mode,
        gates=job.recipe.gates,
        with_controls=job.recipe.report.controls,
        extra=extra,
        names=job.parts.names,
        seed=job.recipe.seed,
        native=evaluation.load_native(folder),
    )
    report["cost"] = {
        "seconds": seconds,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "tokens": trained.tokens,
        "tokens_per_second": trained.tokens / seconds,
        "teacher_tokens_per_second": teacher_speed(job),
        "binarized": trained.binarized,
        "learning_rate": trained.rate,
        "tried_rates": [asdict(one) for one in trained.tried],
    }
    report["size"] = evaluation.sizes(job.loaded.provenance["bytes"], folder)
    report["training"] = [vars(point) for point in trained.history]
    validation = distiller.selection_part(job.parts.valid)
    report["training_teacher"] = measure.compare(job.task, validation, Candidate(job.teacher, FLOAT, run_cell), {})["teacher"].value
    report["search"] = searched
    report["provenance"] = {**provenance, "recipe": job.recipe.model_dump(mode="json")}
    stored.write(folder, report)
    return report


def teacher_speed(job: Job) -> float:
    """Steps a second of the float network's forward pass (teacher-forced, by the training kernels) on the selection part."""
    prepared = [tasks.prepare(job.task, batch, job.teacher, walk=run_cell) for batch in selection_batches(job)]
    began = time.perf_counter()
    with torch.no_grad():
        for one in prepared:
            one.forward(job.teacher, mode=FLOAT, walk=run_cell)
    return sum(one.steps for one in prepared) / (time.perf_counter() - began)


def selection_batches(job: Job) -> Iterator[data.Batch]:
    return data.evaluation_batches(distiller.selection_part(job.parts.valid))


def refuse_over_budget(report: Report, recipe: Recipe) -> None:
    """BudgetError where more was lost than `report.max_drop` allows, or is read than `report.max_density`; nothing is written then."""
    limit, relative, reasons = recipe.report.max_drop, report["drop"]["relative"], []
    if limit is not None and relative is not None and relative > limit:
        reasons.append(
            f"accuracy budget missed: the relative drop is {relative:.4g}, allowed were {limit:g} "
            f"({report['metric']['name']} {report['teacher']['metric']:.4g} -> {report['binary']['metric']:.4g}){_reading(report)}; "
            "nothing was written; raise train.steps, or raise --max-drop (with --resume it is not trained again)"
        )
    limit = recipe.report.max_density
    if limit is not None and report["density"]["read"] > limit:
        reasons.append(
            f"density budget missed: a step reads {report['density']['read']:.4g} of the layers' weights, allowed were {limit:g}"
            f"{_losing(relative)}; nothing was written; raise train.steps, or raise --max-density"
        )
    if reasons:
        raise BudgetError(*reasons)


def _reading(report: Report) -> str:
    density = (report["density"] or {}).get("read")
    return "" if density is None else f", reading {density:.3g} of the layers' weights"


def _losing(relative: float | None) -> str:
    return "" if relative is None else f", at a relative drop of {relative:.4g}"


def _evaluation_job(source: str | Path, recipe: Recipe, given: Any, config: dict[str, Any], *, readout: str) -> Job:
    """The conversion's own data are split as they were then; any other file is all test."""
    known: dict[str, Any] = {"readout": readout, "vocabulary": packed.vocabulary(config), "labels": packed.labels(config)}
    one = data.one_file(given)
    if one is None:
        return prepare(source, recipe, given, **known)
    if str(given if isinstance(given, str | Path) else given[0]) == str(one):
        try:
            job = prepare(source, recipe, one, **known)
            if data.digest(job.parts) == (config.get("provenance") or {}).get("data_sha256"):
                return job
        except DataError:
            pass  # too few to split; what else is wrong is said below
    return prepare(source, recipe, [f"{part}={one}" for part in ("train", "valid", "test")], **known)


def evaluate_files(source: str | Path, folder: str | Path, *, data: Any = None) -> Report:
    """`rnn2bin eval`: a source file against its packed directory on held-out data, with the interval.

    Of the conversion's own data that is the part it held out; a file it has not seen is read whole. Without data (and none in the recipe)
    it is what `convert` held out of the teacher's own sequences. Raises the errors of `prepare`, and
    UsageError where the two do not belong together.
    """
    model = evaluation.load_model(Path(folder))
    recipe = recipe_yaml.read(Path(folder) / "recipe.yaml")
    job = _evaluation_job(source, recipe, data, read_config(Path(folder)), readout=model.spec.main.readout)
    if job.teacher.spec not in (model.spec.floating, student.with_copies(model.spec, 1)):
        raise UsageError(f"{folder}: was not made from a network of this shape; give the source file it was converted from")
    soft = anneal.soft_mode_at(recipe, 1.0)
    report = evaluation.evaluate_parts(
        teacher=job.teacher,
        model=model,
        task=job.task,
        part=job.parts.test,
        soft_mode=soft,
        gates=recipe.gates,
        names=job.parts.names,
        native=evaluation.load_native(Path(folder)),
    )
    report["size"] = evaluation.sizes(job.loaded.provenance["bytes"], Path(folder))
    return report
