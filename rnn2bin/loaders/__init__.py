"""Source file -> Loaded (spec and canonical float32 weights). One reader per format; the only place that permutes gates.

No code of a source file is ever run. torch is imported when a file is read, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin import spec as spec_module
from rnn2bin.errors import ResourceError, UnsupportedError, UsageError
from rnn2bin.files import READ_NOW, fingerprint, regular_file
from rnn2bin.loaders import graph_source, huggingface, keras_file, npz, onnx_file, pytorch, recognise, safetensors_file, tensorflow_graph
from rnn2bin.loaders.archive import Archive
from rnn2bin.loaders.assemble import Assembly, build, by_spec, leftovers, unused
from rnn2bin.loaders.render import parts, source_yaml, spec_parts, text
from rnn2bin.recipe import Source
from rnn2bin.spec import RnnSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Inspection", "Loaded", "inspect", "load"]

# Named tensors, from whose names and shapes (or the recipe's `source:`) the network is recognised.
READERS = {"pytorch": pytorch.read, "safetensors": safetensors_file.read, "npz": npz.read, "huggingface": huggingface.read}
# Files that say themselves how their parts join: (path, source) -> Assembly.
GRAPH_READERS: dict[str, Callable[[Path, Source], Assembly]] = {
    "onnx": onnx_file.read,
    "keras": keras_file.read,
    "tensorflow": tensorflow_graph.read,
}
SUFFIXES = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".pickle", ".jit", ".ts", ".torchscript"), "pytorch"),
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".onnx": "onnx",
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "keras"),
    ".pb": "tensorflow",
}
# Known, but not read: said by name, so that nobody has to wonder.
OTHERS = {
    ".pt2": "a torch.export program",
    ".tflite": "a TensorFlow Lite model",
    ".npy": "a single NumPy array",
    ".gguf": "a GGUF file",
}
HDF5 = b"\x89HDF\r\n\x1a\n"
HALF = 65504.0  # the largest number of fp16
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile


@dataclass(frozen=True)
class Loaded:
    """A float network: `weights` has exactly the names and shapes of `spec.tensors()`, float32 and contiguous.

    `readout_stated` is False where the recipe did not say what the head reads; the task may then choose.
    """

    spec: RnnSpec
    weights: dict[str, torch.Tensor]
    provenance: dict[str, Any]
    readout_stated: bool


@dataclass(frozen=True)
class Inspection:
    """What is in a file. `recognised` is None, and `reasons` says why, where the file alone does not make a network."""

    format: str
    tensors: list[tuple[str, tuple[int, ...], str]]
    recognised: RnnSpec | None
    source: str
    reasons: list[str]
    readout_stated: bool
    parts: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `rnn2bin inspect --json`."""
        return {
            "format": self.format,
            "tensors": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in self.tensors],
            "recognised": spec_module.to_dict(self.recognised) if self.recognised else None,
            "parts": self.parts,
            "source": self.source,
            "reasons": self.reasons,
            "readout_stated": self.readout_stated,
            "provenance": self.provenance,
        }

    def render(self) -> str:
        """Text for people: what was recognised, what was not, and the `source:` section to start from."""
        return text(self.format, self.tensors, self.parts, self.reasons, self.source)


@dataclass(frozen=True)
class _Resolved:
    tensors: dict[str, torch.Tensor]
    assembly: Assembly
    draft: recognise.Draft | None
    reasons: list[str]
    readout_stated: bool
    ignore: Sequence[str] = ()
    unused: Sequence[str] = ()


def load(path: str | Path, *, source: Source | None = None) -> Loaded:
    """Read a source file and turn it into the canonical float network.

    Raises UsageError (no such file), UnsupportedError (every reason why it cannot be converted), UnsafeError (reading it would run
    code or exhaust the memory) and ResourceError (it does not fit into memory).
    """
    path = Path(path)
    name = _format(path)
    resolved = _resolved(path, name, source)
    spec = resolved.assembly.spec
    weights = resolved.assembly.weights
    reasons = resolved.reasons or _beyond_half(weights)
    if spec is None or reasons:
        raise UnsupportedError(*(f"{path.name}: {reason}" for reason in reasons))
    return Loaded(spec, weights, _provenance(path, name, resolved.assembly.files), resolved.readout_stated)


def _beyond_half(weights: dict[str, torch.Tensor]) -> list[str]:
    """A reason for every weight that the packed file, which is fp16, cannot hold."""
    largest = {name: float(tensor.abs().max()) for name, tensor in weights.items() if tensor.numel()}
    return [
        f"{name}: holds {value:.4g}, but weights are packed as fp16, which ends at {HALF:g}; scale them, or leave the tensor out"
        for name, value in largest.items()
        if value > HALF
    ]


def inspect(path: str | Path, *, source: Source | None = None) -> Inspection:
    """Say what is in a source file. Raises like `load` for files that cannot be read, never for content that is not recognised."""
    path = Path(path)
    name = _format(path)
    resolved = _resolved(path, name, source)
    tensors, spec = resolved.tensors, resolved.assembly.spec
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    graph = name in GRAPH_READERS or (source is not None and source.has_graph)
    ignored = [*(source.ignore if source else []), *resolved.ignore]
    return Inspection(
        format=name,
        tensors=[(key, shapes[key], str(tensor.dtype).removeprefix("torch.")) for key, tensor in tensors.items()],
        recognised=None if resolved.reasons else resolved.assembly.spec,
        source=""
        if name in GRAPH_READERS and not resolved.draft
        else source_yaml(resolved.draft, resolved.reasons, ignored, resolved.unused),
        reasons=resolved.reasons,
        readout_stated=resolved.readout_stated,
        parts=[*resolved.assembly.notes, *(spec_parts(spec) if spec else [])] if graph else parts(resolved.draft, shapes),
        provenance=_provenance(path, name, resolved.assembly.files),
    )


def _resolved(path: Path, name: str, source: Source | None) -> _Resolved:
    try:
        if name in READERS:
            own = {"inputs", "keras", "output"} | (set() if source and source.has_graph else {"input_shape"})
            if source and (extra := sorted(source.given & own)):
                raise UsageError(f"source: {', '.join(extra)}: for files that hold a graph; {path.name} holds named tensors")
            described = safetensors_file.spec_text(path) if name == "safetensors" and (source is None or source.automatic) else None
            tensors = _read(path, name, source)
            if described is not None:
                built = by_spec(described, tensors, source.ignore if source else ())
                return _Resolved(tensors, built, None, built.reasons, readout_stated=True)
            return _resolve(tensors, source)
        built = GRAPH_READERS[name](path, source or Source())
    except MemoryError:
        raise ResourceError(f"{path}: does not fit into memory") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnsupportedError as error:
        raise UnsupportedError(*(r if r.startswith(str(path)) else f"{path}: {r}" for r in error.reasons)) from None
    return _Resolved(built.tensors or built.weights, built, built.draft, built.reasons, readout_stated=True)


def _read(path: Path, name: str, source: Source | None) -> dict[str, torch.Tensor]:
    """Tensors, names freed of a common wrapper's prefix."""
    tensors = READERS[name](path, ignore=source.ignore if source else ())
    if not tensors:
        raise UnsupportedError(f"{path}: holds no tensors")
    while stripped := next((p for p in WRAPPERS if all(key.startswith(p) and key != p for key in tensors)), None):
        tensors = {key.removeprefix(stripped): tensor for key, tensor in tensors.items()}
    return tensors


def _format(path: Path) -> str:
    if path.is_dir():
        return "huggingface"
    regular_file(path)
    suffix = path.suffix.lower()
    kind = OTHERS.get(suffix)
    try:
        with path.open("rb") as stream:
            head = stream.read(len(HDF5))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head == HDF5:
        return "keras"
    if kind:
        raise UnsupportedError(f"{path}: {kind}, which rnn2bin does not read; {READ_NOW}")
    found = SUFFIXES.get(suffix) or _by_content(path, head)
    if found is None:
        raise UnsupportedError(f"{path}: unknown file type {suffix or '(no suffix)'}; {READ_NOW}")
    return found


def _by_content(path: Path, head: bytes) -> str | None:
    """The format of a file that its name does not tell: torch.save takes any name, and many a package calls its file `weights`."""
    if head[:4] == b"PK\x03\x04":
        members = {name.rpartition("/")[2] for name in Archive(path).members}
        told = {"data.pkl": "pytorch", "model.weights.h5": "keras"}
        return next(
            (name for member, name in told.items() if member in members),
            "npz" if members and all(m.endswith(".npy") for m in members) else None,
        )
    return "pytorch" if pytorch.PICKLE.match(head) and head[:1] == b"\x80" else None


def _resolve(tensors: dict[str, torch.Tensor], source: Source | None) -> _Resolved:
    """Recognise where the source leaves it open, then assemble; all reasons of both, each once."""
    source = source or Source()
    if not source.automatic:
        built = graph_source.build(source, tensors) if source.has_graph else build(source, tensors)
        section = source.main or source.decoder
        stated = source.has_graph or (section is not None and "readout" in section.model_fields_set)
        return _Resolved(tensors, built, source.model_dump(exclude_defaults=True, exclude={"ignore"}), built.reasons, stated)
    wanted = {name: tensor for name, tensor in tensors.items() if not _matches(name, source.ignore)}
    proposal = recognise.recognise({name: tuple(tensor.shape) for name, tensor in wanted.items()}, hints=source)
    complete = proposal.source()
    if complete is None:
        built = Assembly(reasons=leftovers(wanted, proposal.uses(), ()) if proposal.draft else [])
    else:
        built = build(complete, wanted)
    reasons = list(dict.fromkeys([*proposal.reasons, *built.reasons]))
    left = unused(wanted, proposal.uses(), proposal.ignore) if proposal.draft else []
    return _Resolved(tensors, built, proposal.draft, reasons, source.readout is not None, proposal.ignore, left)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _provenance(path: Path, name: str, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Where the weights came from: `file`, `format`, `sha256`, `bytes`, and `files` with the same of each file."""
    sources = huggingface.files(path) if path.is_dir() else [path, *beside]
    if path.is_dir() and (path / "config.json").exists():
        sources = [path / "config.json", *sources]
    return {"file": path.resolve().name, "format": name, **fingerprint(sources)}
