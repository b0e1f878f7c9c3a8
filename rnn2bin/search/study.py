"""`rnn2bin search`: Optuna over recipes. Two objectives, the relative drop and the density, both on the validation part.

The study is stored, so that it can be stopped, gone on with, and shared by many workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rnn2bin import data as parts_of
from rnn2bin import pipeline, processes, recipe_yaml, signals, storage
from rnn2bin.distill import trainer as distiller
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import BudgetError, DivergedError, InterruptedRunError, ResourceError, UnreachableError, UsageError
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Recipe
from rnn2bin.search import picture, space
from rnn2bin.search.descent import limits_of
from rnn2bin.search.front import Found, choose, front, missed
from rnn2bin.search.measured import blind, measure

Report = dict[str, Any]
Progress = Callable[[dict[str, Any]], None]

HEARTBEAT, GRACE = 15, 60  # seconds; a worker that was killed gives its trial back after the second
RIVALS = 3  # trials that a running one is compared with before it may be stopped early
PATIENCE = 0.25  # progress before which none is stopped
LONG = 4  # one trial in so many is the most promising one at full length
RESULT, PICTURE, RECIPE, TRIALS, LOCK, STUDY = "search.json", "front.svg", "recipe.yaml", "trials", "lock", "study.db"


@dataclass(frozen=True)
class Order:
    """What one command asks for."""

    recipe: Recipe
    space: space.Space
    out: Path
    trials: int
    timeout: float | None = None
    url: str | None = None  # of the study's data base; None: a SQLite file in `out`


def search(
    source: str | Path,
    *,
    recipe: str | Path | Recipe = "anneal.yaml",
    data: Any = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    knobs: str | Path | None = None,
    trials: int = 40,
    timeout: float | None = None,
    study: str | None = None,
    seed: int | None = None,
    max_drop: float | None = None,
    max_density: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Search recipes for `source` until the study holds `trials` finished ones, or for `timeout` seconds; the report of search.json.

    Writes into `out` (default: the source's name + ".search"): study.db, search.json, front.svg, and recipe.yaml, the chosen one. The
    same call goes on with the study. Raises BudgetError where limits are given and no trial keeps them, InterruptedRunError on SIGINT and
    SIGTERM, UsageError where `out` holds another study, and the errors of `pipeline.prepare`.
    """
    chosen = recipe_yaml.resolve(recipe, overrides, seed=seed, max_drop=max_drop, max_density=max_density)
    folder = Path(out) if out is not None else Path(Path(source).name + ".search")
    return run(source, Order(chosen, space.read(chosen, knobs), folder, trials, timeout, study), data, force=force, progress=progress)


def run(source: str | Path, order: Order, given: Any, *, force: bool = False, progress: Progress | None = None) -> Report:
    """`search` with everything resolved."""
    if processes.count() > 1:
        raise UsageError("search: start the command several times with the same --out, or --study; torchrun is for one long conversion")
    optuna = _optuna()
    job = pipeline.prepare(source, order.recipe, given)
    key = key_of(order, job.loaded.provenance["sha256"], parts_of.digest(job.parts))
    check_out(order.out, key, force=force)
    with _keeping(order.out), _locked(order.out / LOCK):
        (order.out / TRIALS).mkdir(exist_ok=True)
        study = _study(optuna, order, key)
    worker = Worker(optuna, study, blind(job), order, key, progress)
    with _keeping(order.out):
        worker.work()
        return worker.finish()


def key_of(order: Order, source_sha256: str, data_sha256: str) -> str:
    """What the trials of one study have in common; the limits only choose among them."""
    knobs = {name: [type(knob).__name__, asdict(knob)] for name, knob in order.space.items()}
    return _sha(f"{source_sha256} {data_sha256} {order.recipe.model_dump_json(exclude={'report'})} {json.dumps(knobs)}")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_out(out: Path, key: str, *, force: bool) -> None:
    """UsageError where `out` is something else, or holds the results of another search and `force` is not given."""
    ours = {RESULT, PICTURE, RECIPE, TRIALS, LOCK, STUDY}
    if out.exists():
        names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
        if any(name.removesuffix(".part") not in ours and not name.startswith(STUDY) for name in names):
            raise UsageError(f"{out}: a search writes here, but it holds something else; choose another --out")
        with contextlib.suppress(FileNotFoundError):
            try:
                there = json.loads((out / RESULT).read_text(encoding="utf-8"))["key"]
            except (ValueError, KeyError, TypeError):
                there = None
            if there != key and not force:
                raise UsageError(
                    f"{out}: holds a search with another model, recipe, data or knobs; --force replaces it, or choose another --out"
                )
    with storage.failures(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------------------------- the study


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError("search needs optuna: pip install 'rnn2bin[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # what is worth telling is told by us
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return optuna


def _study(optuna: Any, order: Order, key: str) -> Any:
    """The stored study, made or found again; its first trial is the recipe as it is."""
    url = order.url or f"sqlite:///{(order.out / STUDY).absolute()}"
    with warnings.catch_warnings(), _database(url):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        kept = optuna.storages.RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        study = optuna.create_study(storage=kept, study_name=f"rnn2bin-{key}", directions=["minimize", "minimize"], load_if_exists=True)
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(space.start(order.recipe, order.space))
    return study


@contextmanager
def _database(url: str) -> Iterator[None]:
    """What a data base refuses, in one line and without the URL's password."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except ArgumentError:
        raise UsageError("--study: not a data base URL; give one like sqlite:///study.db or postgresql+psycopg2://user@host/name") from None
    except ImportError as error:
        raise UsageError(f"--study: {make_url(url).drivername} needs a Python driver that is not installed ({_line(error)})") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        reason = _line(getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error)
        raise ResourceError(
            f"{make_url(url).render_as_string(hide_password=True)}: the study cannot be read or written ({reason})"
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())[:200]


class Worker:
    """One process at a study: takes trials until there are enough."""

    def __init__(self, optuna: Any, study: Any, job: Any, order: Order, key: str, progress: Progress | None) -> None:
        self.optuna, self.study, self.job, self.order, self.key, self.progress = optuna, study, job, order, key, progress
        self.states = optuna.trial.TrialState
        self.selection = distiller.selection_part(job.parts.valid)
        self.teacher = compare(job.task, self.selection, Candidate(job.teacher, FLOAT, run_cell), {})["teacher"].value

    def work(self) -> None:
        """Until the study holds enough finished trials, or the time is over."""
        if len(self.finished()) >= self.order.trials:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            with _database(self.order.url or "sqlite://"):
                self.study.optimize(self._trial, timeout=self.order.timeout, callbacks=[self._ended])

    def finished(self) -> list[Any]:
        """Measured to the end, or stopped for good."""
        return self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE, self.states.PRUNED))

    def complete(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,))

    # -- one trial

    def _trial(self, trial: Any) -> tuple[float, float]:
        """Its two objectives. One that a signal stops waits in the study, its checkpoint in `out`: whoever takes it next goes on."""
        values = self._suggest(trial)
        recipe = space.applied(self.order.recipe, values)
        name = _sha(recipe.model_dump_json())
        trial.set_user_attr("recipe", name)
        known = next((t for t in self.complete() if t.user_attrs.get("recipe") == name), None)
        if known is not None:
            for attribute, value in known.user_attrs.items():
                trial.set_user_attr(attribute, value)
            return tuple(known.values)
        folder = self.order.out / TRIALS / name
        folder.mkdir(exist_ok=True)
        try:
            with _locked(folder.with_suffix(".lock"), wait=False):
                return self._train(trial, recipe, folder)
        except BlockingIOError:
            self._stop(trial, "another worker trains the same recipe")
        except (DivergedError, UnreachableError) as error:
            self._stop(trial, error.reasons[0].split(";")[0])
        except (InterruptedRunError, KeyboardInterrupt):
            self.study.enqueue_trial(values)
            raise
        raise AssertionError

    def _stop(self, trial: Any, why: str) -> None:
        trial.set_user_attr("stopped", why)
        raise self.optuna.TrialPruned(why)

    def _suggest(self, trial: Any) -> dict[str, Any]:
        """Values of the knobs, drawn by a generator of the trial's own: the same for a seed, whichever worker draws."""
        sampler = self.optuna.samplers.TPESampler(seed=(self.order.recipe.seed * 1_000_003 + trial.number) % 2**32, constant_liar=True)
        steps = self.order.space.get(space.STEPS)
        if isinstance(steps, space.Choice):  # a longer one is only asked for by `_promote`
            sampler = self.optuna.samplers.PartialFixedSampler({space.STEPS: steps.values[0]}, sampler)
        self.study.sampler = sampler
        found = {}
        for name, knob in self.order.space.items():
            if isinstance(knob, space.Choice):
                found[name] = trial.suggest_categorical(name, knob.values)
            else:
                found[name] = float(f"{trial.suggest_float(name, knob.low, knob.high, log=knob.log):.4g}")
        return found

    def _train(self, trial: Any, recipe: Recipe, folder: Path) -> tuple[float, float]:
        began = time.perf_counter()
        job = replace(self.job, recipe=recipe)
        network, trained = pipeline.distil(job, folder, resume=True, progress=self._watch(trial, recipe))
        found = measure(job, network)
        curve = [(point.progress, self._drop(point.hard)) for point in trained.history]
        seconds = trained.seconds_before + time.perf_counter() - began
        trial.set_user_attr("measured", {"highest": found.highest, "steps": trained.steps, "seconds": seconds, "curve": curve})
        pipeline.discard(folder)
        return found.drop, found.density

    def _drop(self, hard: float) -> float:
        """Relative, on the part that checkpoints are chosen by."""
        worse = self.teacher - hard if self.job.task.higher_is_better else hard - self.teacher
        return worse / (abs(self.teacher) or 1.0)

    def _watch(self, trial: Any, recipe: Recipe) -> Progress:
        """Sees every measurement of the trainer with hard gates, and stops a trial that is behind. (Optuna's own pruners know one objective
        only.)"""
        seen = [-1]

        def watch(now: dict[str, Any]) -> None:
            if now["hard"] is None or now["measured"] == seen[0]:
                return
            seen[0] = now["measured"]
            wanted = recipe.budget.density
            rivals = [t.user_attrs["measured"]["curve"] for t in self.complete() if wanted is None or t.values[1] <= wanted]
            if behind(now["progress"], self._drop(now["hard"]), rivals):
                pipeline.discard(self.order.out / TRIALS / trial.user_attrs["recipe"])
                self._stop(trial, f"behind at step {now['measured']}")

        return watch

    # -- after each

    def _ended(self, study: Any, trial: Any) -> None:
        if self.progress:
            self.progress(row(trial, self.order.space) | {"finished": len(self.finished()), "trials": self.order.trials})
        self._promote()
        if len(self.finished()) >= self.order.trials:
            study.stop()

    def _promote(self) -> None:
        """One trial in LONG is the most promising short one, at full length."""
        steps = self.order.space.get(space.STEPS)
        if not isinstance(steps, space.Choice) or len(steps.values) < 2:
            return
        every = [(self._values(t), t) for t in self.study.get_trials(deepcopy=False) if t.state != self.states.FAIL]
        lengthened = [{**values, space.STEPS: None} for values, _ in every if values.get(space.STEPS) == steps.values[-1]]
        short = [
            found_of(t, self.order.space)
            for values, t in every
            if t.state == self.states.COMPLETE
            and values.get(space.STEPS) == steps.values[0]
            and {**values, space.STEPS: None} not in lengthened
        ]
        if short and len(every) >= LONG * max(1, len(lengthened)):
            best = choose(short, limits_of(self.order.recipe))[0]
            self.study.enqueue_trial({**self._values(best.what), space.STEPS: steps.values[-1]})

    @staticmethod
    def _values(trial: Any) -> dict[str, Any]:
        """Knobs of a trial that ran, or that waits to."""
        return rounded(trial.params or trial.system_attrs.get("fixed_params", {}))

    # -- the end

    def finish(self) -> Report:
        """Writes what was found; BudgetError where nothing keeps the limits."""
        limits = limits_of(self.order.recipe)
        rows = [row(t, self.order.space) for t in self.finished()]
        found = [found_of(t, self.order.space) for t in self.complete()]
        if not found:
            raise InterruptedRunError(f"no trial was finished ({len(rows)} were stopped early); the same command goes on")
        best, kept = choose(found, limits)
        report = {
            "schema_version": 1,
            "key": self.key,
            "metric": {"name": self.job.task.metric, "higher_is_better": self.job.task.higher_is_better},
            "part": "validation",
            "limits": asdict(limits),
            "trials": rows,
            "front": [one.what.number for one in front(found)],
            "chosen": best.what.number if kept else None,
            "nearest": best.what.number,
            "recipe": str(self.order.out / RECIPE) if kept else None,
        }
        with _locked(self.order.out / LOCK):
            storage.write_synced(self.order.out / RESULT, json.dumps(report, indent=2, allow_nan=False) + "\n")
            storage.write_synced(self.order.out / PICTURE, picture.draw(report))
            if kept:
                recipe = space.applied(self.order.recipe, rounded(best.what.params))
                storage.write_synced(self.order.out / RECIPE, recipe_yaml.dump(recipe))
            else:
                (self.order.out / RECIPE).unlink(missing_ok=True)
        if not kept:
            raise BudgetError(
                missed(best, limits).replace("nothing was written", f"no recipe was written, the search is in {self.order.out}")
            )
        return report


def rounded(params: dict[str, Any]) -> dict[str, Any]:
    """Values as trials are run with them."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in params.items()}


def found_of(trial: Any, knobs: space.Space) -> Found:
    return Found(trial.values[0], trial.values[1], trial.user_attrs["measured"]["highest"], trial)


def row(trial: Any, knobs: space.Space) -> Report:
    """A trial as plain data."""
    values, measured = trial.values or (None, None), trial.user_attrs.get("measured", {})
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "drop": values[0],
        "drop_at_most": measured.get("highest"),
        "density": values[1],
        "steps": measured.get("steps"),
        "seconds": measured.get("seconds"),
        "stopped": trial.user_attrs.get("stopped"),
        "knobs": {name: rounded(trial.params).get(name) for name in knobs},
    }


def behind(progress: float, drop: float, rivals: Sequence[Sequence[Sequence[float]]]) -> bool:
    """Whether a trial loses more than the median of those that ended reading no more than it wants to, at the same share of the way.

    `rivals`: their (progress, drop) pairs."""
    if progress < PATIENCE:
        return False
    then = [min(before) for curve in rivals if (before := [lost for at, lost in curve if at <= progress + 1e-9])]
    return len(then) >= RIVALS and drop > statistics.median(then)


# ---------------------------------------------------------------------------------------------- around it


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Held by one process of this machine at a time; BlockingIOError at once where it is taken and `wait` is off."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def _keeping(out: Path) -> Iterator[None]:
    """A signal, or a disk that takes no more, ends in one line that says how to go on."""
    try:
        with signals.raised(), storage.failures(out, "free space; the same command goes on"):
            yield
    except (KeyboardInterrupt, InterruptedRunError) as error:
        said = error.reasons[0] if isinstance(error, InterruptedRunError) and error.reasons[0].startswith("no trial") else None
        raise InterruptedRunError(said or f"interrupted; the study in {out} keeps what was found; the same command goes on") from None


def render(report: Report) -> str:
    """The front for people, the chosen recipe marked."""
    by_number = {one["number"]: one for one in report["trials"]}
    names = list(report["trials"][0]["knobs"])
    head = ["trial", "drop", "at most", "density", "steps", *(name.rpartition(".")[2] for name in names)]
    lines = [head]
    for number in report["front"]:
        one = by_number[number]
        mark = "*" if number == report["chosen"] else " "
        values = [f"{one['knobs'][name]:g}" if isinstance(one["knobs"][name], int | float) else str(one["knobs"][name]) for name in names]
        lines.append(
            [
                f"{mark}{number}",
                f"{100 * one['drop']:.2f}%",
                f"{100 * one['drop_at_most']:.2f}%",
                f"{one['density']:.3f}",
                str(one["steps"]),
                *values,
            ]
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    states = [one["state"] for one in report["trials"]]
    counts = f"{states.count('complete')} trials finished, {states.count('pruned')} stopped early"
    return "\n".join([*table, f"{counts}; drop and density of the validation part; * chosen", f"recipe: {report['recipe']}"])
