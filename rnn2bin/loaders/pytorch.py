"""Reader of torch.save files: a state dict, or a checkpoint with one inside. Always `weights_only=True`: no code of the file runs."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders.common import members

if TYPE_CHECKING:
    import torch

# torch.save before 1.6: the pickled magic number stands first.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
RECURRENT = re.compile(r"(?:^|[._/:])w(?:eight)?_hh", re.IGNORECASE)
# Names that torch itself writes for tensors; anything else in a pickle would have to be imported and called.
TENSOR_GLOBALS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild\w+|torch\._tensor\._rebuild\w+|torch\.storage\.\w+|torch\.(cuda\.)?\w+Storage"
    r"|torch\.nn\.parameter\.\w+|torch\.(Size|Tensor|device|dtype|bfloat16|float\w*|u?int\d+|bool|half|double)"
    r"|torch\.serialization\._get_layout"
)


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored, of the one state dict in the file.

    Raises UnsafeError when the pickle needs code, UnsupportedError when the file is damaged, is TorchScript, or holds several state dicts.
    """
    available = _check_container(path)
    tensors = _pick(path, _load(path), ignore)
    _check_storage(path, tensors, available)
    return tensors


def _check_container(path: Path) -> int:
    """The bytes that tensors can come from; refuses what torch.save did not write."""
    with path.open("rb") as stream:
        head = stream.read(16)
    if head.startswith(b"PK"):
        infos = members(path)
        if any("/code/" in info.filename or info.filename.endswith("constants.pkl") for info in infos):
            raise UnsupportedError(
                f"{path}: a TorchScript archive, which is a program and not weights; where you trust it, re-save its weights: "
                f'torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pt")'
            )
        if not any(info.filename.endswith("data.pkl") for info in infos):
            raise UnsupportedError(f"{path}: a zip archive, but not one that torch.save wrote (no data.pkl)")
        return sum(info.file_size for info in infos)
    if head.startswith(LEGACY):
        return path.stat().st_size
    if head[:1] == b"\x80":  # a plain pickle
        _refuse_code(path)
    raise UnsupportedError(f"{path}: not a file that torch.save wrote, or its first bytes are damaged")


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickle protocols and typed storages: nothing that the user could act on
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        _refuse_code(path)
        named = re.search(r"GLOBAL (\S+)", str(error))  # a global that the scan could not see
        if named and not TENSOR_GLOBALS.fullmatch(named[1]):
            raise _unsafe(path, [named[1]]) from None
        raise UnsupportedError(f"{path}: truncated or corrupt PyTorch file ({type(error).__name__}); copy or download it again") from None


def _refuse_code(path: Path) -> None:
    foreign = [name for name in dict.fromkeys(_globals(path)) if not TENSOR_GLOBALS.fullmatch(name)]
    if foreign:
        raise _unsafe(path, foreign)


def _unsafe(path: Path, names: Sequence[str]) -> UnsafeError:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return UnsafeError(
        f"{path}: reading it would run code from the file: it calls {shown}; refused, nothing was run",
        "where you trust the file, re-save its weights on your own machine with these three lines (the second runs the file's code):",
        "    import torch",
        f'    model = torch.load("{path.name}", weights_only=False)',
        '    torch.save(model.state_dict(), "weights.pt")  # for a checkpoint: model["model"], or whichever key holds the state dict',
    )


def _globals(path: Path) -> Iterator[str]:
    """Every "module.name" a pickle refers to, read without running it."""
    if not zipfile.is_zipfile(path):
        yield from _scan(path.read_bytes())
        return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".pkl"):
                try:
                    data = archive.read(info)
                except Exception:
                    continue
                yield from _scan(data)


def _scan(data: bytes) -> Iterator[str]:
    """The globals of one or more pickles that follow each other; stops where the bytes are no pickle."""
    import io

    stream = io.BytesIO(data)
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        while stream.tell() < len(data):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    memo[int(str(argument))] = strings[-1] if strings else ""
                elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                    strings.append(memo.get(int(str(argument)), ""))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:
        return


def _pick(path: Path, content: Any, ignore: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of the one state dict in a checkpoint, under its own names; under dotted paths where parts stand side by side."""
    import torch

    if isinstance(content, torch.Tensor):
        raise UnsupportedError(f"{path}: holds one bare tensor {tuple(content.shape)}; a state dict (name -> tensor) is needed")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for group, name, tensor in _walk(content, ""):
        dotted = f"{group}.{name}" if group else name
        if not any(fnmatchcase(dotted, pattern) for pattern in ignore if group):
            groups.setdefault(group, {})[name] = tensor
    groups = {group: found for group, found in groups.items() if any(t.is_floating_point() for t in found.values())}
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


def _walk(content: Any, group: str, depth: int = 0) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(path of the dict, name, tensor) for every tensor under string keys; an optimizer's state stands under numbers and is left out."""
    import torch

    if not isinstance(content, Mapping) or depth > 4:
        return
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, torch.Tensor):
            yield group, key, value
        else:
            yield from _walk(value, f"{group}.{key}" if group else key, depth + 1)


def _check_storage(path: Path, tensors: Mapping[str, torch.Tensor], available: int) -> None:
    """A small file may claim a huge tensor (stride 0, or a size beyond its storage): refuse before anything is copied."""
    import torch

    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UnsupportedError(f"{path}: tensor {name!r} is sparse, quantized or without data; save it as an ordinary float tensor")
        held = tensor.untyped_storage().nbytes()
        if held > available or tensor.numel() * tensor.element_size() > held:
            raise UnsafeError(f"{path}: tensor {name!r} claims {tuple(tensor.shape)}, more than the file holds; refused")
