"""Reader of what torch.save, torch.jit.save and pickle write: state dicts, checkpoints, modules, TorchScript archives, dicts of arrays.

No code of the file runs, and none of torch's unpickling either: the pickle is read as data (`inert`), tensors are descriptions that are
checked against the file (`tensors`), and only those that are kept are read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.files import whole
from rnn2bin.loaders import inert
from rnn2bin.loaders.archive import Archive
from rnn2bin.loaders.inert import DamagedError, Found
from rnn2bin.loaders.objects import Names, Walk, script_names
from rnn2bin.loaders.tensors import CALLS, WIDTHS, ArrayRef, Held, Storage, TensorRef, UnreadTensor, storage_class

if TYPE_CHECKING:
    import torch

MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6: this number, pickled, stands first
PICKLE = re.compile(rb"\x80[\x02-\x05]|[(}\]c]")  # protocols 2 to 5; 0 and 1 have no mark, a container comes first
OLD_PICKLES = (".pkl", ".pickle")
RECURRENT = re.compile(r"(?:^|[._/:])w(?:eight)?_hh", re.IGNORECASE)
OVERLAP = 2  # tied weights stand under two names
SLACK = 2**20


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored, of the one state dict, module or program in the file.

    Raises UnsafeError when the pickle calls what is no constructor of data, when objects stand where tensors should, or sizes are false;
    UnsupportedError when the file is damaged or holds several state dicts.
    """
    account = inert.found(path, path.stat().st_size)
    try:
        content, names, available = _content(path, account)
    except DamagedError:
        account.refuse_dangerous()
        raise UnsupportedError(f"{path}: truncated or corrupt PyTorch file; copy or download it again") from None
    account.refuse_dangerous()
    tensors = _pick(path, content, Walk(path, names=names), ignore, account)
    _check(path, tensors, available)
    try:
        return {name: tensor.tensor() for name, tensor in tensors.items() if not isinstance(tensor, UnreadTensor)}
    except DamagedError:
        raise UnsupportedError(f"{path}: truncated or corrupt PyTorch file; copy or download it again") from None


# -- containers --


def _content(path: Path, account: Found) -> tuple[Any, Names | None, int]:
    """The value in the file, how a TorchScript archive names its tensors, and the bytes that tensors can come from."""
    with path.open("rb") as stream:
        head = stream.read(2)
    if head == b"PK":
        return _archive(Archive(path), account)
    if not PICKLE.match(head) or (head[:1] != b"\x80" and path.suffix.lower() not in OLD_PICKLES):
        raise UnsupportedError(f"{path}: not a file that torch.save wrote, or its first bytes are damaged")
    data = whole(path)
    return _pickle(data, {**CALLS, "torch.storage._load_from_bytes": _inside(account)}, account), None, len(data)


def _archive(archive: Archive, account: Found) -> tuple[Any, Names | None, int]:
    found = [name for name in archive.members if name.rpartition("/")[2] == "data.pkl"]
    if not found:
        raise UnsupportedError(f"{archive.path}: a zip archive, but not one that torch.save wrote (no data.pkl)")
    if len(found) > 1:
        raise UnsafeError(f"{archive.path}: several data.pkl ({', '.join(found[:3])}); readers would see different contents")
    root = found[0].removesuffix("data.pkl")
    order = bytes(archive.read(root + "byteorder")) if root + "byteorder" in archive.members else b"little"
    if order not in (b"little", b"big"):
        raise DamagedError
    value = _member(archive, root, "data", account, swapped=order == b"big")
    if root + "constants.pkl" not in archive.members and not any(name.startswith(root + "code/") for name in archive.members):
        return value, None, archive.unpacked

    def code(file: str) -> str | None:
        return archive.read(root + file).decode("utf-8", "replace") if root + file in archive.members else None

    names = script_names(code)
    if root + "constants.pkl" in archive.members and not any(True for _ in Walk(archive.path, names=names).tensors(value)):
        # A frozen program: its weights are constants without names.
        constants = _member(archive, root, "constants", account, swapped=order == b"big")
        value = {f"constants.c{k}": constant for k, constant in enumerate(constants if isinstance(constants, tuple | list) else ())}
    return value, names, archive.unpacked


def _member(archive: Archive, root: str, part: str, account: Found, *, swapped: bool) -> Any:
    """One pickle of an archive; its storages are the members of the folder of the same name."""
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        if (made_by := _module_class(identity)) is not None:
            return made_by
        kind, key, size = _storage(identity)
        if key not in storages:
            name = f"{root}{part}/{key}"
            held = archive.members[name].size if name in archive.members else 0
            storages[key] = Storage(kind, size, held, lambda: archive.read(name), swapped)
        return storages[key]

    data = memoryview(archive.read(f"{root}{part}.pkl"))
    value, _ = inert.read(data, calls=CALLS, account=account, persistent=persistent)
    return value


def _pickle(data: memoryview, calls: Mapping[str, Callable[..., Any]], account: Found) -> Any:
    """A plain pickle, or what torch.save wrote before 1.6."""
    value, at = inert.read(data, calls=calls, account=account)
    return _legacy(data, at, calls, account) if value == MAGIC else value


def _legacy(data: memoryview, at: int, calls: Mapping[str, Callable[..., Any]], account: Found) -> Any:
    """After the magic number: version, system, the value, the keys of its storages, each a pickle; then each storage, its length first."""
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        if (made_by := _module_class(identity)) is not None:
            return made_by
        kind, key, size = _storage(identity)
        if len(identity) > 5 and identity[5] is not None:  # a view of another storage: torch 0.3 and older
            raise DamagedError
        return storages.setdefault(key, Storage(kind, size))

    for _ in range(2):
        _, at = inert.read(data, at, calls=calls, account=account)
    value, at = inert.read(data, at, calls=calls, account=account, persistent=persistent)
    keys, at = inert.read(data, at, calls=calls, account=account)
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or at + 8 > len(data):
            raise DamagedError
        (size,) = struct.unpack_from("<q", data, at)
        part = data[at + 8 : at + 8 + size * WIDTHS[storage.dtype]] if size >= 0 else data[:0]
        at += 8 + len(part)
        if size != storage.size or len(part) != storage.claimed:
            raise DamagedError
        storage.held, storage.fetch = len(part), lambda part=part: part  # type: ignore[misc]
    return value


def _inside(account: Found) -> Callable[[Any], Any]:
    """`pickle.dump` of a tensor writes its storage as a torch.save file inside; read as such, once: none inside that."""

    def storage(raw: Any) -> Storage:
        value = _pickle(memoryview(raw), CALLS, account)
        if not isinstance(value, Storage):
            raise DamagedError
        return value

    return storage


def _module_class(identity: Any) -> Any:
    """torch.save of a module, before 1.13, wrote each class with its source text; the text is not looked at."""
    return identity[1] if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module" else None


def _storage(identity: Any) -> tuple[str, str, int]:
    """dtype, key and number of elements of ("storage", class, key, device, elements, …)."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise DamagedError
    _, kind, key, _, size, *_ = identity
    if not isinstance(key, str) or type(size) is not int or not 0 <= size < 2**62:
        raise DamagedError
    return storage_class(kind), key, size


# -- which tensors --


def _pick(path: Path, content: Any, walk: Walk, ignore: Sequence[str], account: Found) -> dict[str, Held]:
    """The tensors of the one state dict in a checkpoint, under its own names; under dotted paths where parts stand side by side."""
    if isinstance(content, TensorRef | ArrayRef):
        raise UnsupportedError(f"{path}: holds one bare tensor {content.shape}; a state dict (name -> tensor) is needed")
    groups: dict[str, dict[str, Held]] = {}
    for group, name, tensor in walk.tensors(content):
        dotted = f"{group}.{name}" if group else name
        if not any(fnmatchcase(dotted, pattern) for pattern in ignore if group):
            groups.setdefault(group, {})[name] = tensor
    # Scores that callbacks keep are numbers without a dimension: no part of a network.
    groups = {group: found for group, found in groups.items() if any(_is_weight(tensor) for tensor in found.values())}
    if not groups and account.foreign:
        raise inert.refusal(
            path,
            list(account.foreign),
            why="it holds no state dict and no module, but objects that their code would build:",
            more=['where they are no modules of torch, save their arrays by name instead: numpy.savez("weights.npz", **arrays)'],
        )
    if not groups:
        raise UnsupportedError(f"{path}: holds no tensors by name; save a state dict: torch.save(model.state_dict(), file)")
    recurrent = [group for group, found in groups.items() if any(RECURRENT.search(name) for name in found)]
    if len(recurrent) > 1:
        raise UnsupportedError(
            f"{path}: holds recurrent weights in {len(recurrent)} places: {', '.join(repr(g or '(top level)') for g in recurrent)}; "
            f'keep one: re-save it alone, or give the others to the recipe, as in `source: {{ignore: ["{recurrent[-1]}.*"]}}`'
        )
    if len(groups) == 1:
        return next(iter(groups.values()))
    # Separate dicts may be parts of one network ({"rnn": ..., "head": ...}): dropping one would change it without a word.
    return {f"{group}.{name}" if group else name: tensor for group, found in groups.items() for name, tensor in found.items()}


def _is_weight(tensor: Held) -> bool:
    return isinstance(tensor, UnreadTensor) or (tensor.floating and bool(tensor.shape))


def _check(path: Path, tensors: Mapping[str, Held], available: int) -> None:
    """A small file may claim huge tensors (stride 0, a size beyond its storage, the same bytes again and again): refuse before reading."""
    for name, tensor in tensors.items():
        if isinstance(tensor, UnreadTensor):
            raise UnsupportedError(f"{path}: tensor {name!r} is {tensor.kind}; save it as an ordinary float tensor")
        if fault := tensor.fault():
            raise UnsafeError(f"{path}: tensor {name!r} claims {fault}; refused")
    most = OVERLAP * available + SLACK
    if sum(tensor.nbytes for tensor in _refs(tensors)) > most or sum({id(s): s.claimed for s in _storages(tensors)}.values()) > most:
        raise UnsafeError(f"{path}: its tensors are the same bytes again and again, far more than the file holds; refused")


def _refs(tensors: Mapping[str, Held]) -> Iterable[TensorRef | ArrayRef]:
    return (tensor for tensor in tensors.values() if not isinstance(tensor, UnreadTensor))


def _storages(tensors: Mapping[str, Held]) -> Iterable[Storage]:
    return (tensor.storage for tensor in tensors.values() if isinstance(tensor, TensorRef))
