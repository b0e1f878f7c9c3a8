"""Files and directories that are whole or not there, and one reading of every way a disk can fail.

A sealed directory carries a manifest (name, size and sha256 of each file) that is written last: without it, or where a file differs from
it, the directory counts as not there.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rnn2bin.errors import ResourceError

MANIFEST = "manifest.json"
ASIDE = ".partial.old"  # where the older directory waits on systems that cannot exchange two names
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_synced(path: Path, text: str) -> None:
    """Temporary name, fsync, rename: the file is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
    sync(path.parent)


def seal(folder: Path) -> None:
    """Sync every file in `folder`, then write the manifest: from now on the folder is whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    listed = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    sync_tree(folder)
    write_synced(folder / MANIFEST, json.dumps({"files": listed}))
    sync(folder.parent)


def flaw(folder: Path) -> str | None:
    """Why a sealed folder is not whole; None where it is."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, wanted in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["size"]:
                return f"{name} has {path.stat().st_size} of {wanted['size']} bytes"
            if sha256(path) != wanted["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was not written to the end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


# ---------------------------------------------------------------------------------------------- old or new


def replace(folder: Path, out: Path) -> None:
    """Give `folder` the name `out`, in one step; an older `out` is gone afterwards. Raises OSError, and `out` is what it was."""
    older = out.exists()
    swapped = older and _exchange(folder, out)
    if not swapped:
        _rename(folder, out)
    try:
        sync(out.parent)
    except OSError:
        if swapped:
            _exchange(out, folder)
        else:
            out.rename(folder)
            recover(out)
        raise
    shutil.rmtree(folder if swapped else _aside(out), ignore_errors=True)


def recover(out: Path) -> None:
    """Bring an older `out` back that a killed process had moved aside."""
    if not out.exists() and _aside(out).exists():
        _aside(out).rename(out)


def _aside(out: Path) -> Path:
    return out.with_name(out.name + ASIDE)


def _rename(folder: Path, out: Path) -> None:
    """Two steps where there is an older `out`: `recover` mends what a kill between them leaves."""
    try:
        if out.exists():
            shutil.rmtree(_aside(out), ignore_errors=True)
            out.rename(_aside(out))
        folder.rename(out)
    except BaseException:
        recover(out)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two directories at once (Linux: renameat2); False where system or file system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


# ---------------------------------------------------------------------------------------------- failing


def failure(error: BaseException) -> str | None:
    """What the disk refused, in the system's words where the library passes them on; None where `error` is about something else."""
    text = str(error)
    if isinstance(error, OSError):
        return None if isinstance(error, BrokenPipeError) else error.strerror or text
    if isinstance(error, SafetensorError):
        found = re.search(r"I/O error: (.*?) \(os error", text)
        return found[1] if found else None
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|iostream error|Parent directory", text):
        return "a file could not be written whole"  # torch does not say more
    return None


@contextmanager
def failures(where: Path, advice: str) -> Iterator[None]:
    """Turns what `failure` knows into a ResourceError: "WHERE: cannot write (REASON); ADVICE"."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = failure(error)
        if reason is None:
            raise
        raise ResourceError(f"{where}: cannot write ({reason}); {advice}") from error
