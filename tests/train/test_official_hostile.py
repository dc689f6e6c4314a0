"""Well-formed files of the reference program that are hostile, or not what they should be: refused with a reason."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_files as files
import pytest
import torch
from official_files import (
    Call,
    Mention,
    New,
    PersistentId,
    easy_dict,
    ordered_dict,
    persistent,
    small_net,
    write,
)
from small_official import NAME, import_everything, minimal_state, reason, tiny_net
from test_safe_pickle import auditing

from python_train import UserError
from python_train.network import Precond
from python_train.official import read_official, read_snapshot, read_training_state
from python_train.pickles.objects import Module, modules_of


@pytest.fixture(scope="module", autouse=True)
def _everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    import_everything(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def network() -> Precond:
    return tiny_net()


def hostile_snapshots() -> dict[str, tuple[Callable[[Precond], bytes], str]]:
    """Well-formed pickles that are not what they should be, and a word of the reason."""
    storage = Call(("torch.storage", "_load_from_bytes"), (files.blob(torch.zeros(12).half()),))

    def tensor(*args: Any, name: str = "_rebuild_tensor_v2", hooks: Any = None) -> Call:
        return Call(("torch._utils", name), (*args, False, ordered_dict({}) if hooks is None else hooks))

    def one(value: Any) -> Callable[[Precond], bytes]:
        return lambda net: files.dumps(easy_dict({"extra": value}))

    def reconstruct(meta: Any) -> Callable[[Precond], bytes]:
        return one(Call(("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,)))

    def storage_id(*parts: Any) -> Callable[[Precond], bytes]:
        return blob_with(3, PersistentId(parts))

    def blob(parts: list[Any], tail: bytes) -> Callable[[Precond], bytes]:
        content = b"".join(files.dumps(part, protocol=2) for part in parts) + tail
        return one(Call(("torch.storage", "_load_from_bytes"), (content,)))

    def network(change: Callable[[dict[str, Any]], Any]) -> Callable[[Precond], bytes]:
        def make(net: Precond) -> bytes:
            content = files.contents(net)
            change(content["ema"].args[0]["state"])
            return files.dumps(content)

        return make

    def argument(**kwargs: Any) -> Callable[[Precond], bytes]:
        return network(lambda state: state["_init_kwargs"].update(kwargs))

    def swap(name: str, value: Any) -> Callable[[Precond], bytes]:
        return network(
            lambda state: state["_modules"]["logvar_linear"].args[0]["state"]["_parameters"].update({name: value})
        )

    half, system = Mention(("torch", "HalfStorage")), {"little_endian": True}
    good = [0x1950A86A20F9469CFC6C, 1001, system, PersistentId(("storage", half, "0", "cpu", 1, None)), ["0"]]
    end = (1).to_bytes(8, "little") + b"\0\0"

    def blob_with(index: int, value: Any, tail: bytes = end) -> Callable[[Precond], bytes]:
        return blob([*good[:index], value, *good[index + 1 :]], tail)

    def dtype(name: str, order: str = "<", fields: Any = None) -> Call:
        return Call(("numpy", "dtype"), (name, False, True), (3, order, fields, None, None, -1, -1, 0))

    def array(state: Any) -> Callable[[Precond], bytes]:
        return one(Call(("numpy._core.multiarray", "_reconstruct"), (Mention(("numpy", "ndarray")), (0,), b"b"), state))

    shared = tensor(storage, 0, (1, 4), (4, 1))
    deep: Any = persistent("MPConv", {"_modules": {}})
    for _ in range(40):
        deep = persistent("MPConv", {"_modules": {"a": deep}})
    return {
        "nothing": (lambda net: files.dumps(easy_dict({})), "holds no EDM2 network"),
        "a number": (lambda net: files.dumps(1), "holds no EDM2 network"),
        "a dictionary as network": (lambda net: files.snapshot(net, ema={}), "holds no EDM2 network"),
        "another class": (lambda net: files.snapshot(net, ema=persistent("UNet", {})), "holds no EDM2 network"),
        "bytes after the end": (lambda net: files.snapshot(net) + b"x", "1 bytes follow"),
        "offset": (one(tensor(storage, 1, (12,), (1,))), "reaches outside"),
        "negative offset": (one(tensor(storage, -1, (2,), (1,))), "negative"),
        "stride": (one(tensor(storage, 0, (3, 4), (5, 1))), "reaches outside"),
        "negative stride": (one(tensor(storage, 3, (3,), (-1,))), "negative"),
        "expanded": (one(tensor(storage, 0, (2**30, 2**29), (0, 0))), "reaches outside"),
        "expanded a little": (one(tensor(storage, 0, (13,), (0,))), "reaches outside"),
        "overflow": (one(tensor(storage, 0, (2**33, 2**33), (2**33, 1))), "reaches outside"),
        "huge numbers": (one(tensor(storage, 0, (2**70,), (1,))), "few integers"),
        "negative size": (one(tensor(storage, 0, (-2,), (1,))), "negative"),
        "a boolean size": (one(tensor(storage, 0, (True,), (1,))), "few integers"),
        "size list": (one(tensor(storage, 0, [2], (1,))), "few integers"),
        "dimensions": (one(tensor(storage, 0, (1,) * 99, (1,) * 99)), "few integers"),
        "no stride": (one(tensor(storage, 0, (2,), ())), "one stride for each"),
        "no storage": (one(tensor(None, 0, (2,), (1,))), "no storage"),
        "offset text": (one(tensor(storage, "0", (2,), (1,))), "no offset"),
        "parameter of nothing": (one(tensor(1, name="_rebuild_parameter")), "not made of a tensor"),
        "arguments": (one(Call(("torch._utils", "_rebuild_tensor_v2"), (storage,))), "1 arguments"),
        "storage of text": (one(Call(("torch.storage", "_load_from_bytes"), ("abc",))), "not made of bytes"),
        "storage of nothing": (one(Call(("torch.storage", "_load_from_bytes"), (b"",))), "ends early"),
        "magic": (blob_with(0, 1), "does not begin like"),
        "protocol": (blob_with(1, 1002), "does not begin like"),
        "big-endian": (blob_with(2, {"little_endian": False}), "not little-endian"),
        "no byte order": (blob_with(2, [True]), "not little-endian"),
        "no persistent id": (blob_with(3, 3), "not exactly one"),
        "persistent id of a module": (storage_id("module", half, "0", "cpu", 1, None), "not a storage"),
        "persistent id of nothing": (storage_id(), "not a storage"),
        "a view": (storage_id("storage", half, "0", "cpu", 1, ("1", 0, 1)), "not a storage"),
        "storage type": (storage_id("storage", "HalfStorage", "0", "cpu", 1, None), "no type"),
        "unknown storage type": (
            blob_with(3, PersistentId(("storage", Mention(("torch", "ComplexFloatStorage")), "0", "cpu", 1, None))),
            "torch.ComplexFloatStorage",
        ),
        "negative count": (storage_id("storage", half, "0", "cpu", -1, None), "no size"),
        "another count": (storage_id("storage", half, "0", "cpu", 2, None), "claims 2 numbers"),
        "great count": (storage_id("storage", half, "0", "cpu", 2**62, None), "claims 4611"),
        "two keys": (blob_with(4, ["0", "1"]), "not exactly one"),
        "another key": (blob_with(4, ["1"]), "not exactly one"),
        "too few bytes": (blob(good, end[:-1]), "claims 1 numbers"),
        "two counts": (blob(good, (2).to_bytes(8, "little") + b"\0\0"), "claims 1 numbers"),
        "too many bytes": (blob(good, end + b"\0"), "claims 1 numbers"),
        "code in a blob": (blob_with(2, Call(("os", "system"), ("true",))), "os.system"),
        "a blob in a blob": (blob_with(2, Call(("torch.storage", "_load_from_bytes"), (b"",))), "_load_from_bytes"),
        "persistent id outside of a blob": (one(PersistentId(("storage", "0"))), "outside of the file"),
        "object of another version": (reconstruct({"type": "class", "version": 7}), "version 6"),
        "object of another type": (reconstruct({"type": "function", "version": 6}), "version 6"),
        "object without state": (one(persistent("Precond", None)), "no class name or no state"),
        "object without name": (one(persistent(None, {})), "no class name or no state"),
        "objects of an array": (array((1, (1,), dtype("O8"), False, b"\0" * 8)), "plain numbers"),
        "big-endian array": (array((1, (1,), dtype("f4", ">"), False, b"\0" * 4)), "little"),
        "array of records": (array((1, (1,), dtype("f4", "<", (1,)), False, b"")), "sub-types"),
        "array size": (array((1, (2**40,), dtype("f4"), False, b"\0" * 4)), "does not have"),
        "array without type": (array((1, (1,), "f4", False, b"\0" * 4)), "no shape and type"),
        "array state": (array({}), "no shape and type"),
        "array of a list": (array((1, (2,), dtype("f4"), False, [1.0, 2.0])), "does not have"),
        "module state": (one(New(("torch.nn.modules.container", "ModuleDict"), 3)), "not a dictionary"),
        "deep modules": (network(lambda state: state["_modules"].update(a=deep)), "contain each other"),
        "no modules": (network(lambda state: state.update(_modules=3)), "_modules of a Precond"),
        "a module that is none": (network(lambda state: state["_modules"].update(a=3)), "not a module"),
        "a tensor that is none": (swap("weight", 3), "is not a tensor"),
        "an integer tensor": (
            swap("weight", files.inline_tensor(torch.zeros(1, 4, dtype=torch.int64))),
            "torch.int64 numbers",
        ),
        "a bad name": (swap("a.b", None), "is not one"),
        "an empty name": (swap("", None), "is not one"),
        "a name that is a number": (swap(3, None), "is not one"),
        "a missing tensor": (swap("weight", None), "missing, unknown or of a wrong shape"),
        "an unknown tensor": (swap("bias", shared), "bias' is missing, unknown"),
        "a wrong shape": (swap("weight", shared and tensor(storage, 0, (4, 1), (1, 1))), "wrong shape"),
        "no arguments": (network(lambda state: state.pop("_init_kwargs")), "how it was made"),
        "positional arguments": (network(lambda state: state.update(_init_args=(8,))), "how it was made"),
        "another size": (argument(model_channels=8), "missing, unknown or of a wrong shape"),
        "an endless network": (argument(num_blocks=2**30), "should have 1073741824 blocks"),
        "blocks as text": (argument(num_blocks="3"), "num_blocks"),
        "a great width": (argument(model_channels=2**30), "cannot be made"),
        "too great a width": (argument(model_channels=2**62), "model_channels"),
        "text": (argument(model_channels="4"), "model_channels"),
        "a list for a number": (argument(model_channels=[4]), "model_channels"),
        "a number for a list": (argument(channel_mult=1), "should have 1 blocks"),
        "levels": (argument(channel_mult=[1] * 40), "channel_mult"),
        "levels for the resolution": (argument(img_resolution=7, channel_mult=[1] * 2), "cannot be made"),
        "no levels": (argument(channel_mult=[]), "cannot be made"),
        "not a number": (argument(model_channels=float("nan")), "model_channels"),
        "an infinite number": (argument(model_channels=float("inf")), "model_channels"),
        "an unknown argument": (argument(colour=3), "colour"),
        "many blocks": (argument(num_blocks=2, channel_mult=[1] * 8), "should have 2 blocks"),
        "a name of two lines": (one(persistent("a\nb", {})), "no class name"),
        "another resolution": (argument(img_resolution=4), "missing, unknown"),
        "no resolution": (argument(img_resolution=None), "cannot be made"),
        "another balance": (argument(res_balance=0.5), "res_balance 0.3, not with 0.5"),
        "another clip": (argument(clip_act=1.0), "clip_act"),
        "another sigma_data": (argument(sigma_data=1.0), "sigma_data"),
        "no encoder": (lambda net: files.snapshot(net, encoder=None), "encoder"),
        "another encoder": (lambda net: files.snapshot(net, encoder=persistent("Encoder", {})), "encoder"),
        "an encoder without arrays": (
            lambda net: files.snapshot(net, encoder=persistent("StabilityVAEEncoder", {})),
            "no scale and bias",
        ),
    }  # fmt: skip


HOSTILE = hostile_snapshots()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_snapshots_are_refused(name: str, network: Precond, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    path = write(tmp_path / NAME, make(network))
    why = refusal(lambda: read_snapshot(path))
    assert why is not None
    assert why.startswith(f"{path} is refused: ")
    assert words in why
    assert "\n" not in why
    assert len(why) < 400


def refusal(read: Callable[[], object]) -> str | None:
    """Why a file was not read. It may take or allocate no more than its size explains, and execute nothing."""
    tracemalloc.start()
    try:
        with auditing() as events:
            why = reason(read)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert not events
    return why


def test_modules_that_contain_each_other() -> None:
    """Cycles, and graphs in which every module is reached by two ways: a walk would never end."""
    cycle = Module("ModuleDict")
    cycle.build({"_modules": {"a": cycle}})
    doubled = Module("ModuleDict")
    for _ in range(40):
        doubled = Module("ModuleDict", {"_modules": {"a": doubled, "b": doubled}})
    shared = Module("MPConv")
    siblings = Module("ModuleDict", {"_modules": {"a": shared, "b": shared}})
    for module in (cycle, doubled, siblings):
        with pytest.raises(UserError, match="contain each other"):
            modules_of(module)


def test_the_same_numbers_many_times(tmp_path: Path) -> None:
    """A storage that all parameters view: the tensors would be larger than the file."""
    net = tiny_net(model_channels=64)
    content = files.contents(net)
    largest = max(net.parameters(), key=torch.numel)
    shared = Call(("torch.storage", "_load_from_bytes"), (files.blob(largest.half()),))
    writer = files._Writer(files.CURRENT, 4)
    original = writer.write

    def write_once(value: Any) -> bytes:
        if not isinstance(value, Call) or value.name[1] != "_load_from_bytes":
            return original(value)
        if "storage" in writer.memo:
            return writer.remembered("storage", b"")
        first = original(shared)
        writer.memo["storage"] = writer.memo_size - 1
        return first

    writer.write = write_once
    path = write(tmp_path / NAME, writer.dumps(content))
    assert path.stat().st_size < sum(param.numel() * 2 for param in net.parameters())
    with pytest.raises(UserError, match="the same numbers several times"):
        read_snapshot(path)


def hostile_states() -> dict[str, tuple[bytes, str]]:
    def state(content: Any = None, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
        pkl = files.dumps(minimal_state() if content is None else content, protocol=2)
        return files.zip_file(pkl, {"0": bytes(16)} if storages is None else storages, **options)

    whole = state()
    at = whole.index(b"state/data/0") + len("state/data/0")
    two = io.BytesIO()
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    claim = bytearray(whole)
    central = whole.index(b"PK\1\2")
    claim[central + 20 : central + 28] = (2**31).to_bytes(4, "little") * 2
    tensors = {"unet.enc.8x8_conv.weight": 3}
    return {
        "no network in it": (whole, "input convolution"),
        "cut off": (whole[:-10], "not a zip file"),
        "a flipped bit": (whole[:at] + b"\1" + whole[at + 1 :], "checksum"),
        "compressed": (state(compression=zipfile.ZIP_DEFLATED), "compressed"),
        "a great claim": (bytes(claim), "claim more bytes"),
        "two pickles": (two.getvalue(), "not one data.pkl"),
        "big-endian": (state(byteorder=b"big"), "not little-endian"),
        "no storage": (state(storages={}), "which are not there"),
        "another size": (state(storages={"0": bytes(15)}), "which are not there"),
        "no counter": (state(minimal_state(state={})), "no state.cur_nimg"),
        "a negative counter": (state(minimal_state(state={"cur_nimg": -1})), "no state.cur_nimg"),
        "not a dictionary": (state([1]), "no state.cur_nimg"),
        "no average": (state(minimal_state(ema=None)), "no average"),
        "widths": (state(minimal_state(ema={"stds": [0.05, 0.1], "emas": [{}]})), "one width for each"),
        "a width of text": (state(minimal_state(ema={"stds": ["0.05"], "emas": [{}]})), "numbers in (0, 1)"),
        "a width above 1": (state(minimal_state(ema={"stds": [1.5], "emas": [{}]})), "numbers in (0, 1)"),
        "the same width": (state(minimal_state(ema={"stds": [0.05] * 2, "emas": [{}] * 2})), "two averages"),
        "many averages": (state(minimal_state(ema={"stds": [0.05] * 99, "emas": [{}] * 99})), "few numbers"),
        "a list as average": (state(minimal_state(ema={"stds": [0.05], "emas": [[]]})), "not a dictionary"),
        "numbers as tensors": (state(minimal_state(ema={"stds": [0.05], "emas": [tensors]})), "dictionary of tensors"),
        "code": (state(Call(("os", "system"), ("true",))), "os.system"),
        "a blob": (state(Call(("torch.storage", "_load_from_bytes"), (1,))), "_load_from_bytes"),
        "an object": (state(persistent("Precond", {})), "_reconstruct_persistent_obj"),
        "long text as bytes": (state(Call(("_codecs", "encode"), ("a" * 5000, "latin1"))), "short latin1"),
        "wide text as bytes": (state(Call(("_codecs", "encode"), ("€", "latin1"))), "latin1"),
        "another encoding": (state(Call(("_codecs", "encode"), ("a", "zip"))), "latin1"),
        "a scalar of nothing": (state(Call(("numpy._core.multiarray", "scalar"), (1, b"")), {}), "NumPy number"),
        "another file": (b"<html>", "byte 0x3c is not an instruction"),
        "an empty file": (b"", "ends early"),
    }  # fmt: skip


STATES = hostile_states()


@pytest.mark.parametrize("name", STATES)
def test_hostile_training_states_are_refused(name: str, tmp_path: Path) -> None:
    content, words = STATES[name]
    path = write(tmp_path / "training-state-0000001.pt", content)
    why = refusal(lambda: read_official(path))
    assert why is not None
    assert why.startswith(f"{path} is refused: ")
    assert words in why
    assert len(why) < 400


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"sigma_rel": 2.0}, "sigma_rel is not a number in (0, 1)"),
        ({"sigma_rel": "0.1"}, "sigma_rel is not a number in (0, 1)"),
        ({"ema_kind": "other"}, "ema_kind, license or shape"),
        ({"license": 7}, "ema_kind, license or shape"),
        ({"dataset": [1]}, "is not a dictionary"),
        ({"dataset": {"name": float("nan")}}, "not plain"),
        ({"dataset": {"name": torch.zeros(2)}}, "not plain"),
        ({"dataset": {"name": "x" * 2**20}}, "too long"),
        ({"encoder": {"kind": "unknown"}}, "encoder is unknown"),
        ({"encoder": {"kind": "pixel", "more": 1}}, "encoder is unknown"),
        ({"net": {}}, "should have 1 blocks at each level and has 0 tensors"),
        ({"net": [1]}, "not a dictionary of tensors"),
        ({"net": {"unet.out_gain": 1}}, "not a dictionary of tensors"),
        ({"init_kwargs": {"img_resolution": "8"}}, "not a number or a short list of numbers"),
        ({"init_kwargs": None}, "does not say how it was made"),
        ({"state": {}}, "has no state.cur_nimg"),
    ],
)
def test_hostile_exports_are_refused(facts: dict[str, Any], words: str, network: Precond, tmp_path: Path) -> None:
    """Files like those of convert --to official whose content is not what it should be."""
    content = {
        "state": {"cur_nimg": 1024},
        "net": network.state_dict(),
        "init_kwargs": network.config,
        "sigma_rel": 0.05,
        "ema_kind": "power",
    }
    path = tmp_path / "export.pt"
    torch.save(content, path)
    assert read_official(path).header["sigma_rel"] == 0.05
    torch.save({**content, **facts}, path)
    why = refusal(lambda: read_official(path))
    assert why is not None
    assert why.startswith(f"{path} is refused: ")
    assert words in why
    assert len(why) < 400


def test_averages_of_two_networks(tmp_path: Path) -> None:
    nets = {std: small_net(channels=channels, model_channels=64) for std, channels in ((0.05, 3), (0.1, 4))}
    path = write(tmp_path / "training-state-0000001.pt", files.training_state(nets))
    with pytest.raises(UserError, match="its averages are not of one network"):
        read_training_state(path)
