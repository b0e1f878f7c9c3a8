"""The results table, one command a row: from the network's file as it is shipped to a line of docs/results.json.

    python scripts/results.py g2p                          # no budget, learned levels
    python scripts/results.py g2p --budget 0.25            # the same with sparse.yaml
    python scripts/results.py g2p --levels strict
    python scripts/results.py g2p --bench                  # the same row, its speed measured again on a machine at rest
    python scripts/results.py g2p --control                # the same row, with the float network trained as long, where it has none
    python scripts/results.py --table --plot               # docs/results.md, README.md and docs/results.png from docs/results.json

A row is data (scripts/public_data.py), `rnn2bin convert`, its report, and `rnn2bin bench` where the native runtime takes the network.
One rule for all cases says how a row is trained: `training`. Packages, sounds and fortunes: docs/public-networks.md.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import results_table

from rnn2bin import measure, pipeline, recipe_yaml
from rnn2bin.distill.window import run_cell
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.measure import Candidate

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "results.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network's file, and what its recipe must say of it: `source` names a recipe (`convert --source`), `knobs` are set."""

    file: str
    what: str
    source: str | None = None
    knobs: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()  # how scripts/train_text_teacher.py makes it, where there is no file
    long: bool = False  # a step takes several times as long as elsewhere


CASES = {
    "g2p": Case("g2p_en/checkpoint20.npz", "g2p-en, 2 × GRU 256", source="g2p.yaml"),
    # Convolutions over 576 samples at each of 64 steps, in the teacher and in the student.
    "vad": Case("silero_vad/data/silero_vad_16k_op15.onnx", "silero-vad, conv + LSTM 128", knobs=("source.input_shape=[576]",), long=True),
    "dga": Case("dgaintel/domain_classifier_model.h5", "dgaintel, conv + LSTM 64"),
    "text": Case("textgenrnn/textgenrnn_weights.hdf5", "textgenrnn, 2 × LSTM 128 + attention", source="textgenrnn.yaml"),
    "words": Case("eng_150/weights.h5", "chars2vec, 2 × LSTM 150", source="chars2vec.yaml"),
    "polyphone": Case("g2pM/np_ckpt.pkl", "g2pM, BiLSTM 32", source="g2pm.yaml"),
    "kjv-lstm": Case("kjv-lstm.pt", "KJV characters, LSTM 256", teacher=("--cell", "LSTM", "--iterations", "3228")),
    "kjv-gru": Case("kjv-gru.pt", "KJV characters, GRU 256", teacher=("--cell", "GRU", "--iterations", "1600")),
    "voice": Case("resemblyzer/pretrained.pt", "Resemblyzer, 3 × LSTM 256", source="resemblyzer.yaml", long=True),
    # Its attention makes B·T·T·512 numbers, so memory wants small batches; everything else is as in the other cases.
    "diacritics": Case(
        "assets/bilstm_best.pt",
        "arabic-diacritizer, 3 × BiLSTM 256 + attention",
        source="diacritics.yaml",
        knobs=("train.batch_size=8",),
        long=True,
    ),
}
BUDGETS, LEVELS = ("none", "0.25", "0.10"), ("learned", "strict")
STEPS = {True: 4000, False: 16_000}  # the recipes' own: without a budget batches of 64, with one of 32
LONG = 5  # such cases get so many times fewer
MEASUREMENTS = 8
TEACHERS_AGREE = 1e-4  # relative: the same network on the same data, another machine's float sums


# ---- a row --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, and where things lie."""

    case: str
    budget: str
    levels: str
    steps: int | None
    seed: int
    packages: Path
    sounds: Path
    fortunes: Path

    @property
    def name(self) -> str:
        return f"{self.case}-{self.budget}-{self.levels}"

    @property
    def free(self) -> bool:
        return self.budget == "none"


def rnn2bin(*words: str) -> list[str]:
    return [sys.executable, "-m", "rnn2bin", *words]


def quiet(command: Sequence[str]) -> str:
    """Its stdout; SystemExit with its stderr where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread())
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def data_of(asked: Asked) -> list[str]:
    """The `--data` of a case, made where it is not there yet."""
    folder = asked.packages / asked.case.partition("-")[0]
    kind = "txt" if CASES[asked.case].teacher else "npz"
    if not (folder / f"test.{kind}").exists():
        make_text(folder) if kind == "txt" else make_arrays(asked, folder)
    return [f"{part}={folder / part}.{kind}" for part in ("train", "valid", "test")]


def make_arrays(asked: Asked, folder: Path) -> None:
    places = ["--packages", str(asked.packages), "--sounds", str(asked.sounds), "--fortunes", str(asked.fortunes)]
    quiet([sys.executable, "scripts/public_data.py", asked.case, *places, "--out", str(folder), "--seed", "0"])


def make_text(folder: Path) -> None:
    """Debian's bible-kjv without the verses' numbers. The test part is the last 5%, which train_text_teacher.py holds out too."""
    folder.mkdir(parents=True, exist_ok=True)
    verses = quiet(["bible", "-f", "gen1:1-rev22:21"]).splitlines()
    text = "".join(verse.partition(" ")[2] + "\n" for verse in verses)
    (folder / "kjv.txt").write_text(text, encoding="utf-8")
    for part, content in text_parts(text).items():
        (folder / f"{part}.txt").write_text(content, encoding="utf-8")


def text_parts(text: str) -> dict[str, str]:
    first, second = int(len(text) * 0.9), int(len(text) * 0.95)
    return {"train": text[:first], "valid": text[first:second], "test": text[second:]}


def model_of(asked: Asked) -> Path:
    case = CASES[asked.case]
    if case.teacher:
        path = asked.packages / "kjv" / case.file
        if not path.exists():
            quiet([sys.executable, "scripts/train_text_teacher.py", str(path.with_name("kjv.txt")), *case.teacher, "--out", str(path)])
        return path
    path = next(iter(sorted(asked.packages.rglob(case.file))), None)
    if path is None:
        raise SystemExit(f"no {case.file} below {asked.packages}: run scripts/public_packages.sh")
    return path


def training(asked: Asked, steps: int) -> list[str]:
    """What `convert` is told of it."""
    return ["--recipe", recipe_name(asked), *sets(knobs_of(asked, steps))]


def recipe_name(asked: Asked) -> str:
    return "anneal.yaml" if asked.free else "sparse.yaml"


def knobs_of(asked: Asked, steps: int) -> list[str]:
    """How every case is trained: as many steps as the rule says, measured eight times on the way."""
    budget = [] if asked.free else [f"budget.density={asked.budget}"]
    strict = ["gates.levels=strict"] if asked.levels == "strict" else []
    measured = max(1, steps // MEASUREMENTS)
    return [*budget, f"train.steps={steps}", f"train.max_steps={steps}", f"train.evaluate_every={measured}", *strict, *controls(asked)]


def controls(asked: Asked) -> list[str]:
    """The float network trained as long is each row's own control; what the plain cut loses is the same whatever the gates are trained for,
    and once a case is enough."""
    return ["report.float_same_compute=true", *([] if asked.free and asked.levels == "learned" else ["report.controls=false"])]


def sets(knobs: Sequence[str]) -> list[str]:
    return [word for knob in knobs for word in ("--set", knob)]


def conversion(asked: Asked, model: Path, data: Sequence[str], *, steps: int) -> list[str]:
    """The words behind `rnn2bin`."""
    case = CASES[asked.case]
    about = [*(["--source", case.source] if case.source else []), *sets(case.knobs)]
    given = [word for part in data for word in ("--data", part)]
    return ["convert", str(model), *about, *training(asked, steps), *given, "--seed", str(asked.seed)]


def steps_of(asked: Asked) -> int:
    """One rule for all cases; `--steps` says otherwise."""
    return asked.steps or STEPS[asked.free] // (LONG if CASES[asked.case].long else 1)


def converted(command: Sequence[str], log: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Report of a conversion, and its seconds: all, until the student's last step (the float control follows it), the processor's."""
    began, used, last = time.perf_counter(), processor_seconds(), 0.0
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": one_thread()}
    with log.open("w", encoding="utf-8") as kept, log.with_suffix(".json").open("w+", encoding="utf-8") as out:
        with subprocess.Popen(command, stdout=out, **pipes) as running:
            for line in running.stderr or ():
                last = time.perf_counter() - began if line.startswith("{") else last
                kept.write(line)
                kept.flush()
        if running.returncode:
            raise SystemExit(f"{shlex.join(command)}\nexit code {running.returncode}: {log}")
        out.seek(0)
        return json.load(out), {"all": time.perf_counter() - began, "student": last, "processor": processor_seconds() - used}


def processor_seconds() -> float:
    """Of the processes that were waited for: beside other jobs the clock says little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def benched(out: Path, data: Path) -> tuple[dict[str, Any] | None, str | None]:
    """`rnn2bin bench`'s document, or None and why not: the native runtime does not take every network."""
    command = rnn2bin("bench", str(out), "--data", str(data), "--against", "torch,ort", "--json")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread())
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["?"])[-1]
    return json.loads(done.stdout), None


def speeds(bench: dict[str, Any]) -> dict[str, Any]:
    """Call -> our µs a step by the default kernels, and the fastest rival's."""
    found = {}
    for row in bench["rows"]:
        if row["compute"] == "auto":
            best = min(row["rivals"], key=lambda name: row["rivals"][name]["us_per_step"], default=None)
            rival = {"rival": best, **row["rivals"][best]} if best else None
            found[row["call"]] = {"us_per_step": row["us_per_step"], "read": row["density"], "best": rival}
    return found


def row_of(asked: Asked, report: dict[str, Any], *, command: Sequence[str], seconds: dict[str, float]) -> Row:
    """What a line of the table needs, from report.json."""
    recipe = report["provenance"]["recipe"]
    figures = {name: report[name] and report[name]["metric"] for name in ("teacher", "soft_student", "binary", "native")}
    return {
        "case": asked.case,
        "budget": asked.budget,
        "levels": asked.levels,
        "command": shlex.join(["rnn2bin", *(relative(word) for word in command)]),
        "seed": asked.seed,
        "steps": report["cost"]["steps"],
        "best_step": report["cost"]["best_step"],
        "learning_rate": report["cost"]["learning_rate"],
        "batch_size": recipe["train"]["batch_size"],
        "metric": report["metric"],
        **figures,
        "controls": {name: one["metric"] for name, one in (report["controls"] or {}).items()},
        "agreement": (report["binary"].get("extra") or {}).get("agreement"),
        "drop": report["drop"],
        "density": {name: report["density"][name] for name in ("read", "weights_touched", "around", "candidate_rows", "columns")},
        "size": report["size"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": report["provenance"]["versions"],
        "machine": report["provenance"]["machine"],
        "model_sha256": report["provenance"]["model_sha256"],
    }


def relative(word: str) -> str:
    return word.replace(f"{ROOT}/", "")


def commit() -> str:
    return quiet(["git", "rev-parse", "--short", "HEAD"]).strip()


def make_row(asked: Asked) -> Row:
    data, model = data_of(asked), model_of(asked)
    folder = asked.packages / "results"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / asked.name
    words = conversion(asked, model, data, steps=steps_of(asked))
    report, seconds = converted(rnn2bin(*words, "--out", str(out), "--force", "--json"), folder / f"{asked.name}.log")
    row = row_of(asked, report, command=words, seconds=seconds)
    return with_speed(row, out, data) | {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}


def with_speed(row: Row, out: Path, data: Sequence[str]) -> Row:
    bench, reason = benched(out, Path(data[-1].partition("=")[2]))
    return row | {"bench": speeds(bench) if bench else None, "bench_reason": reason, "load": round(os.getloadavg()[0], 2)}


def bench_again(asked: Asked, rows: Sequence[Row]) -> Row:
    """The newest row of this setting with another measurement of its speed, from the packed directory that it left."""
    row, out = newest(asked, rows), asked.packages / "results" / asked.name
    if not out.is_dir():
        raise SystemExit(f"no {out}: make it first, without --bench")
    return with_speed(row, out, data_of(asked))


def control_again(asked: Asked, rows: Sequence[Row]) -> Row:
    """The newest row of this setting with the float network trained as long, as `report.float_same_compute` does it, and measured as the
    row's networks were. Its student is neither trained nor measured again."""
    row, case = newest(asked, rows), CASES[asked.case]
    if asked.free and "learning_rate" not in row:
        raise SystemExit(f"{asked.name}: the row is too old to say its rate; make it again")
    overrides = [*case.knobs, *knobs_of(asked, row["steps"])]
    recipe = recipe_yaml.resolve(recipe_name(asked), overrides, source=case.source, seed=row["seed"])
    job = pipeline.prepare(model_of(asked), recipe, data_of(asked))
    began, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        network = pipeline.float_control(job, Path(folder), rate_found=row.get("learning_rate"))
    seconds = {"all": round(time.perf_counter() - began, 1), "processor": round(time.process_time() - used, 1)}
    teacher, tuned = (Candidate(one, FLOAT, run_cell) for one in (job.teacher, network))
    found = {name: one.value for name, one in measure.compare(job.task, job.parts.test, teacher, {"tuned": tuned}).items()}
    if abs(found["teacher"] - row["teacher"]) > TEACHERS_AGREE * abs(row["teacher"]):
        raise SystemExit(f"{asked.name}: the teacher measures {found['teacher']:.6g}, the row says {row['teacher']:.6g}: other data")
    made = {"seconds": seconds, "commit": commit(), "load": round(os.getloadavg()[0], 2)}
    return row | {"controls": {**row["controls"], "float_same_compute": found["tuned"]}, "control": made}


def newest(asked: Asked, rows: Sequence[Row]) -> Row:
    known = [row for row in rows if (row["case"], row["budget"], row["levels"]) == (asked.case, asked.budget, asked.levels)]
    if not known:
        raise SystemExit(f"no row of {asked.name}: make it first, without --bench or --control")
    return known[-1]


# ---- docs/results.json ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def append(path: Path, row: Row) -> None:
    """One row a line, so that a diff shows what came; written aside and renamed."""
    lines = [json.dumps(one, ensure_ascii=False) for one in [*read_rows(path), row]]
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=CASES)
    parser.add_argument("--budget", choices=BUDGETS, default="none")
    parser.add_argument("--levels", choices=LEVELS, default="learned")
    parser.add_argument("--steps", type=int, help="instead of the rule's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", type=Path, default=ROOT / "demo")
    parser.add_argument("--sounds", type=Path, default=Path("/usr/share/asterisk/sounds"))
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="where rows are kept")
    parser.add_argument("--bench", action="store_true", help="do not convert: measure the speed of the row's network again")
    parser.add_argument("--control", action="store_true", help="do not convert: give the row the float network trained as long")
    parser.add_argument("--table", action="store_true", help="write the tables of docs/results.md and README.md")
    parser.add_argument("--plot", action="store_true", help="write docs/results.png")
    args = parser.parse_args()
    if args.case:
        places = (args.packages, args.sounds, args.fortunes)
        asked = Asked(args.case, args.budget, args.levels, args.steps, args.seed, *places)
        again = bench_again if args.bench else control_again if args.control else None
        row = again(asked, read_rows(args.rows)) if again else make_row(asked)
        append(args.rows, row)
        print(json.dumps(row, indent=1))
    names = {name: case.what for name, case in CASES.items()}
    if args.table:
        results_table.replace(ROOT / "docs" / "results.md", results_table.table(read_rows(args.rows), names))
        results_table.replace(ROOT / "README.md", results_table.short_table(read_rows(args.rows), names))
    if args.plot:
        results_table.plot(read_rows(args.rows), names, ROOT / "docs" / "results.png")


if __name__ == "__main__":
    main()
