"""A zip file, read strictly. No torch here.

The directory at the end of a zip file and the headers before each entry say the same things twice; readers differ in which they believe:
a file may show one content to a scanner and another to a loader. Here both are read and must agree, names are given once, entries do not
overlap, and the sizes are summed up, before anything is unpacked. Format: PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from rnn2bin.errors import UnsafeError, UnsupportedError

# Weights hardly compress. What unpacks to more than this beside the file's own size is made to fill the memory.
EXPANSION = 2
FREE_BYTES = 192 * 2**20
MOST_MEMBERS = 100_000
CHUNK = 2**20

END, END_64, LOCATOR, ENTRY, LOCAL = (struct.Struct(f"<{layout}") for layout in ("4s4H2LH", "4sQ2H2L4Q", "4sLQL", "4s6H3L5H2L", "4s5H3L2H"))
STORED, DEFLATED = 0, 8
ENCRYPTED, SIZES_FOLLOW, UTF8 = 0x2041, 0x8, 0x800
ELSEWHERE = 0xFFFFFFFF  # the value stands in the zip64 field
BAD_NAME = re.compile(r"^/|^[A-Za-z]:[\\/]|\\|\0|(^|/)\.\.(/|$)")


@dataclass(frozen=True, slots=True)
class Member:
    """One entry; `begins` is where its packed bytes start in the file."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    begins: int


@dataclass(frozen=True, slots=True)
class _Entry:
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


class _CorruptError(Exception):
    pass


class Archive:
    """The members of a zip file, by name. Raises UnsupportedError (damaged) and UnsafeError (names, overlaps, two contents, bombs)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = path.stat().st_size
        try:
            with path.open("rb") as stream:
                self.members = _members(stream, self.bytes, where=path)
        except (_CorruptError, struct.error, UnicodeDecodeError):
            raise self._corrupt() from None
        total = self.unpacked
        if total > EXPANSION * self.bytes + FREE_BYTES:
            raise UnsafeError(
                f"{path}: {self.bytes} bytes that unpack to {total}; refused, it would exhaust the memory; "
                "an honest file can be saved again without compression"
            )

    @property
    def unpacked(self) -> int:
        """Bytes of all members together."""
        return sum(member.size for member in self.members.values())

    def read(self, name: str) -> bytearray:
        """One member, unpacked and held against its checksum."""
        member = self.members[name]
        with self.path.open("rb") as stream:
            stream.seek(member.begins)
            data = _stored(stream, member) if member.method == STORED else _inflated(stream, member)
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise self._corrupt()
        return data

    def _corrupt(self) -> UnsupportedError:
        return UnsupportedError(f"{self.path}: truncated or corrupt archive; copy or download it again")


def _stored(stream: BinaryIO, member: Member) -> bytearray:
    data = bytearray(member.size)
    got = stream.readinto(data)  # type: ignore[attr-defined]
    return data if got == member.size else bytearray()


def _inflated(stream: BinaryIO, member: Member) -> bytearray:
    """At most one byte more than promised, whatever the stream would give."""
    data, left, machine = bytearray(), member.packed, zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        while left > 0 and not machine.eof and len(data) <= member.size:
            chunk = stream.read(min(CHUNK, left))
            left -= len(chunk) or left
            while chunk and len(data) <= member.size:
                data += machine.decompress(chunk, max(1, min(CHUNK, member.size + 1 - len(data))))
                chunk = machine.unconsumed_tail
    except zlib.error:
        return bytearray()
    return data if machine.eof else bytearray()


def _members(stream: BinaryIO, size: int, *, where: Path) -> dict[str, Member]:
    directory, offset, count = _directory(stream, size)
    found: dict[str, Member] = {}
    spans = []
    for entry in _entries(directory, count):
        member = _member(stream, entry, where)
        if member.name in found:
            raise UnsafeError(f"{where}: two entries named {member.name!r}; readers would see different contents")
        spans.append((entry.offset, member.begins + member.packed))
        found[member.name] = member
    end = 0
    for begins, ends in sorted(spans):
        if begins < end:
            raise UnsafeError(f"{where}: entries overlap; refused, it would unpack to more than it holds")
        end = ends
    if end > offset:
        raise _CorruptError
    return {name: member for name, member in found.items() if not name.endswith("/")}


def _directory(stream: BinaryIO, size: int) -> tuple[bytes, int, int]:
    """The central directory's bytes, its offset, and how many entries it has. It must end where the end record begins."""
    tail_at = max(0, size - END.size - 0xFFFF)
    stream.seek(tail_at)
    tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise _CorruptError
    _, disk, first_disk, here, count, length, offset, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail) or disk or first_disk or here != count:
        raise _CorruptError
    end = tail_at + at
    if at >= LOCATOR.size + END_64.size and tail[at - LOCATOR.size :].startswith(b"PK\6\7"):
        end -= LOCATOR.size + END_64.size
        large = END_64.unpack_from(tail, at - LOCATOR.size - END_64.size)
        _, _, record_at, _ = LOCATOR.unpack_from(tail, at - LOCATOR.size)
        small = (count, length, offset)
        count, length, offset = large[7:10]
        agree = all(a in (b, 0xFFFF if k == 0 else ELSEWHERE) for k, (a, b) in enumerate(zip(small, large[7:10], strict=True)))
        if large[0] != b"PK\6\6" or record_at != end or not agree:
            raise _CorruptError
    if offset + length != end or count > min(MOST_MEMBERS, length // ENTRY.size):
        raise _CorruptError
    stream.seek(offset)
    return stream.read(length), offset, count


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, offset = ENTRY.unpack_from(directory, at)
        name_at, extra_at = at + ENTRY.size, at + ENTRY.size + lengths[0]
        at = extra_at + lengths[1] + lengths[2]
        if mark != b"PK\1\2" or disk or at > len(directory):
            raise _CorruptError
        extra = directory[extra_at : extra_at + lengths[1]]
        size, packed, offset = _wide(extra, (size, packed, offset))
        yield _Entry(directory[name_at:extra_at], flags, method, crc, packed, size, offset)
    if at != len(directory):
        raise _CorruptError


def _wide(extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """The values with those that stand in the zip64 field put in their places."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    found, at = [], 0
    for value in values:
        if value == ELSEWHERE and wide:
            (value,) = struct.unpack_from("<Q", wide, at)
            at += 8
        found.append(value)
    return tuple(found)


def _member(stream: BinaryIO, entry: _Entry, where: Path) -> Member:
    """The entry with its local header read; refused where the two disagree."""
    name = entry.raw_name.decode("utf-8" if entry.flags & UTF8 else "cp437")
    if BAD_NAME.search(name):
        raise UnsafeError(f"{where}: an entry named {name!r}: absolute, or leading out of the archive")
    if entry.offset >= 2**62:
        raise _CorruptError
    stream.seek(entry.offset)
    mark, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack(stream.read(LOCAL.size))
    raw_name, extra = stream.read(name_length), stream.read(extra_length)
    if mark != b"PK\3\4" or len(extra) != extra_length:
        raise _CorruptError
    size, packed = _wide(extra, (size, packed))
    local = replace(entry, raw_name=raw_name, flags=flags, method=method, crc=crc, packed=packed, size=size)
    if flags & SIZES_FOLLOW and (crc, packed, size) == (0, 0, 0):
        local = replace(local, crc=entry.crc, packed=entry.packed, size=entry.size)
    if local != entry:
        raise UnsafeError(f"{where}: entry {name!r}: the header before it and the directory disagree; readers would see different contents")
    if entry.flags & ENCRYPTED or entry.method not in (STORED, DEFLATED):
        raise UnsupportedError(f"{where}: entry {name!r} is encrypted, or packed in a way that is not read; save it without compression")
    if entry.method == STORED and entry.packed != entry.size:
        raise _CorruptError
    begins = entry.offset + LOCAL.size + name_length + extra_length
    return Member(name, entry.method, entry.crc, entry.packed, entry.size, begins)
