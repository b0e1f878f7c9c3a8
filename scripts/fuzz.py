"""Fuzz the readers: whatever the bytes, only the errors of rnn2bin/errors.py come out, within 3 x the file + 256 MB of memory.

    python scripts/fuzz.py                              # every reader, 10,000 executions each, by mutation (what tests/test_fuzz.py runs)
    python scripts/fuzz.py --engine atheris --runs 1000000          # every reader, guided by coverage (pip install atheris)
    python scripts/fuzz.py --engine atheris --runs 1000000 npz      # one reader

The readers are in scripts/fuzz_readers.py. A failing input is written to the current directory as fuzz-READER.bin, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fuzz_mutate import MOST_BYTES, of_bytes
from fuzz_readers import TARGETS, Target

SHARED = Path("/dev/shm")  # files in memory: on a disk, opening one costs ten times as much as reading it
MEMORY = 256 * 2**20 + 3 * MOST_BYTES
SECONDS = 0.2  # of processor time for one execution that may not end
BATCH = 500  # executions of a forked process


def mutate(target: Target, data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """What the bytes stand for every other time, where the reader has such a mutation; else the bytes."""
    return target.change(data, seeds, dice) if target.change and dice.random() < 0.5 else of_bytes(data, seeds, dice)


# ---- engines ----


def limit() -> None:
    """Address space of what is taken now and MEMORY from here on; a MemoryError is then a failure."""
    with Path("/proc/self/statm").open() as status:
        now = int(status.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextmanager
def limited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def execute(target: Target, data: bytes, folder: Path) -> bool:
    """True where the input was read, False where it was refused by a typed error; everything else escapes."""
    from rnn2bin.errors import Rnn2binError

    try:
        target.read(data, folder)
    except Rnn2binError as error:
        if "can't allocate memory" in str(error):  # how torch says it, where its errors become ours
            raise MemoryError from error
        return False
    return True


def by_mutation(name: str, *, runs: int, seed: int = 0) -> int:
    """Mutate seeds, and mutants that were still read: changes add up. Returns how many were read; raises what escapes, its input kept."""
    target, dice = TARGETS[name], random.Random(f"{seed} {name}")
    pool = list(target.seeds())
    seeds, read = list(pool), 0
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as made, warnings.catch_warnings(action="ignore"):
        folder = Path(made)
        for data in seeds:
            execute(target, data, folder)  # what it imports is not its memory
        if target.crashes:
            return in_processes(name, folder, runs=runs, dice=dice)
        with limited():
            for _ in range(runs):
                data = mutate(target, dice.choice(pool), seeds, dice)
                try:
                    good = execute(target, data, folder)
                except BaseException:
                    Path(f"fuzz-{name}.bin").write_bytes(data)
                    raise
                read += good
                if good and len(pool) < 200:
                    pool.append(data)
    return read


def in_processes(name: str, folder: Path, *, runs: int, dice: random.Random) -> int:
    """The same, forked: a crash, or an execution that does not end, is no failure where the reader itself runs in a process of its own."""
    target, seeds = TARGETS[name], TARGETS[name].seeds()
    pool, read, ended = list(seeds), 0, 0
    done = folder / "done"
    while runs:
        inputs = [mutate(target, dice.choice(pool), seeds, dice) for _ in range(min(runs, BATCH))]
        done.write_bytes(b"")
        if (child := os.fork()) == 0:
            _executions(name, inputs, folder, done)
        status = os.waitpid(child, 0)[1]
        marks = done.read_bytes()
        if status and not os.WIFSIGNALED(status):
            raise RuntimeError(f"{name}: fuzz-{name}.bin makes it fail (above)")
        ended += bool(status)
        runs -= len(marks) + bool(status)
        read += marks.count(b"1")
        pool += [data for data, mark in zip(inputs, marks, strict=False) if mark == ord("1")][: max(0, 200 - len(pool))]
    if ended:
        print(f"{name}: {ended} executions crashed or did not end, in a process of their own")
    return read


def _executions(name: str, inputs: Sequence[bytes], folder: Path, done: Path) -> None:
    """In the forked process: a mark for every input. Does not return."""
    code = 1
    data = b""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with limited(), done.open("ab", buffering=0) as marks:
            for data in inputs:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
                marks.write(b"01"[execute(TARGETS[name], data, folder)].to_bytes())
        code = 0
    except BaseException:  # said here, seen by the exit code
        traceback.print_exc()
        Path(f"fuzz-{name}.bin").write_bytes(data)
    finally:
        os._exit(code)


def by_coverage(name: str, *, runs: int, seed: int = 0) -> None:
    """libFuzzer through atheris, with rnn2bin instrumented. Ends the process."""
    import atheris

    # The loader of an editable install hands atheris no code to instrument, silently: this tree is imported as a plain folder.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
    sys.path.insert(0, str(Path(__file__).parent.parent))
    with atheris.instrument_imports(include=["rnn2bin"]):
        import rnn2bin.loaders
        import rnn2bin.loaders.inert
        import rnn2bin.pack
        import rnn2bin.recipe_yaml
    if "__ATHERIS_INSTRUMENTED__" not in rnn2bin.recipe_yaml.read.__code__.co_consts:
        raise SystemExit("fuzz: atheris did not instrument rnn2bin: no coverage would guide this run")
    target = TARGETS[name]
    corpus, folder = (Path(tempfile.mkdtemp()) for _ in range(2))
    seeds, dice = target.seeds(), random.Random(0)
    for index, data in enumerate(seeds):
        (corpus / str(index)).write_bytes(data)
        execute(target, data, folder)
    warnings.simplefilter("ignore")

    def change(data: bytes, most: int, seed: int) -> bytes:
        dice.seed(seed)
        assert target.change
        return target.change(data, seeds, dice)[:most] if seed % 2 else atheris.Mutate(data, most)

    options = [
        f"-runs={runs}",
        f"-max_len={MOST_BYTES}",
        f"-seed={seed + 1}",
        f"-artifact_prefix=fuzz-{name}-",
        "-timeout=600",  # of wall time: the machine may be busy
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    ran = itertools.count()

    def one(data: bytes) -> None:
        if next(ran) % BATCH == 0:
            limit()  # what the engine keeps grows through the run, and is not the reader's
        execute(target, data, folder)

    own = {"custom_mutator": change} if target.change else {}
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, **own)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    given = parser.parse_args()
    unknown = [name for name in given.readers if name not in TARGETS]
    if unknown:
        parser.error(f"no reader {unknown[0]}; there are {', '.join(TARGETS)}")
    failed = False
    for name in given.readers or TARGETS:
        begun, runs = time.perf_counter(), max(1, int(given.runs * TARGETS[name].share))
        if given.engine == "atheris" and not TARGETS[name].crashes and len(given.readers) == 1:
            by_coverage(name, runs=runs, seed=given.seed)
        elif given.engine == "atheris" and not TARGETS[name].crashes:
            command = [sys.executable, __file__, "--engine", "atheris", "--runs", str(given.runs), "--seed", str(given.seed), name]
            with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as made:
                code = subprocess.run(command, check=False, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": made}).returncode
            failed = failed or code != 0
            print(f"{name}: {runs} executions, exit code {code}, {time.perf_counter() - begun:.0f} s", flush=True)
        else:  # a crash would end libFuzzer
            read = by_mutation(name, runs=runs, seed=given.seed)
            seconds = time.perf_counter() - begun
            print(f"{name}: {runs} executions, {read} read, {runs - read} refused, {seconds:.1f} s", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
