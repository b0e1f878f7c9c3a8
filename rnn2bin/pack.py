"""Student <-> packed directory. Atomic; no arithmetic beyond the last rounding to fp16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnn2bin import spec as specs
from rnn2bin import storage
from rnn2bin.cells.network import Network
from rnn2bin.errors import DivergedError, UnsupportedError, UsageError
from rnn2bin.packed import CONFIG, WEIGHTS

PARTIAL, RUNTIME = ".partial", "runtime"
# task -> the class that transformers loads it by (rnn2bin.hub.heads)
ARCHITECTURES = {
    "next-token": "Rnn2binForCausalLM",
    "classify": "Rnn2binForSequenceClassification",
    "tag": "Rnn2binForTokenClassification",
}
RUNTIME_FILES = ("*.h", "*.c", "kernels/*.h", "kernels/*.c", "Makefile", "README.md")


@contextmanager
def staging(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A sibling directory to write into; renamed to `out` at the end, removed when anything fails: old or new, never between.

    Raises UsageError when `out` exists without `force`, ResourceError when the disk does not take it.
    """
    check_free(out, force=force)
    folder = out.with_name(out.name + PARTIAL)
    try:
        with storage.failures(out, "nothing was changed; free space or choose another --out"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            yield folder
            storage.sync_tree(folder)
            storage.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(out: Path) -> None:
    """Before the work starts: can a directory be made beside `out`? Raises ResourceError."""
    folder = out.with_name(out.name + PARTIAL)
    with storage.failures(out, "nothing was changed; choose another --out"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        folder.rmdir()


def check_free(out: Path, *, force: bool) -> None:
    """Before the work starts: is `out` free, or ours to replace?"""
    storage.recover(out)
    if not out.exists():
        return
    if not force:
        raise UsageError(f"{out}: exists already; choose another --out, or --force to replace it")
    if not (out / CONFIG).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not a packed directory; --force replaces nothing else")


def write_model(student: Network, folder: Path, *, provenance: dict[str, Any], task: dict[str, Any]) -> None:
    """config.json and model.safetensors. Raises DivergedError where a weight is not finite in fp16."""
    tensors = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in student.shipped().items()}
    bad = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise DivergedError(*(f"{name}: not finite in fp16; nothing was packed; lower train.learning_rate" for name in bad))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config_of(student, provenance=provenance, task=task), indent=2) + "\n")


def write_runtime(folder: Path) -> None:
    """Into `folder`/runtime the native runtime's sources, a Makefile, an example and a README: builds with a C compiler and make alone."""
    source = Path(__file__).parent / "runtime" / "native"
    for pattern in RUNTIME_FILES:
        for file in source.glob(pattern):
            target = folder / RUNTIME / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def config_of(student: Network, *, provenance: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    gates = {
        prefix: {g: "binary" if b else "soft" for g, b in zip(cell.layer.kind.gate_names, cell.binary, strict=True)}
        for prefix, cell in student.cells().items()
    }
    return {
        "model_type": "rnn2bin",
        "architectures": [ARCHITECTURES.get(str(task.get("name")), "Rnn2binModel")],
        "format_version": specs.FORMAT_VERSION,
        "torch_dtype": "float16",
        "spec": specs.to_dict(student.spec),
        "gates": gates,
        "levels": student.levels,
        "weights": student.weights,
        "task": task,
        "provenance": provenance,
    }


def build(config: dict[str, Any]) -> Network:
    """An empty network of the config's spec. Raises UnsupportedError."""
    spec = specs.from_dict(config.get("spec") or {})
    gates = config.get("gates") or {}
    reasons = [] if isinstance(gates, dict) else [f"{CONFIG}: gates must be a map of cells to gates"]
    for prefix, layer in spec.cell_names() if not reasons else ():
        found = gates.get(prefix)
        if not isinstance(found, dict) or list(found) != list(layer.kind.gate_names):
            reasons.append(f"{CONFIG}: gates of {prefix} missing or out of order")
        elif any(value not in ("binary", "soft") for value in found.values()):
            reasons.append(f"{CONFIG}: gates of {prefix} must be binary or soft")
    if config.get("weights", "fp16") not in ("fp16", "int8"):
        reasons.append(f"{CONFIG}: weights must be fp16 or int8, not {config['weights']!r}")
    if config.get("levels") not in ("learned", "strict"):
        reasons.append(f"{CONFIG}: levels must be learned or strict, not {config.get('levels')!r}")
    if reasons:
        raise UnsupportedError(*reasons)
    binary = {prefix: tuple(v == "binary" for v in gates[prefix].values()) for prefix, _ in spec.cell_names()}
    network = Network(spec, binary, levels=config["levels"])
    network.weights = config.get("weights", "fp16")  # on their grids already
    return network


def read_network(path: Path, config: dict[str, Any]) -> Network:
    """The network of a packed directory with its weights. Raises UnsupportedError.

    The sizes that config.json claims are held against the header of the weights before they are allocated.
    """
    weights = read_weights(path, _claimed(path, config))
    network = build(config)
    network.load_state_dict(weights)
    _check_rows(path, network)
    return network


def _check_rows(path: Path, network: Network) -> None:
    """Units read rows of gates that there are."""
    for prefix, cell in network.cells().items():
        if (shared := cell.layer.shared) == 1:
            continue
        row, rows = cell.tensor("gates.row"), cell.layer.gate_rows(shared)
        if not bool(((row >= 0) & (row < rows) & (row == row.floor())).all()):
            raise UnsupportedError(f"{path / WEIGHTS}: {prefix}.gates.row: a unit reads no row of {rows}")


def read_around(path: Path, config: dict[str, Any]) -> Network:
    """The same without the weights of its layers, which stay on the meta device: for a runtime that runs them itself."""
    network = _claimed(path, config)
    cells = tuple(f"{prefix}." for prefix in network.cells())
    network.load_state_dict(read_weights(path, network, leave=cells), strict=False, assign=True)
    return network.eval().requires_grad_(False)


def _claimed(path: Path, config: dict[str, Any]) -> Network:
    """The network that config.json claims, without memory."""
    _check_count(path, specs.from_dict(config.get("spec") or {}))
    try:
        with torch.device("meta"):
            return build(config)
    except RuntimeError:  # sizes whose product overflows
        raise UnsupportedError(f"{path / CONFIG}: the spec claims sizes that no network has") from None


def _check_count(path: Path, spec: specs.RnnSpec) -> None:
    """Even an empty module costs memory: no more of them than the weights file has tensors for."""
    file = path / WEIGHTS
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
    except (SafetensorError, OSError) as error:
        raise UnsupportedError(f"{file}: not readable ({error})") from None
    missing = [name for name in spec.tensors() if name not in names]
    if len(missing) > len(names):
        raise UnsupportedError(f"{file}: {len(missing)} tensors that {CONFIG} names are missing, the first {missing[0]}")


def read_weights(path: Path, network: Network, *, leave: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """fp16 weights as float32, checked against the network by name, shape and dtype (UnsupportedError lists every misfit). What begins
    with one of `leave` is checked and not read."""
    file = path / WEIGHTS
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            found = {name: stored.get_slice(name) for name in names & set(wanted)}
            reasons = [f"{file}: tensor {name} is missing" for name in sorted(set(wanted) - names)]
            reasons += [f"{file}: unknown tensor {name}" for name in sorted(names - set(wanted))]
            reasons += [
                f"{file}: {name} has shape {tuple(part.get_shape())} {part.get_dtype()}; wanted {wanted[name]} F16"
                for name, part in sorted(found.items())
                if tuple(part.get_shape()) != wanted[name] or part.get_dtype() != "F16"
            ]
            if reasons:
                raise UnsupportedError(*reasons)
            return {name: stored.get_tensor(name).float() for name in wanted if not name.startswith(leave)}
    except (SafetensorError, OSError) as error:
        raise UnsupportedError(f"{file}: not readable ({error})") from None


def packed_bytes(folder: Path) -> int:
    """Size of what must ship to run: config and weights."""
    return sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))
