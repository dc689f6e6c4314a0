"""The stack machine that reads pickles as data: what it builds, and all that it refuses to do."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_train import safe_pickle
from python_train.safe_pickle import Blob, Buildable, Reader, Refused, SourceFile, StandIn

# The instructions of real files (spec 9.4), and the few others that older libraries write.
OPCODES = [
    "PROTO", "FRAME", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING",
    "STRING", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "STACK_GLOBAL", "GLOBAL", "EMPTY_TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_SET", "ADDITEMS", "BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT", "NEWTRUE", "NEWFALSE",
    "NONE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID", "STOP",
]  # fmt: skip


class Thing(Buildable):
    """An inert object that keeps what it is given."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def build(self, state: Any) -> None:
        self.state = state


NAMES = {("lib", "Thing"): StandIn(call=Thing, counts=(0, 2), new=Thing), ("lib", "mention"): StandIn()}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    """Reads a pickle given as bytes."""

    def run(content: bytes, persistent: Callable[[Any], Any] | None = None) -> Any:
        path = tmp_path / "file.pkl"
        path.write_bytes(content)
        with SourceFile(path) as file:
            return safe_pickle.load(Reader(file, 0, file.size), NAMES, persistent)

    return run


def _with_bytes(value: Any, content: bytes) -> Any:
    """The value with byte strings in the place of those that were left in the file."""
    if isinstance(value, Blob):
        return content[value.start : value.start + value.length]
    if isinstance(value, (list, tuple)):
        return type(value)(_with_bytes(item, content) for item in value)
    return {key: _with_bytes(item, content) for key, item in value.items()} if isinstance(value, dict) else value


keys = st.text(max_size=8) | st.integers(-(2**59), 2**59)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text(max_size=300)
)
values = st.recursive(
    scalars | st.binary(max_size=300) | st.sets(keys, max_size=4),
    lambda children: (
        st.lists(children, max_size=4) | st.tuples(children, children) | st.dictionaries(keys, children, max_size=4)
    ),
    max_leaves=12,
)


@given(value=values, protocol=st.sampled_from([3, 4]))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_plain_values_are_what_pickle_reads(value: Any, protocol: int, read: Callable[..., Any]) -> None:
    if protocol == 3 and _has_set(value):  # written as a call of builtins.set then
        return
    content = pickle.dumps(value, protocol)
    assert _with_bytes(read(content), content) == value


def _has_set(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_set(item) for item in value.values())
    return isinstance(value, set) or (isinstance(value, (list, tuple)) and any(_has_set(item) for item in value))


def test_old_strings(read: Callable[..., Any]) -> None:
    assert read(b"\x80\x02U\x03abc.") == "abc"
    assert read(b"\x80\x02T\x03\x00\x00\x00abc.") == "abc"
    assert read(b"S'abc'\n.") == "abc"
    assert read(b"V\\u00e9t\xc3\xa9\n.") == "étÃ©"
    assert read(pickle.dumps("é€", protocol=1)) == "é€"


def test_names_calls_states_and_persistent_ids(read: Callable[..., Any]) -> None:
    made = read(b"clib\nThing\n(K\x01K\x02tR}(U\x01aK\x03ub.")
    assert made.args == (1, 2)
    assert made.state == {"a": 3}
    assert read(b"\x80\x04\x8c\x03lib\x8c\x05Thing\x93)\x81.").args == ()
    assert read(b"}(U\x01aK\x03u}(U\x09_metadataNub.") == {"a": 3}, "attributes of a dictionary are dropped"
    assert read(b"U\x03keyQ.", lambda value: value * 2) == "keykey"


def test_only_these_opcodes() -> None:
    known = {pickletools.code2op[code.decode("latin1")].name for code in safe_pickle._OPCODES} | {"STOP"}
    assert known == set(OPCODES)


@pytest.mark.parametrize("name", sorted({op.name for op in pickletools.opcodes} - set(OPCODES)))
def test_other_opcodes_are_refused_by_name(name: str, read: Callable[..., Any]) -> None:
    (code,) = [op.code.encode("latin1") for op in pickletools.opcodes if op.name == name]
    with pytest.raises(Refused, match=f"^{name} is not an instruction that these files use$"):
        read(b"\x80\x04(NN" + code + b"os\nsystem\n\x00\x00\x00\x00\x00.")


def test_bytes_that_are_no_opcodes_are_refused(read: Callable[..., Any]) -> None:
    known = {op.code.encode("latin1") for op in pickletools.opcodes}
    for code in {bytes([byte]) for byte in range(256)} - known:
        with pytest.raises(Refused, match=f"byte {code[0]:#04x} is not an instruction"):
            read(b"\x80\x04" + code + b"NN.")


DANGEROUS = [
    "os.system", "posix.system", "nt.system", "os.execv", "os.popen", "os.remove", "subprocess.Popen", "subprocess.run",
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.getattr", "builtins.__import__",
    "builtins.setattr", "builtins.apply", "__builtin__.eval", "builtins.object", "builtins.type", "builtins.dict",
    "importlib.import_module", "runpy.run_path", "sys.exit", "sys.modules", "pty.spawn", "socket.socket",
    "operator.attrgetter", "operator.methodcaller", "functools.partial", "functools.reduce", "itertools.starmap",
    "types.FunctionType", "types.CodeType", "marshal.loads", "pickle.loads", "_pickle.loads", "shutil.rmtree",
    "copyreg._reconstructor", "copyreg.__newobj__", "codecs.decode", "_codecs.decode", "webbrowser.open", "ctypes.CDLL",
    "torch.load", "torch.hub.load", "torch.storage._load_from_bytes.__globals__", "torch.jit.load",
    "torch._utils._rebuild_tensor", "torch.serialization.load", "numpy.load", "numpy.testing._private.utils.runstring",
    "numpy.core.multiarray.fromfile", "torch_utils.persistence.other", "dnnlib.util.other",
    "dnnlib.util.EasyDict.__init__", "lib.Thing.__class__", "lib.other", "lib", "", ".", "Thing",
]  # fmt: skip


@pytest.mark.parametrize("full", DANGEROUS)
def test_other_names_are_refused(full: str, read: Callable[..., Any]) -> None:
    module, _, name = full.rpartition(".")
    as_lines = f"c{module}\n{name}\n(U\x04true".encode() + b"tR."
    as_values = b"".join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name))
    for content in (as_lines, b"\x80\x04" + as_values + b"\x93(\x8c\x04truetR."):
        with pytest.raises(Refused, match="is not on the list of what these files need"):
            read(content)


class _Runs:
    def __init__(self, reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_runs(protocol: int, read: Callable[..., Any], tmp_path: Path) -> None:
    """Pickles that make a folder where they are loaded; and no event of the interpreter tells of anything done."""
    target = str(tmp_path / "was-executed")
    commands = [
        (os.mkdir, (target,)),
        (eval, (f"__import__('os').mkdir({target!r})",)),
        (os.system, (f"mkdir {target}",)),
    ]
    contents = [pickle.dumps({"x": [_Runs(command)]}, protocol) for command in commands]
    with auditing() as events:
        for content in contents:
            with pytest.raises(Refused):
                read(content)
    assert not os.path.exists(target)
    assert not events
    pickle.loads(contents[0])
    assert os.path.exists(target), "the pickle would not have done anything"


class auditing:
    """Records what the interpreter reports of imports, code, processes, and files opened for writing."""

    _events: list[str] | None = None
    _installed = False

    def __enter__(self) -> list[str]:
        if not auditing._installed:
            sys.addaudithook(auditing._hook)
            auditing._installed = True
        auditing._events = []
        return auditing._events

    def __exit__(self, *exception: object) -> None:
        auditing._events = None

    @staticmethod
    def _hook(event: str, args: tuple[Any, ...]) -> None:
        if auditing._events is None:
            return
        suspicious = ("import", "exec", "compile", "os.", "subprocess.", "socket.", "ctypes.", "pickle.", "marshal.")
        if event.startswith(suspicious) and event not in ("os.listdir", "os.scandir"):
            auditing._events.append(f"{event} {args}")


def test_calls_and_states_that_are_not_meant(read: Callable[..., Any]) -> None:
    cases = {
        b"U\x01aN\x85R.": "calls what cannot be called",
        b"clib\nmention\n)R.": "calls what cannot be called",
        b"clib\nThing\nK\x01R.": "calls what cannot be called",
        b"clib\nThing\nK\x01\x85R.": "1 arguments",
        b"clib\nThing\nK\x01\x85\x81.": "not one of these files' classes",
        b"clib\nmention\n)\x81.": "not one of these files' classes",
        b"N)\x81.": "not one of these files' classes",
        b"clib\nThing\n}b.": "sets the state of what has none",
        b"]}b.": "sets the state of what has none",
        b"}Nb.": "sets the state of what has none",
        b"}U\x01ab.": "sets the state of what has none",
        b"N]a.": "appends to what is not a list",
        b"}(Ne.": "appends to what is not a list",
        b"N(Nu.": "not a dictionary",
        b"}(U\x01au.": "a key without a value",
        b"](N\x90.": "adds to what is not a set",
        b"}]Ns.": "key in it is not a string or a small integer",
        b"}))s.": "key in it is not a string or a small integer",
        b"\x8f(]\x90.": "key in it is not a string or a small integer",
        b"}\x8a\x09" + (2**61).to_bytes(9, "little") + b"Ns.": "small integer",
        b"U\x01aQ.": "an object outside of the file",
        b"\x80\x04NN\x93.": "names something by what is not a string",
    }
    for content, words in cases.items():
        with pytest.raises(Refused, match=words):
            read(content)


def test_damaged(read: Callable[..., Any]) -> None:
    cases = {
        b"": "ends early",
        b"\x80": "ends early",
        b"\x80\xff.": "protocol is 255",
        b"N": "ends early",
        b".": "takes more values than there are",
        b"(.": "takes more values than there are",
        b"N(0.": "POP is not",
        b"e.": "has no beginning",
        b"](.": "takes more values than there are",
        b"N(R.": "takes more values than there are",
        b"h\x00.": "value 0, which it has not made",
        b"j\xff\xff\xff\xff.": "value 4294967295",
        b"q\x00.": "takes more values than there are",
        b"\x95" + struct.pack("<Q", 2**63) + b"N.": "a frame of",
        b"\x8c\x02\xff\xff.": "not utf-8",
        b"U\x01\xff.": "not ascii",
        b"S'abc\n.": "quoted string",
        b"S'a\\x00'\n.": "quoted string",
        b"V\\ud\n.": "raw-unicode-escape",
        b"\x8a\x20" + bytes(32) + b".": "integer of 32 bytes",
        b"c" + b"a" * 300: "longer than 256",
        b"cos": "ends early",
        b"T\xff\xff\xff\xff": "string of -1 bytes",
        b"X\xff\xff\xff\xff": "string of 4294967295 bytes",
        b"X\x00\x00\x10\x00": "ends early: 1048576 bytes should follow byte 5, 0 do",
        b"B\xff\xff\xff\xff": "ends early",
        b"\x8d" + struct.pack("<Q", 2**62): "string of",
        b"\x8e" + struct.pack("<Q", 2**62): "ends early",
        b"\x8e" + struct.pack("<Q", 2**64 - 1): "ends early",
    }
    for content, words in cases.items():
        with pytest.raises(Refused, match=words):
            read(content)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that ask for much."""
    many = 100_000
    yield "empty sets", b"\x80\x04" + b"\x8f" * many
    yield "empty dictionaries in a list", b"](" + b"}" * many + b"e."
    yield "memo", b"\x80\x04N" + b"\x94" * many
    yield "far memo entries", b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(many))
    yield "marks", b"(" * many
    yield "lists in lists", b"]" * many + b"a" * (many - 1) + b"."
    yield "tuples in tuples", b"N" + b"\x85" * many + b"."
    yield "billion laughs", b"N\x85q\x00" + b"h\x00h\x00h\x00\x87q\x00" * (many // 8) + b"."
    yield "billion laughs as a key", b"}N\x85q\x00" + b"h\x00h\x00\x86q\x00" * (many // 8) + b"Ns."
    yield "a list that holds itself", b"]q\x00" + b"h\x00a" * (many // 3) + b"."
    yield "wide characters", b"X" + struct.pack("<I", 100_004) + "😀".encode() + b"a" * 100_000 + b"."
    yield "many long claims", (b"\x8e" + struct.pack("<Q", 2**40)) * 1000
    yield "frames", (b"\x95" + struct.pack("<Q", 1)) * (many // 9) + b"N."


@pytest.mark.parametrize("content", [content for _, content in bombs()], ids=[name for name, _ in bombs()])
def test_memory_is_in_proportion_to_the_file(content: bytes, read: Callable[..., Any]) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(Refused):
            read(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22 + 40 * len(content)


def test_bytes_are_interpreted_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x8e" + struct.pack("<Q", 1000) + bytes(1000) + b".")
    with SourceFile(path) as file:
        blob = safe_pickle.load(Reader(file, 0, file.size), {})
        assert blob.read() == bytes(1000)
        with pytest.raises(Refused, match="the same bytes read several times"):
            blob.read()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10_000))
    with SourceFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(Refused, match="became shorter"):
            file.read_at(4000, 2000)


instructions = st.sampled_from([op.encode("latin1") for op in pickletools.code2op]) | st.sampled_from(
    [
        b"clib\nThing\n", b"clib\nmention\n", b"cos\nsystem\n", b"K\x01", b"U\x01a", b"\x8c\x03lib\x8c\x05Thing\x93",
        b"(",
        b"h\x00", b"q\x00", b"h\x01", b"q\x01", b")R", b")\x81", b"}b", b"\x86", b"C\x03abc", b"J\xff\xff\xff\xff",
    ]
)  # fmt: skip


def check_instructions(parts: list[bytes], read: Callable[..., Any]) -> None:
    with contextlib.suppress(Refused):
        read(b"".join(parts) + b".", persistent=lambda value: value)


@given(parts=st.lists(instructions, max_size=60))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_instructions(parts: list[bytes], read: Callable[..., Any]) -> None:
    check_instructions(parts, read)


@pytest.mark.slow
@given(parts=st.lists(instructions, max_size=200))
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_instructions_at_length(parts: list[bytes], read: Callable[..., Any]) -> None:
    check_instructions(parts, read)
