"""Mutations for scripts/fuzz.py: of bytes, of JSON, of protobuf messages. Each takes an input and the honest ones, and gives another."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 16384  # of one input
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**62, 2**63, 2**64 - 1]
TOKENS = (b"-", b"9" * 20, b'"', b"[" * 30, b"[" * 3000, b"{", b"\0", b"(", b".", b"R", b"\x81", b"b")
# What stands nowhere in an honest file, as JSON.
STRANGE = [
    *("null", "true", "false", "-1", "0", "1", "3", str(2**31), str(2**63), str(2**70), "0.5", "-0.0", "1e308", "Infinity", "NaN"),
    *('""', '"x"', r'"\u0000"', r'"\ud800"', '"../x"', '"/dev/zero"', '"éééééééééééééééééééé"'),
    *("[]", "{}", "[[]]", "[null]", '{"": null}', str([0] * 40), "[" * 80 + "]" * 80),
]

Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]


def of_bytes(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
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


# ---- JSON ----


def of_json(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """One to three changes: a value taken out, repeated, made strange, or exchanged for one from anywhere; a key renamed."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return of_bytes(data, seeds, dice)
    values, keys = _known(tuple(seeds))
    for _ in range(dice.randint(1, 3)):
        place, key = dice.choice(list(_places(root)))
        match dice.randrange(5):
            case 0:
                place[key] = json.loads(dice.choice(values))
            case 1:
                place[key] = json.loads(dice.choice(STRANGE))
            case 2:
                del place[key]
            case 3 if isinstance(place, list):
                place.insert(key, copy.deepcopy(place[key]))
            case 3:
                place[dice.choice(keys)] = copy.deepcopy(place[key])
            case _:
                place[key] = _turned(place[key], dice)
        root = root or [None]
    return json.dumps(root[0]).encode()[:MOST_BYTES]


def _turned(value: Any, dice: random.Random) -> Any:
    """Near what it was."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + dice.choice((-1, 1, 7, -value, 2**32))
    if isinstance(value, float):
        return -value
    if isinstance(value, str):
        return dice.choice((value[1:], value.upper(), value + value, [value]))
    if isinstance(value, list):
        return dice.choice((value[::-1], [value], value * 2, value[1:]))
    return [value]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@functools.cache
def _known(seeds: tuple[bytes, ...]) -> tuple[list[str], list[str]]:
    """Every value (as text) and every key of the honest files."""
    places = [found for seed in seeds for found in _places([json.loads(seed)])]
    values = sorted({json.dumps(place[key]) for place, key in places})
    return values, sorted({key for _, key in places if isinstance(key, str)}) or ["x"]


# ---- protobuf ----


@dataclass(frozen=True)
class Field:
    """One field of a message: `raw` as written; `value` an int, bytes, or the fields of a message inside."""

    number: int
    kind: int
    value: int | bytes | tuple[Field, ...]
    raw: bytes


def of_protobuf(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """One to three fields: taken out, repeated, renumbered, of another value, or one that stands in the same place of an honest file."""
    made = message(data)
    if made is None:
        return of_bytes(data, seeds, dice)
    known = _alike(tuple(seeds))
    for _ in range(dice.randint(1, 3)):
        made = _changed(made, (), known, dice)
    return b"".join(one.raw for one in made)[:MOST_BYTES]


def _changed(
    fields: tuple[Field, ...], place: tuple[int, ...], known: dict[tuple[int, ...], list[Field]], dice: random.Random
) -> tuple[Field, ...]:
    if not fields:
        return fields
    at = dice.randrange(len(fields))
    one = fields[at]
    here = (*place, one.number)
    if isinstance(one.value, tuple) and dice.random() < 0.85:
        return (*fields[:at], field(one.number, _changed(one.value, here, known, dice)), *fields[at + 1 :])
    match dice.randrange(6):
        case 0:
            new = []
        case 1:
            new = [one, one]
        case 2 | 3:
            new = [dice.choice(known.get(here) or [one])]
        case 4:
            new = [field(dice.choice((one.number + 1, dice.randint(1, 20))), one.value, one.kind)]
        case _:
            new = [field(one.number, _other(one.value, dice), one.kind)]
    return (*fields[:at], *new, *fields[at + 1 :])


def _other(value: int | bytes | tuple[Field, ...], dice: random.Random) -> int | bytes | tuple[Field, ...]:
    if isinstance(value, int):
        return dice.choice((dice.choice(NUMBERS), value + 1, dice.randrange(12)))
    if isinstance(value, bytes):
        return of_bytes(value, [value], dice)
    return value[::-1]


def field(number: int, value: int | bytes | tuple[Field, ...], kind: int = 2) -> Field:
    if isinstance(value, int):
        raw = varint(value)
    else:
        raw = value if isinstance(value, bytes) else b"".join(one.raw for one in value)
        raw = raw if kind in (1, 5) else varint(len(raw)) + raw
    return Field(number, kind, value, varint(number << 3 | kind) + raw)


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@functools.lru_cache(maxsize=512)
def message(data: bytes) -> tuple[Field, ...] | None:
    """The fields, where bytes can be read as a message and are no text; the format does not tell the two apart."""
    found, at = [], 0
    try:
        while at < len(data):
            start = at
            key, at = _read_varint(data, at)
            number, kind = key >> 3, key & 7
            value: int | bytes | tuple[Field, ...]
            if kind == 0:
                value, at = _read_varint(data, at)
            else:
                size, at = _read_varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
                value, at = data[at : at + size], at + size
                if at > len(data) or not number:
                    return None
                if kind == 2 and (not value.isascii() or any(c < 32 for c in value)):
                    value = message(value) or value
            found.append(Field(number, kind, value, data[start:at]))
    except (IndexError, KeyError):
        return None
    return tuple(found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


@functools.cache
def _alike(seeds: tuple[bytes, ...]) -> dict[tuple[int, ...], list[Field]]:
    """The fields of all honest files by their place."""
    found: dict[tuple[int, ...], list[Field]] = {}

    def walk(fields: tuple[Field, ...], place: tuple[int, ...]) -> None:
        for one in fields:
            here = (*place, one.number)
            found.setdefault(here, []).append(one)
            if isinstance(one.value, tuple):
                walk(one.value, here)

    for seed in seeds:
        walk(message(seed) or (), ())
    return found


def rewritten(data: bytes, change: Callable[[Field], Field | None]) -> bytes:
    """A message with every field inside changed, or left out where `change` says None; inner ones first."""
    made = []
    for one in message(data) or ():
        if isinstance(one.value, tuple):
            one = field(one.number, rewritten(b"".join(each.raw for each in one.value), change), one.kind)
        if (new := change(one)) is not None:
            made.append(new.raw)
    return b"".join(made)
