"""Fuzz the readers: whatever the bytes, only the errors of rnn2bin/errors.py come out, within 3 x the file + 256 MB of memory.

    python scripts/fuzz.py                              # every reader, 10,000 executions each, by mutation (what tests/test_fuzz.py runs)
    python scripts/fuzz.py --engine atheris --runs 1000000          # every reader, guided by coverage (pip install atheris)
    python scripts/fuzz.py --engine atheris --runs 1000000 npz      # one reader

A new reader is one line in `TARGETS`: honest inputs to start from, and what reads a mutated one. A failing input is written to the current
directory as fuzz-READER.bin, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import pickle
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 16384  # of one input
SHARED = Path("/dev/shm")  # files in memory: on a disk, opening one costs ten times as much as reading it
MEMORY = 256 * 2**20 + 3 * MOST_BYTES


@dataclass(frozen=True)
class Target:
    """`seeds`: honest inputs. `read`: one execution, in a folder of its own kept for the whole run."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], Any]


# ---- honest inputs ----


@functools.cache
def tensors() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in torch.nn.GRU(1, 2).state_dict().items()}


def torch_file(content: Any, *, new: bool = True) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


@functools.cache
def script_file() -> bytes:
    import torch

    stream = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        made: Any = torch.jit.script(torch.nn.GRUCell(1, 2))
        torch.jit.save(made, stream)
    return stream.getvalue()


def legacy_files() -> list[bytes]:
    import torch

    return [torch_file(content, new=False) for content in (tensors(), torch.nn.GRU(1, 2), {"model": tensors(), "epoch": 1})]


def pickles() -> list[bytes]:
    import numpy as np

    values = {
        "w": np.ones((2, 3), np.float32),
        "f": np.asfortranarray(np.ones((2, 3))),
        "more": [1, -2.5, None, True, "ä", b"x", {1}, (2**70,)],
    }
    objects = {"args": argparse.Namespace(a=Path("x")), "kind": io.BytesIO, "o": random.Random(0), **tensors()}
    return [pickle.dumps(values, protocol) for protocol in range(6)] + [pickle.dumps(objects, 2)]


def arrays() -> list[bytes]:
    import numpy as np

    made = []
    for array in (
        np.ones((2, 3), np.float32),
        np.asfortranarray(np.ones((2, 3), ">f8")),
        np.array(1),
        np.array(["a"]),
        np.zeros((0, 4), bool),
    ):
        stream = io.BytesIO()
        np.save(stream, array)
        made.append(stream.getvalue())
    return made


def npz_files() -> list[bytes]:
    import numpy as np

    made = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **{name: tensor.numpy() for name, tensor in tensors().items()})
        made.append(stream.getvalue())
    return made


def safetensors_files() -> list[bytes]:
    from safetensors.torch import save

    return [save(tensors()), save({"a": tensors()["weight_ih_l0"].half()}, {"format": "pt"})]


def safetensors_headers() -> list[bytes]:
    return [data[8 : 8 + struct.unpack("<Q", data[:8])[0]] for data in safetensors_files()]


def indexes() -> list[bytes]:
    return [
        json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode(),
        b'{"weight_map": {"a": "../x"}}',
    ]


@functools.cache
def packed() -> tuple[bytes, bytes]:
    """config.json and model.safetensors."""
    from rnn2bin import pack
    from rnn2bin.cells.network import Network
    from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

    spec = RnnSpec({"main": SectionSpec((LayerSpec("gru", 2, 2),), EmbeddingSpec(3, 2), (LinearSpec(2, 3),))})
    network = Network(spec, {name: (True, False) for name, _ in spec.cell_names()}, levels="learned").requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        pack.write_model(network, Path(folder), provenance={}, task={})
        return (Path(folder) / pack.CONFIG).read_bytes(), (Path(folder) / pack.WEIGHTS).read_bytes()


def recipes() -> list[bytes]:
    from rnn2bin import recipe_yaml

    short = [text for path in recipe_yaml.bundled() if len(text := path.read_bytes()) < 1000]
    return [*short, b"a: &a [*a]\nb: !!python/object:os.system {}\n"]


# ---- executions ----


def stored(members: tuple[tuple[str, bytes], ...]) -> bytes:
    """A zip file without compression; zipfile takes longer to write one than a reader to read it."""
    body, directory = bytearray(), bytearray()
    for name, data in members:
        head = struct.pack("<5H3L2H", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += b"PK\1\2\x14\0" + head + struct.pack("<3H2L", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + head + name.encode() + data
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return bytes(body + directory) + end


def read_file(name: str) -> Callable[[bytes, Path], Any]:
    """The whole of a file is mutated."""

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin import loaders

        path = folder / name
        path.write_bytes(data)
        return loaders.READERS[loaders.SUFFIXES[path.suffix]](path)

    return read


def read_member(name: str, member: str, whole: Callable[[], bytes] | None = None) -> Callable[[bytes, Path], Any]:
    """One member of an archive is mutated; the archive around it stays honest, or most inputs would end at its checksums."""

    @functools.cache
    def around() -> tuple[tuple[str, bytes], ...]:
        with zipfile.ZipFile(io.BytesIO(whole() if whole else b"PK\5\6" + bytes(18))) as archive:
            return tuple((info.filename, archive.read(info)) for info in archive.infolist() if not info.filename.endswith(member))

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin import loaders

        root = next((other.split("/")[0] + "/" for other, _ in around()), "")
        (folder / name).write_bytes(stored((*around(), (root + member, data))))
        return loaders.READERS[loaders.SUFFIXES[Path(name).suffix]](folder / name)

    return read


def member_of(whole: Callable[[], bytes], member: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        with zipfile.ZipFile(io.BytesIO(whole())) as archive:
            return [archive.read(info) for info in archive.infolist() if info.filename.endswith(member)]

    return seeds


def read_header(data: bytes, folder: Path) -> Any:
    return read_file("m.safetensors")(struct.pack("<Q", len(data)) + data + bytes(120), folder)


def read_index(data: bytes, folder: Path) -> Any:
    from rnn2bin.loaders import huggingface

    if not (folder / "1.safetensors").exists():
        from safetensors.torch import save

        for shard, name in (("1", "a"), ("2", "b")):
            (folder / f"{shard}.safetensors").write_bytes(save({name: tensors()["bias_ih_l0"]}))
    (folder / "model.safetensors.index.json").write_bytes(data)
    return huggingface.read(folder)


def read_packed(data: bytes, folder: Path) -> Any:
    from rnn2bin import pack
    from rnn2bin.packed import read_config

    if not (folder / pack.WEIGHTS).exists():
        (folder / pack.WEIGHTS).write_bytes(packed()[1])
    (folder / pack.CONFIG).write_bytes(data)
    return pack.read_network(folder, read_config(folder))


def read_recipe(data: bytes, folder: Path) -> Any:
    from rnn2bin import recipe_yaml

    (folder / "r.yaml").write_bytes(data)
    return recipe_yaml.read(folder / "r.yaml")


def zip_file() -> bytes:
    return torch_file(tensors())


TARGETS: dict[str, Target] = {
    "pickle": Target(pickles, read_file("m.pkl")),
    "torch-legacy": Target(legacy_files, read_file("m.pt")),
    "torch-zip": Target(lambda: [zip_file()], read_file("m.pt")),
    "torch-zip-pickle": Target(member_of(zip_file, "data.pkl"), read_member("m.pt", "data.pkl", zip_file)),
    "torchscript-pickle": Target(member_of(script_file, "data.pkl"), read_member("m.jit", "data.pkl", script_file)),
    "npz": Target(npz_files, read_file("m.npz")),
    "npz-array": Target(arrays, read_member("m.npz", "a.npy")),
    "safetensors": Target(safetensors_files, read_file("m.safetensors")),
    "safetensors-header": Target(safetensors_headers, read_header),
    "huggingface-index": Target(indexes, read_index),
    "packed-config": Target(lambda: [packed()[0]], read_packed),
    "recipe": Target(recipes, read_recipe),
}


# ---- engines ----

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**62, 2**63, 2**64 - 1]

TOKENS = (b"-", b"9" * 20, b'"', b"[" * 30, b"{", b"\0", b"(", b".", b"R", b"\x81", b"b")


def mutate(data: bytes, seeds: list[bytes], dice: random.Random) -> bytes:
    """One to four changes: a byte, a number of any width, a piece taken out, repeated, moved or taken from another seed."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at, length = dice.randrange(len(made) + 1), dice.choice((1, 1, 2, 4, 8, 32))
        match dice.randrange(6):
            case 0:
                made[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                width = dice.choice((1, 2, 4, 8))
                made[at : at + width] = (dice.choice(NUMBERS) % 256**width).to_bytes(width, dice.choice(("little", "big")))
            case 2:
                del made[at : at + length]
            case 3:
                made[at:at] = made[at : at + length] * dice.choice((1, 2, 20))
            case 4:
                made[at : at + length] = dice.choice(TOKENS)
            case _:
                other = dice.choice(seeds)
                start = dice.randrange(len(other) + 1)
                made[at : at + length] = other[start : start + length]
    return bytes(made[:MOST_BYTES])


@contextmanager
def limited() -> Iterator[None]:
    """Address space of what is taken now and MEMORY; a MemoryError is then a failure."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with Path("/proc/self/statm").open() as status:
        now = int(status.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def execute(target: Target, data: bytes, folder: Path) -> bool:
    """True where the input was read, False where it was refused by a typed error; everything else escapes."""
    from rnn2bin.errors import Rnn2binError

    try:
        target.read(data, folder)
    except Rnn2binError:
        return False
    return True


def by_mutation(name: str, *, runs: int, seed: int = 0) -> int:
    """Mutate seeds, and mutants that were still read: changes add up. Returns how many were read; raises what escapes, its input kept."""
    target, dice = TARGETS[name], random.Random(f"{seed} {name}")
    pool = list(target.seeds())
    seeds, read = list(pool), 0
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as made:
        folder = Path(made)
        for data in seeds:
            execute(target, data, folder)  # what it imports is not its memory
        with limited(), warnings.catch_warnings(action="ignore"):
            for _ in range(runs):
                data = mutate(dice.choice(pool), seeds, dice)
                try:
                    good = execute(target, data, folder)
                except BaseException:
                    Path(f"fuzz-{name}.bin").write_bytes(data)
                    raise
                read += good
                if good and len(pool) < 200:
                    pool.append(data)
    return read


def by_coverage(name: str, *, runs: int) -> None:
    """libFuzzer through atheris, with rnn2bin instrumented. Ends the process."""
    import atheris

    with atheris.instrument_imports(include=["rnn2bin"]):
        import rnn2bin.loaders
        import rnn2bin.loaders.inert
        import rnn2bin.pack
        import rnn2bin.recipe_yaml  # noqa: F401
    target = TARGETS[name]
    corpus, folder = (Path(tempfile.mkdtemp(dir=SHARED if SHARED.is_dir() else None)) for _ in range(2))
    for index, data in enumerate(target.seeds()):
        (corpus / str(index)).write_bytes(data)
        execute(target, data, folder)
    warnings.simplefilter("ignore")
    options = [
        f"-runs={runs}",
        f"-max_len={MOST_BYTES}",
        "-seed=1",
        f"-artifact_prefix=fuzz-{name}-",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: execute(target, data, folder) and None)
    with limited():
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
        begun = time.perf_counter()
        if given.engine == "atheris" and len(given.readers) == 1:
            by_coverage(name, runs=given.runs)
        elif given.engine == "atheris":
            command = [sys.executable, __file__, "--engine", "atheris", "--runs", str(given.runs), name]
            code = subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
            failed = failed or code != 0
            print(f"{name}: {given.runs} executions, exit code {code}, {time.perf_counter() - begun:.0f} s", flush=True)
        else:
            read = by_mutation(name, runs=given.runs, seed=given.seed)
            seconds = time.perf_counter() - begun
            print(f"{name}: {given.runs} executions, {read} read, {given.runs - read} refused, {seconds:.1f} s", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
