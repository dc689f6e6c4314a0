"""Pickles read as data: a stack machine over allow-lists of opcodes and names, which imports and calls nothing else.

A pickle is a program. This interpreter (spec 9.5) knows the opcodes that build plain values and refuses the rest; a
name in the file is looked up in a table of inert stand-ins, never imported. Byte strings are not read but left in the
file (:class:`Blob`), so that memory does not grow with the weights in it. Work is bounded: every byte of a file is
interpreted at most once, and only as many instructions as a file of its size can need (:func:`max_opcodes`).
"""

from __future__ import annotations

import abc
import codecs
import os
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from python_train import UserError

MAX_STRING = 2**20
MAX_NAME = 256


class Refused(UserError):
    """The file asks for something that these files never do, or is damaged; the message says what."""


def max_opcodes(size: int) -> int:
    """Instructions that a file may have. Each can allocate 200 bytes; the tensors of real files leave few of them."""
    return min(2**19, 2**14 + size // 8)


class SourceFile:
    """A file open for reading at positions, with what is left of the work that it may cause.

    Reading by position (not by memory map) makes a file that shrinks meanwhile an error instead of a crash.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        self.size = os.fstat(self._file.fileno()).st_size
        self.opcodes_left = max_opcodes(self.size)
        self.bytes_left = self.size

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read_at(self, position: int, count: int) -> bytes:
        """``count`` bytes from ``position``; Refused if the file does not have them."""
        if not 0 <= position <= position + count <= self.size:
            raise Refused(f"it ends before byte {position + count}")
        content = os.pread(self._file.fileno(), count, position)
        while len(content) < count:
            more = os.pread(self._file.fileno(), count - len(content), position + len(content))
            if not more:
                raise Refused("it became shorter while it was read")
            content += more
        return content

    def spend(self, count: int) -> None:
        """Account for ``count`` bytes interpreted: a file that has its bytes read again and again is refused."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise Refused("it has the same bytes read several times")


@dataclass(frozen=True)
class Blob:
    """A byte string that was left in the file."""

    file: SourceFile
    start: int
    length: int

    def read(self) -> bytes:
        """The bytes. What they are good for and how many there may be is for the caller to check before."""
        self.file.spend(self.length)
        return self.file.read_at(self.start, self.length)

    def reader(self) -> Reader:
        """To interpret the bytes in place."""
        return Reader(self.file, self.start, self.start + self.length)


class Reader:
    """Reads a part of a file from its start to its end, never beyond."""

    def __init__(self, file: SourceFile, start: int, end: int) -> None:
        self.file = file
        self.position = start
        self.end = end
        self._buffer, self._buffer_start = b"", start

    @property
    def remaining(self) -> int:
        return self.end - self.position

    def claim(self, count: int) -> int:
        """Step over ``count`` bytes and return where they start; Refused if there are fewer."""
        if count > self.remaining:
            raise Refused(f"it ends early: {count} bytes should follow byte {self.position}, {self.remaining} do")
        start = self.position
        self.position += count
        return start

    def read(self, count: int) -> bytes:
        start = self.claim(count)
        self.file.spend(count)
        if start + count > self._buffer_start + len(self._buffer):
            self._buffer = self.file.read_at(start, max(count, min(4096, self.end - start)))
            self._buffer_start = start
        return self._buffer[start - self._buffer_start : self.position - self._buffer_start]

    def line(self) -> str:
        """Text up to a newline, as the protocols before 4 write names."""
        content = bytearray()
        while (byte := self.read(1)) != b"\n":
            content += byte
            if len(content) > MAX_NAME:
                raise Refused(f"a name in it is longer than {MAX_NAME} characters")
        return _text(bytes(content), "utf-8")

    def number(self, layout: str) -> Any:
        """One number of a ``struct`` layout."""
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]


@dataclass(frozen=True)
class StandIn:
    """What a name in a pickle stands for.

    ``call`` is what REDUCE does with one of ``counts`` arguments (they are the file's: check them), ``new`` makes an
    empty instance, ``value`` is what the name means where it is only mentioned.
    """

    call: Callable[..., Any] | None = None
    counts: tuple[int, ...] = ()
    new: Callable[[], Any] | None = None
    value: Any = None


class Buildable(abc.ABC):
    """An object that takes the state that BUILD brings. Sub-classes check it."""

    @abc.abstractmethod
    def build(self, state: Any) -> None: ...


Names = Mapping[tuple[str, str], StandIn]


def _text(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Refused(f"a string in it is not {encoding}") from error


def load(reader: Reader, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object that the pickle at ``reader`` describes; the reader stands behind it afterwards.

    Tuples, lists, dicts, sets, strings and numbers become themselves, byte strings become :class:`Blob`. ``names`` maps
    (module, name) to stand-ins, ``persistent`` maps persistent ids to objects. The result may be cyclic, and an object
    may be reached by many ways: whoever walks it must bound the walk.
    Raises Refused, saying why, for anything else, and for what exceeds the limits of this module.
    """
    return _Machine(reader, names, persistent).run()


class _Machine:
    def __init__(self, reader: Reader, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        self.reader = reader
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        reader, opcodes = self.reader, _OPCODES
        while (code := reader.read(1)) != pickle.STOP:
            reader.file.opcodes_left -= 1
            if reader.file.opcodes_left < 0:
                raise Refused(f"it has more than {max_opcodes(reader.file.size)} pickle instructions")
            if code not in opcodes:
                raise Refused(f"{_opcode_name(code)} is not an instruction that these files use")
            opcodes[code](self)
        return self.pop()

    # stack, marks and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("an instruction in it takes more values than there are")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("a list of values in it has no beginning")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"it refers to value {index}, which it has not made")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    # plain values

    def string(self, layout: str, encoding: str = "utf-8") -> None:
        length = self.reader.number(layout)
        if not 0 <= length <= MAX_STRING:
            raise Refused(f"it claims a string of {length} bytes")
        self.push(_text(self.reader.read(length), encoding))

    def quoted_string(self) -> None:
        text = self.reader.line()
        if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0] or "\\" in text:
            raise Refused("a quoted string in it is not one")
        self.push(text[1:-1])

    def unicode_line(self) -> None:
        line = self.reader.line().encode()
        try:
            self.push(codecs.raw_unicode_escape_decode(line)[0])
        except UnicodeDecodeError as error:
            raise Refused("a string in it is not raw-unicode-escape") from error

    def blob(self, layout: str) -> None:
        length = self.reader.number(layout)
        self.push(Blob(self.reader.file, self.reader.claim(length), length))

    def long(self) -> None:
        length = self.reader.number("<B")
        if length > 16:
            raise Refused(f"it has an integer of {length} bytes")
        self.push(int.from_bytes(self.reader.read(length), "little", signed=True))

    def protocol(self) -> None:
        version = self.reader.number("<B")
        if version > pickle.HIGHEST_PROTOCOL:
            raise Refused(f"its pickle protocol is {version}")

    def frame(self) -> None:
        length = self.reader.number("<Q")
        if length > self.reader.remaining:
            raise Refused(f"it ends early: a frame of {length} bytes has {self.reader.remaining}")

    # containers

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise Refused("it appends to what is not a list")
        target.extend(values)

    def add(self) -> None:
        values = self.pop_mark()
        target = self.top()
        if not isinstance(target, set):
            raise Refused("it adds to what is not a set")
        target.update(_key(value) for value in values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise Refused("it sets items of what is not a dictionary, or a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def set_item(self) -> None:
        value = self.pop()
        key = self.pop()
        self.set_items([key, value])

    # names and what is done with them

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("it names something by what is not a string")
        if (module, name) not in self.names:
            full = f"{module}.{name}"
            raise Refused(f"it names {full[:80]!r}, which is not on the list of what these files need")
        self.push(self.names[module, name])

    def stack_name(self) -> None:
        name = self.pop()
        self.name(self.pop(), name)

    def reduce(self) -> None:
        arguments, callee = self.pop(), self.pop()
        if not isinstance(callee, StandIn) or callee.call is None or not isinstance(arguments, tuple):
            raise Refused("it calls what cannot be called")
        if len(arguments) not in callee.counts:
            raise Refused(f"a call in it has {len(arguments)} arguments, not one of {callee.counts}")
        self.push(callee.call(*arguments))

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if not isinstance(cls, StandIn) or cls.new is None or not isinstance(arguments, tuple) or arguments:
            raise Refused("it makes an object of what is not one of these files' classes")
        self.push(cls.new())

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Buildable):
            target.build(state)
        elif not isinstance(target, dict) or not isinstance(state, dict):
            raise Refused("it sets the state of what has none")
        # else: attributes of a dictionary, such as the version numbers of a state dict

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refused("it refers to an object outside of the file")
        self.push(self.persistent(self.pop()))


def _key(value: Any) -> Any:
    """A dictionary key or set element, of a kind that no file can make slow to hash or to collide."""
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**60):
        return value
    raise Refused("a dictionary key in it is not a string or a small integer")


def _opcode_name(code: bytes) -> str:
    known = pickletools.code2op.get(code.decode("latin-1"))
    return known.name if known else f"byte {code[0]:#04x}"


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: _Machine.protocol,
    pickle.FRAME: _Machine.frame,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.reader.number("<i")),
    pickle.BININT1: lambda m: m.push(m.reader.number("<B")),
    pickle.BININT2: lambda m: m.push(m.reader.number("<H")),
    pickle.LONG1: _Machine.long,
    pickle.BINFLOAT: lambda m: m.push(m.reader.number(">d")),
    pickle.SHORT_BINUNICODE: lambda m: m.string("<B"),
    pickle.BINUNICODE: lambda m: m.string("<I"),
    pickle.BINUNICODE8: lambda m: m.string("<Q"),
    pickle.SHORT_BINSTRING: lambda m: m.string("<B", "ascii"),
    pickle.BINSTRING: lambda m: m.string("<i", "ascii"),
    pickle.STRING: _Machine.quoted_string,
    pickle.UNICODE: _Machine.unicode_line,
    pickle.SHORT_BINBYTES: lambda m: m.blob("<B"),
    pickle.BINBYTES: lambda m: m.blob("<I"),
    pickle.BINBYTES8: lambda m: m.blob("<Q"),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.tuple_of(1),
    pickle.TUPLE2: lambda m: m.tuple_of(2),
    pickle.TUPLE3: lambda m: m.tuple_of(3),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: m.append([m.pop()]),
    pickle.APPENDS: lambda m: m.append(m.pop_mark()),
    pickle.EMPTY_SET: lambda m: m.push(set()),
    pickle.ADDITEMS: _Machine.add,
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.BINGET: lambda m: m.get(m.reader.number("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.reader.number("<I")),
    pickle.BINPUT: lambda m: m.put(m.reader.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.reader.number("<I")),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.GLOBAL: lambda m: m.name(m.reader.line(), m.reader.line()),
    pickle.STACK_GLOBAL: _Machine.stack_name,
    pickle.NEWOBJ: _Machine.new_object,
    pickle.REDUCE: _Machine.reduce,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.persistent_id,
}
