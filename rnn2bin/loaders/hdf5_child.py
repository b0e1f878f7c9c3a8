"""A process of its own: an HDF5 file on stdin -> its names, shapes and numbers on stdout. Run by `hdf5.read`; imports nothing of rnn2bin.

The HDF5 library is large, written in C, and meets a stranger's bytes here: what it does to this process ends with it. Once the bytes are
in, the process may open no file, write none, and use no more than its share of memory and time, so that a link to another file leads
nowhere even if a check below should miss it.

stdout: the header's length (8 bytes, little endian), a JSON header, the arrays one after the other.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

MOST_OBJECTS = 20_000
MOST_DEPTH = 32
SECONDS = 20  # of processor time, and one more for each megabyte
WORKSPACE = 512 * 2**20  # of address space, for Python and the libraries, which take some 120 MB
WANTED = ("model_config", "keras_version", "backend", "layer_names", "weight_names")
SKIPPED = ("optimizer_weights", "optimizer")  # of the root: what training needs to go on


class RefusedError(Exception):
    """(kind, message): kind is "unsafe" or "unsupported"."""


def main() -> None:
    """argv: the most bytes that all arrays together may take."""
    import h5py
    import numpy

    budget, image = int(sys.argv[1]), sys.stdin.buffer.read()
    _rehearse(h5py, numpy)
    _limit(len(image), budget)
    answer(h5py, numpy, image, budget, sys.stdout.buffer)


def answer(h5py: Any, numpy: Any, image: bytes, budget: int, out: Any) -> None:
    """Writes what the file holds, or the one line why not."""
    try:
        header, parts = _contents(h5py, numpy, image, budget)
        _send(out, header)
        for part in parts:
            out.write(part.data)
    except RefusedError as error:
        _send(out, {"error": list(error.args)})
    except MemoryError:
        _send(out, {"error": ["unsafe", "it wants more memory than a file of its size may"]})
    except Exception as error:  # whatever the library says of damaged bytes
        _send(out, {"error": ["unsupported", f"not a readable HDF5 (Keras) file, or truncated ({_line(error)}); copy it again"]})
    out.flush()


def _contents(h5py: Any, numpy: Any, image: bytes, budget: int) -> tuple[dict[str, Any], list[Any]]:
    reader = _Reader(h5py, image, budget)
    parts = [_numbers(numpy, path, dataset) for path, dataset in reader.datasets]
    return {"attributes": reader.attributes, "tensors": [[p, d.dtype.str, list(d.shape)] for p, d in reader.datasets]}, parts


def _rehearse(h5py: Any, numpy: Any) -> None:
    """Read a file of our own, so that Python has loaded what it loads late before no file may be opened any more."""
    with h5py.File("rehearsal", "w", driver="core", backing_store=False) as file:
        file.attrs["keras_version"], file.attrs["layer_names"] = "é", numpy.array([b"a"])
        file["a/b"] = numpy.zeros(2)
        file.flush()
        _contents(h5py, numpy, file.id.get_file_image(), 100)


def _send(out: Any, header: dict[str, Any]) -> None:
    data = json.dumps(header).encode()
    out.write(len(data).to_bytes(8, "little") + data)


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:120]
    return first if first.isprintable() and first else type(error).__name__


def _limit(size: int, budget: int) -> None:
    with suppress(ImportError):  # no such limits on Windows
        import resource

        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NOFILE: 3,
            resource.RLIMIT_CPU: SECONDS + size // 2**20,
            resource.RLIMIT_AS: WORKSPACE + 3 * size + 2 * budget,
        }
        for kind, most in limits.items():
            hard = resource.getrlimit(kind)[1]
            bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (bound, bound))


def _numbers(numpy: Any, path: str, dataset: Any) -> Any:
    try:
        return numpy.ascontiguousarray(dataset[()])
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedError("unsupported", f"{path}: cannot be read ({_line(error)}); the file is truncated or damaged") from None


class _Reader:
    """Walks the groups, looking at every link before it is followed and at every array before it is allocated."""

    def __init__(self, h5py: Any, image: bytes, budget: int) -> None:
        self.h5py, self.size, self.left = h5py, len(image), budget
        self.attributes: dict[str, dict[str, Any]] = {}
        self.datasets: list[tuple[str, Any]] = []
        self.seen: set[Any] = set()
        file = h5py.File(h5py.h5f.open_file_image(image))
        self._group(file, "")

    def _group(self, group: Any, path: str) -> None:
        self._once(group, path)
        if path.count("/") >= MOST_DEPTH:
            raise RefusedError("unsafe", f"groups nested more than {MOST_DEPTH} deep: no Keras model")
        found = dict(self._attributes(group, path))
        if found:
            self.attributes[path] = found
        for name in group:
            where = f"{path}/{name}".lstrip("/")
            if not name.isprintable():
                raise RefusedError("unsupported", "a name in the file is no text; the file is damaged")
            if where in SKIPPED:
                continue
            self._linked(group, name, where)
            item = group[name]
            if isinstance(item, self.h5py.Group):
                self._group(item, where)
            elif isinstance(item, self.h5py.Dataset):
                self._dataset(item, where)
            else:
                raise RefusedError("unsupported", f"{where}: neither a group nor an array")

    def _linked(self, group: Any, name: str, where: str) -> None:
        link = group.get(name, getlink=True)
        if isinstance(link, self.h5py.ExternalLink):
            raise RefusedError("unsafe", f"{where}: a link into another file ({link.filename[:100]!r}); refused, nothing else was opened")
        if not isinstance(link, self.h5py.HardLink):
            raise RefusedError("unsafe", f"{where}: a soft link, which no Keras file has; refused")

    def _once(self, item: Any, where: str) -> None:
        """An object met twice is a loop, or a way to make a small file large."""
        key = self.h5py.h5o.get_info(item.id).addr
        if key in self.seen:
            raise RefusedError("unsafe", f"{where or '/'}: an object that stands in the file under two names; refused")
        self.seen.add(key)
        if len(self.seen) > MOST_OBJECTS:
            raise RefusedError("unsafe", f"more than {MOST_OBJECTS} groups and arrays: no Keras model")

    def _dataset(self, dataset: Any, where: str) -> None:
        self._once(dataset, where)
        if dataset.is_virtual:
            raise RefusedError("unsafe", f"{where}: a virtual dataset, whose numbers stand in other files; refused, none was opened")
        if dataset.external:
            raise RefusedError("unsafe", f"{where}: its numbers stand in another file; refused, nothing else was opened")
        if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8 or dataset.shape is None:
            raise RefusedError(
                "unsupported", f"{where}: holds {dataset.dtype}, not plain numbers (references, texts and records are not read)"
            )
        claimed, stored = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
        plain = dataset.chunks is None
        if claimed > self.left or (plain and claimed > stored) or (claimed and not stored):
            raise RefusedError("unsafe", f"{where}: claims shape {dataset.shape}, more than the file's {self.size} bytes can hold; refused")
        self.left -= claimed
        self.datasets.append((where, dataset))

    def _attributes(self, group: Any, path: str) -> Iterator[tuple[str, Any]]:
        """The texts that Keras writes; long lists stand in pieces (layer_names0, layer_names1 …)."""
        names = list(group.attrs)
        for wanted in WANTED:
            pieces = [wanted] if wanted in names else [f"{wanted}{k}" for k in range(len(names)) if f"{wanted}{k}" in names]
            values = [self._texts(group, name, path) for name in pieces]
            if values:
                yield wanted, [each for piece in values for each in piece] if isinstance(values[0], list) else values[0]

    def _texts(self, group: Any, name: str, path: str) -> Any:
        attribute = self.h5py.h5a.open(group.id, name.encode())
        where, shape = f"{path or '/'}@{name}", attribute.shape
        if math.prod(shape) == 0:
            return []
        if self.h5py.check_string_dtype(attribute.dtype) is None and attribute.dtype.kind != "S":
            raise RefusedError("unsupported", f"{where}: holds {attribute.dtype}, not text")
        if math.prod(shape) * max(1, attribute.dtype.itemsize) > self.size:
            raise RefusedError("unsafe", f"{where}: claims more than the file's {self.size} bytes can hold; refused")
        value = group.attrs[name]
        return [_text(item) for item in value.ravel()] if shape else _text(value)


def _text(value: Any) -> str:
    text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    text.encode("utf-8")  # h5py hides bytes that are no text behind surrogates
    return text


if __name__ == "__main__":
    main()
