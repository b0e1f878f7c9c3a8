"""Pickles read as data. Nothing is imported and nothing is called, whatever the pickle says. No torch here.

A pickle is a program for a small stack machine that builds objects; its danger is one instruction, "call this global". Here a global is a
`Symbol`, a pair of strings that is never looked up, and an object is a `Record` of what the pickle says about it. The few functions that
tensors are made with are given by the caller (`calls`), written in this project. Which other names are accepted is decided by `judge`; the
rule and its reasons are docs/decisions/009-inert-pickle.md. Format: Python's pickletools, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnn2bin.errors import UnsafeError

# Memory that reading may cost: an instruction of one byte may make an object of some hundred.
FREE_BYTES = 160 * 2**20
OBJECT_BYTES = 120
MOST_DIGITS = 255  # bytes of a whole number; more is no data and slow to print

_LIBRARY = sys.stdlib_module_names | {"nt", "commands", "exceptions", "copy_reg", "UserDict"}
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy._core": "numpy.core",
    "numpy.core._multiarray_umath": "numpy.core.multiarray",
}
# Modules of the standard library that hold data types and plain functions: naming what is in them is no attack.
_PLAIN_MODULES = {
    *(
        "argparse",
        "collections",
        "collections.abc",
        "copyreg",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "math",
    ),
    *("numbers", "pathlib", "pathlib._local", "random", "re", "string", "typing", "uuid", "_codecs"),
}
_PLAIN_BUILTINS = {
    *(
        "object",
        "list",
        "dict",
        "tuple",
        "set",
        "frozenset",
        "int",
        "float",
        "bool",
        "str",
        "bytes",
        "bytearray",
        "complex",
        "slice",
        "range",
    ),
    *("type", "NoneType", "Ellipsis", "NotImplemented", "abs", "len", "max", "min", "round", "sum"),
}
# Calls that make values, not actions; kept as records.
_VALUES = {
    *(f"builtins.{name}" for name in ("complex", "slice", "range", "object", "int", "float", "bool", "str")),
    *(f"pathlib{inner}.{kind}{flavour}Path" for inner in ("", "._local") for kind in ("", "Pure") for flavour in ("", "Posix", "Windows")),
    *(f"datetime.{name}" for name in ("date", "time", "datetime", "timedelta", "timezone")),
    "collections.defaultdict", "collections.deque", "collections.Counter", "argparse.Namespace", "types.SimpleNamespace",
    "decimal.Decimal", "fractions.Fraction", "uuid.UUID", "random.Random", "re._compile", "functools.partial", "logging.getLogger",
    "torch.device", "torch.serialization._get_layout",
    "numpy.core.multiarray.scalar",
    *(f"numpy.random._pickle.__{name}_ctor" for name in ("randomstate", "generator", "bit_generator")),
}  # fmt: skip
GETATTR = "builtins.getattr"
TORCH_FUNCTIONS = "torch._C._VariableFunctionsClass"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A global that a pickle names. Never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """An object that is not built: its class (or the function that would make it) and what the pickle gives it."""

    made_by: Any
    arguments: Any = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """The instance's `__dict__` as far as the pickle gives one."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items() if isinstance(key, str)}


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A dict key that is not compared: hashing a stranger's nested tuples, or integers chosen to collide, can take forever."""

    value: Any


class DamagedError(Exception):
    """The bytes are no pickle, or a pickle that does not end. Internal: readers turn it into their own error."""


@dataclass
class Found:
    """What reading pickles came across: calls that would be actions, and names of objects kept as records."""

    where: Path
    allowance: int
    dangerous: dict[str, None] = field(default_factory=dict)
    foreign: dict[str, None] = field(default_factory=dict)

    def charge(self, size: int) -> None:
        """Count memory that the pickle makes us take."""
        self.allowance -= size
        if self.allowance < 0:
            raise UnsafeError(f"{self.where}: its pickle would take far more memory than the file has bytes; refused")

    def refuse_dangerous(self) -> None:
        if self.dangerous:
            raise refusal(self.where, list(self.dangerous))


def found(path: Path, size: int) -> Found:
    """An account for reading the pickles of a file of `size` bytes."""
    return Found(path, FREE_BYTES + 2 * size)


def refusal(
    where: Path, names: Sequence[str], *, why: str = "reading it would run code from the file: it calls", more: Sequence[str] = ()
) -> UnsafeError:
    """The names, and the three lines that make a safe file of one that is trusted; `more` lines behind them."""
    names = ["".join(c if c.isprintable() else "?" for c in name[:200]) for name in names]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return UnsafeError(
        f"{where}: {why} {shown}; refused, nothing was run",
        "where you trust the file, re-save its weights on your own machine with these three lines (the second runs the file's code):",
        "    import torch",
        f'    model = torch.load("{where.name}", weights_only=False)',
        '    torch.save(model.state_dict(), "weights.pt")  # for a checkpoint: model["model"], or whichever key holds the state dict',
        *more,
    )


def judge(symbol: Symbol) -> bool:
    """May this name stand in a file at all? False for the standard library's functions that act (os, builtins.eval, …)."""
    root = symbol.module.partition(".")[0]
    if root == "builtins":
        return symbol.name in _PLAIN_BUILTINS or symbol.name.endswith(("Error", "Exception", "Warning"))
    return root not in _LIBRARY or symbol.module in _PLAIN_MODULES or str(symbol) in _VALUES


def read(
    data: memoryview,
    at: int = 0,
    *,
    calls: Mapping[str, Callable[..., Any]],
    account: Found,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The value of the pickle that starts at byte `at`, and where it ends.

    `calls`: functions by dotted name that stand for the globals of that name; they raise DamagedError for arguments they do not take.
    `persistent` resolves persistent ids. Raises DamagedError; UnsafeError where it costs too much memory. Dangerous names are collected in
    `account` and leave records behind: the caller refuses with `account.refuse_dangerous`.
    """
    machine = _Machine(data, at, calls, account, persistent)
    try:
        value = machine.run()
    except (IndexError, KeyError, struct.error, ValueError, OverflowError, TypeError, AttributeError):
        raise DamagedError from None
    return value, machine.at


def _key(value: Any) -> Any:
    """Only what hashes fast and without chosen collisions."""
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else Key(value)
    return value if value is None or isinstance(value, str | float | Symbol) else Key(value)


class _Machine:
    """The stack machine: one method an instruction, in the order of pickletools' table."""

    def __init__(
        self, data: memoryview, at: int, calls: Mapping[str, Callable[..., Any]], account: Found, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.data, self.at = data, at
        self.calls, self.account, self.persistent = calls, account, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # stacks below each mark
        self.memo: dict[int, Any] = {}
        self.symbols: dict[tuple[str, str], Symbol] = {}

    def run(self) -> Any:
        while True:
            code = self.data[self.at]
            self.at += 1
            if code == STOP:
                return self.stack.pop()
            self.account.charge(OBJECT_BYTES)
            INSTRUCTIONS[code](self)

    # -- arguments --

    def take(self, size: int) -> memoryview:
        part = self.data[self.at : self.at + size]
        if len(part) != size:
            raise DamagedError
        self.at += size
        return part

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def sized(self, layout: str) -> memoryview:
        size = self.number(layout)
        if size < 0:
            raise DamagedError
        return self.take(size)

    def line(self) -> bytes:
        """Up to the next line feed, which is left out."""
        step = 256
        while True:
            part = bytes(self.data[self.at : self.at + step])
            if (end := part.find(b"\n")) >= 0:
                self.at += end + 1
                return part[:end]
            if len(part) < step:
                raise DamagedError
            step *= 8

    def text(self, raw: memoryview | bytes, coding: str = "utf-8") -> None:
        value = str(raw, coding, "surrogatepass" if coding == "utf-8" else "strict")
        self.account.charge(sys.getsizeof(value))
        self.stack.append(value)

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    # -- plain values --

    def integer(self, raw: memoryview) -> None:
        if len(raw) > MOST_DIGITS:
            raise DamagedError
        self.stack.append(int.from_bytes(raw, "little", signed=True))

    def int_line(self) -> None:
        line = self.line()
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self.decimal(line))

    def long_line(self) -> None:
        self.stack.append(self.decimal(self.line().removesuffix(b"L")))

    @staticmethod
    def decimal(line: bytes) -> int:
        if len(line) > 2 * MOST_DIGITS:
            raise DamagedError
        return int(line)

    def string_line(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise DamagedError
        self.text(codecs.escape_decode(line[1:-1])[0], "latin-1")  # type: ignore[attr-defined]

    # -- names, calls, objects --

    def symbol(self, module: str, name: str) -> None:
        for old, new in _RENAMED.items():
            if module == old or module.startswith(old + "."):
                module = new + module[len(old) :]
        symbol = self.symbols.setdefault((module, name), Symbol(module, name))
        if str(symbol) not in self.calls and str(symbol) != GETATTR and not judge(symbol):
            self.note(symbol, self.account.dangerous)
        self.stack.append(symbol)

    def note(self, made_by: Any, names: dict[str, None]) -> None:
        name = str(made_by) if isinstance(made_by, Symbol) else "what another call gives"
        if name not in names:
            self.account.charge(sys.getsizeof(name) + OBJECT_BYTES)
            names[name] = None

    def global_lines(self) -> None:
        module = self.line().decode()
        self.symbol(module, self.line().decode())

    def global_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedError
        self.symbol(module, name)

    def call(self, made_by: Any, arguments: Any) -> None:
        """REDUCE, INST, OBJ: made by our own function, or a record; noted as dangerous unless it is known to make a value."""
        if not isinstance(arguments, tuple):
            raise DamagedError
        name = str(made_by) if isinstance(made_by, Symbol) else ""
        if name in ("copyreg.__newobj__", "copyreg._reconstructor") and arguments:
            return self.create(arguments[0], arguments[1:])
        if name in self.calls:
            self.account.charge(sum(map(_cost, arguments)))  # what is copied may be large, and copied often
            return self.stack.append(self.calls[name](*arguments))
        if name == GETATTR and _is_torch_function(arguments):
            return self.stack.append(Symbol(*map(str, arguments)))
        self.record(made_by, arguments, safe=name in _VALUES)

    def create(self, made_by: Any, arguments: Any) -> None:
        """NEWOBJ: `cls.__new__(cls, …)`, how pickle stores an ordinary object."""
        if isinstance(made_by, Symbol) and str(made_by) in self.calls:
            return self.call(made_by, arguments)
        self.record(made_by, arguments, safe=isinstance(made_by, Symbol))

    def record(self, made_by: Any, arguments: Any, *, safe: bool) -> None:
        self.note(made_by, self.account.foreign if safe else self.account.dangerous)
        self.stack.append(Record(made_by, arguments))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def new(self) -> None:
        arguments = self.stack.pop()
        self.create(self.stack.pop(), arguments)

    def new_with_keywords(self) -> None:
        keywords, arguments, made_by = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.create(made_by, arguments)
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = keywords

    def inst(self) -> None:
        self.global_lines()
        made_by = self.stack.pop()
        self.call_or_create(made_by, tuple(self.marked()))

    def obj(self) -> None:
        made_by, *arguments = self.marked()
        self.call_or_create(made_by, tuple(arguments))

    def call_or_create(self, made_by: Any, arguments: tuple[Any, ...]) -> None:
        """Protocol 0 writes an old-style instance as a call of its class without arguments."""
        if arguments or not isinstance(made_by, Symbol):
            self.call(made_by, arguments)
        else:
            self.create(made_by, arguments)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif callable(build := getattr(target, "build", None)):
            build(state)

    def persistent_id(self, value: Any) -> None:
        if self.persistent is None:
            raise DamagedError
        self.stack.append(self.persistent(value))

    # -- containers --

    def append(self) -> None:
        self.extend([self.stack.pop()])

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Record) else _only(list, target)).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = target.pairs if isinstance(target, Record) else _only(dict, target)
        for key, value in _pairs(items):
            pairs[_key(key)] = value

    def new_dict(self) -> None:
        items = self.marked()
        self.stack.append({})
        self.update(items)

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise DamagedError
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.stack.append(items)

    # -- stack and memo --

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def protocol(self) -> None:
        if self.number("B") > 5:
            raise DamagedError


def _only(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise DamagedError
    return value


def _is_torch_function(arguments: tuple[Any, ...]) -> bool:
    """torch.tanh as a module's attribute is written as getattr(torch._C._VariableFunctionsClass, "tanh")."""
    return (
        len(arguments) == 2 and isinstance(arguments[0], Symbol) and str(arguments[0]) == TORCH_FUNCTIONS and isinstance(arguments[1], str)
    )


def _cost(value: Any) -> int:
    if isinstance(value, dict | list | tuple):
        return OBJECT_BYTES * len(value)
    return len(value) if isinstance(value, str | memoryview | bytes) else 0


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise DamagedError
    return list(zip(items[::2], items[1::2], strict=True))


STOP = ord(".")
_Step = Callable[[_Machine], Any]


def _push(value: Any) -> _Step:
    return lambda m: m.push(value)


# Sets are kept as lists: nothing here asks what is in them, and elements need not be hashed. Byte strings stay views of the file.
INSTRUCTIONS: dict[int, _Step] = {
    ord(code): step
    for code, step in {
        "I": _Machine.int_line,
        "L": _Machine.long_line,
        "J": lambda m: m.push(m.number("<i")),
        "K": lambda m: m.push(m.number("<B")),
        "M": lambda m: m.push(m.number("<H")),
        "\x8a": lambda m: m.integer(m.sized("<B")),
        "\x8b": lambda m: m.integer(m.sized("<i")),
        "S": _Machine.string_line,
        "T": lambda m: m.text(m.sized("<i"), "latin-1"),
        "U": lambda m: m.text(m.sized("<B"), "latin-1"),
        "B": lambda m: m.push(m.sized("<I")),
        "C": lambda m: m.push(m.sized("<B")),
        "\x8e": lambda m: m.push(m.sized("<Q")),
        "\x96": lambda m: m.push(m.sized("<Q")),
        "V": lambda m: m.text(m.line(), "raw-unicode-escape"),
        "\x8c": lambda m: m.text(m.sized("<B")),
        "X": lambda m: m.text(m.sized("<I")),
        "\x8d": lambda m: m.text(m.sized("<Q")),
        "F": lambda m: m.push(float(m.line())),
        "G": lambda m: m.push(m.number(">d")),
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "]": lambda m: m.push([]),
        "a": _Machine.append,
        "e": lambda m: m.extend(m.marked()),
        "l": lambda m: m.push(m.marked()),
        ")": _push(()),
        "t": lambda m: m.push(tuple(m.marked())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "}": lambda m: m.push({}),
        "d": _Machine.new_dict,
        "s": _Machine.set_item,
        "u": lambda m: m.update(m.marked()),
        "\x8f": lambda m: m.push([]),
        "\x90": lambda m: m.extend(m.marked()),
        "\x91": lambda m: m.push(m.marked()),
        "0": _Machine.pop,
        "2": lambda m: m.push(m.stack[-1]),
        "(": _Machine.mark,
        "1": _Machine.marked,
        "g": lambda m: m.push(m.memo[m.decimal(m.line())]),
        "h": lambda m: m.push(m.memo[m.number("<B")]),
        "j": lambda m: m.push(m.memo[m.number("<I")]),
        "p": lambda m: m.put(m.decimal(m.line())),
        "q": lambda m: m.put(m.number("<B")),
        "r": lambda m: m.put(m.number("<I")),
        "\x94": lambda m: m.put(len(m.memo)),
        "c": _Machine.global_lines,
        "\x93": _Machine.global_stack,
        "R": _Machine.reduce,
        "b": _Machine.build,
        "i": _Machine.inst,
        "o": _Machine.obj,
        "\x81": _Machine.new,
        "\x92": _Machine.new_with_keywords,
        "\x80": _Machine.protocol,
        "\x95": lambda m: m.number("<Q"),
        "P": lambda m: m.persistent_id(m.line().decode()),
        "Q": lambda m: m.persistent_id(m.stack.pop()),
    }.items()
}
