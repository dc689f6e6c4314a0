"""Files like those of the EDM2 reference program, written from the description of their format (spec 9).

Two writers: :func:`snapshot` spells every instruction of the pickle out, in the layouts of old and new torch and
NumPy; :func:`real_snapshot` lets the installed pickle, torch and NumPy write objects whose classes carry the
reference's names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_train.network import Block, Precond, UNet

MODULE_SRC = "raise SystemExit('the source in a pickle was executed')\n" * 20
STORAGE_TYPES = {
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.int64: "LongStorage",
}


def small_net(label_dim: int = 3, channels: int = 3, **overrides: Any) -> Precond:
    """A random network whose every path is live, with attention in one block and a non-default argument or two."""
    arguments = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], **overrides}
    arguments = {"channels_per_head": 16, "logvar_channels": 8, "dropout": 0.1, **arguments}
    net = Precond(img_resolution=8, img_channels=channels, label_dim=label_dim, **arguments)
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.7)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- every instruction by hand


@dataclasses.dataclass(frozen=True)
class Call:
    """REDUCE of a name with arguments, then optionally BUILD."""

    name: tuple[str, str]
    args: tuple[Any, ...]
    state: Any = None


@dataclasses.dataclass(frozen=True)
class New:
    """NEWOBJ of a name without arguments, then optionally BUILD."""

    name: tuple[str, str]
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Mention:
    """A name as it stands."""

    name: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class PersistentId:
    """BINPERSID of a value."""

    value: Any


class Items(dict):
    """A dictionary that is made by REDUCE or NEWOBJ of a name and then filled."""

    def __init__(self, name: tuple[str, str], items: dict[Any, Any], *, new: bool = False, state: Any = None) -> None:
        super().__init__(items)
        self.name, self.new, self.state = name, new, state


def easy_dict(items: dict[Any, Any]) -> Items:
    return Items(("dnnlib.util", "EasyDict"), items, new=True)


def ordered_dict(items: dict[Any, Any], state: Any = None) -> Items:
    return Items(("collections", "OrderedDict"), items, state=state)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What differs between versions of the libraries."""

    protocol: int = 4
    old_torch: bool = False  # modules keep OrderedDicts
    numpy: str = "numpy._core.multiarray"


CURRENT = Layout()
LAYOUTS = {
    "current": CURRENT,
    "old torch": Layout(old_torch=True),
    "NumPy 1": Layout(numpy="numpy.core.multiarray"),
    "old torch, NumPy 1, protocol 3": Layout(3, True, "numpy.core.multiarray"),
}


def dumps(value: Any, layout: Layout = CURRENT, protocol: int | None = None) -> bytes:
    """The pickle of a value made of plain containers and the classes above."""
    return _Writer(layout, layout.protocol if protocol is None else protocol).dumps(value)


class _Writer:
    def __init__(self, layout: Layout, protocol: int) -> None:
        self.layout = layout
        self.protocol = protocol
        self.memo: dict[Any, int] = {}
        self.memo_size = 0

    def dumps(self, value: Any) -> bytes:
        content = self.write(value) + pickle.STOP
        frame = pickle.FRAME + struct.pack("<Q", len(content)) if self.protocol >= 4 else b""
        return pickle.PROTO + bytes([self.protocol]) + frame + content

    def memoize(self) -> bytes:
        index, self.memo_size = self.memo_size, self.memo_size + 1
        if self.protocol >= 4:
            return pickle.MEMOIZE
        return pickle.BINPUT + bytes([index]) if index < 256 else pickle.LONG_BINPUT + struct.pack("<I", index)

    def remembered(self, key: Any, content: bytes) -> bytes:
        """``content`` the first time, a reference to it from then on."""
        if key not in self.memo:
            self.memo[key] = self.memo_size
            return content + self.memoize()
        index = self.memo[key]
        return pickle.BINGET + bytes([index]) if index < 256 else pickle.LONG_BINGET + struct.pack("<I", index)

    def name(self, name: tuple[str, str]) -> bytes:
        if self.protocol < 4:
            return self.remembered(name, pickle.GLOBAL + f"{name[0]}\n{name[1]}\n".encode())
        if name in self.memo:
            return self.remembered(name, b"")
        parts = self.write(name[0]) + self.write(name[1])
        return parts + self.remembered(name, pickle.STACK_GLOBAL)

    def write(self, value: Any) -> bytes:
        match value:
            case None:
                return pickle.NONE
            case bool():
                return pickle.NEWTRUE if value else pickle.NEWFALSE
            case int() if 0 <= value < 256:
                return pickle.BININT1 + bytes([value])
            case int() if 0 <= value < 65536:
                return pickle.BININT2 + struct.pack("<H", value)
            case int() if -(2**31) <= value < 2**31:
                return pickle.BININT + struct.pack("<i", value)
            case int():
                content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return pickle.LONG1 + bytes([len(content)]) + content
            case float():
                return pickle.BINFLOAT + struct.pack(">d", value)
            case str():
                return self.remembered(value, self.string(value.encode()))
            case bytes():
                return self.bytes(value)
            case Items():
                make = self.name(value.name) + pickle.EMPTY_TUPLE + (pickle.NEWOBJ if value.new else pickle.REDUCE)
                made = make + self.memoize() + self.items(value)
                return made + (b"" if value.state is None else self.write(value.state) + pickle.BUILD)
            case dict():
                return pickle.EMPTY_DICT + self.memoize() + self.items(value)
            case list():
                content = b"".join(self.write(item) for item in value)
                return pickle.EMPTY_LIST + self.memoize() + pickle.MARK + content + pickle.APPENDS
            case set():
                content = b"".join(self.write(item) for item in value)
                return pickle.EMPTY_SET + self.memoize() + pickle.MARK + content + pickle.ADDITEMS
            case tuple():
                content = b"".join(self.write(item) for item in value)
                if len(value) > 3:
                    return pickle.MARK + content + pickle.TUPLE + self.memoize()
                end = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)[len(value)]
                return content + end + (self.memoize() if value else b"")
            case Call():
                made = self.name(value.name) + self.write(value.args) + pickle.REDUCE + self.memoize()
                return made + (b"" if value.state is None else self.write(value.state) + pickle.BUILD)
            case New():
                made = self.name(value.name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + self.memoize()
                return made + (b"" if value.state is None else self.write(value.state) + pickle.BUILD)
            case Mention():
                return self.name(value.name)
            case PersistentId():
                return self.write(value.value) + pickle.BINPERSID
        raise TypeError(type(value))

    def items(self, value: dict[Any, Any]) -> bytes:
        content = b"".join(self.write(key) + self.write(item) for key, item in value.items())
        return pickle.MARK + content + pickle.SETITEMS if value else b""

    def string(self, content: bytes) -> bytes:
        if self.protocol >= 4 and len(content) < 256:
            return pickle.SHORT_BINUNICODE + bytes([len(content)]) + content
        return pickle.BINUNICODE + struct.pack("<I", len(content)) + content

    def bytes(self, content: bytes) -> bytes:
        if self.protocol < 3:
            return self.write(Call(("_codecs", "encode"), (content.decode("latin1"), "latin1")))
        short = len(content) < 256
        length = bytes([len(content)]) if short else struct.pack("<I", len(content))
        return (pickle.SHORT_BINBYTES if short else pickle.BINBYTES) + length + content + self.memoize()


def blob(value: Tensor) -> bytes:
    """A storage in torch's form before its zip files: five pickles of protocol 2, a count, the numbers."""
    kind = Mention(("torch", STORAGE_TYPES[value.dtype]))
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    parts = [0x1950A86A20F9469CFC6C, 1001, system]
    parts += [PersistentId(("storage", kind, "94102", "cpu", value.numel(), None)), ["94102"]]
    head = b"".join(dumps(part, protocol=2) for part in parts)
    return head + struct.pack("<q", value.numel()) + raw(value)


def raw(value: Tensor) -> bytes:
    return bytes(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()) if value.numel() else b""


def tensor(storage: Any, value: Tensor, offset: int = 0) -> Call:
    args = (storage, offset, tuple(value.shape), tuple(value.contiguous().stride()), False, ordered_dict({}))
    return Call(("torch._utils", "_rebuild_tensor_v2"), args)


def inline_tensor(value: Tensor) -> Call:
    return tensor(Call(("torch.storage", "_load_from_bytes"), (blob(value),)), value)


def persistent(class_name: str, state: dict[str, Any]) -> Call:
    meta = {"type": "class", "version": 6, "module_src": MODULE_SRC, "class_name": class_name, "state": state}
    return Call(("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


def numpy_array(value: np.ndarray, layout: Layout) -> Call:
    dtype = Call(("numpy", "dtype"), (value.dtype.str[1:], False, True), (3, "<", None, None, None, -1, -1, 0))
    args = (Mention(("numpy", "ndarray")), (0,), b"b")
    return Call((layout.numpy, "_reconstruct"), args, (1, value.shape, dtype, False, value.tobytes()))


FACTS = {
    Block: ("flavor", "resample_mode", "num_heads", "dropout", "res_balance", "attn_balance", "clip_act"),
    UNet: ("label_balance", "concat_balance", "label_dim"),
    Precond: ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data"),
}


def module(node: torch.nn.Module, layout: Layout) -> Any:
    """The object that the reference would have in this module's place."""
    container = ordered_dict if layout.old_torch else dict
    parameters = {}
    for name, value in node._parameters.items():
        args = (inline_tensor(value.detach().half()), False, ordered_dict({}))
        parameters[name] = Call(("torch._utils", "_rebuild_parameter"), args)
    state: dict[str, Any] = {"training": False, "_parameters": container(parameters)}
    buffers = {name: inline_tensor(value.half()) for name, value in node._buffers.items()}
    state |= {"_buffers": container(buffers), "_non_persistent_buffers_set": set(), "_is_full_backward_hook": None}
    state |= {
        f"_{kind}_hooks": ordered_dict({}) for kind in ("forward", "backward", "state_dict", "load_state_dict_pre")
    }
    children = {name: child for name, child in node._modules.items() if child is not None}
    state["_modules"] = container({name: module(child, layout) for name, child in children.items()})
    state |= {name: None for name, child in node._modules.items() if child is None}
    if isinstance(node, torch.nn.ModuleDict):
        return New(("torch.nn.modules.container", "ModuleDict"), state)
    state |= {key: getattr(node, key) for key in FACTS.get(type(node), ())}
    if isinstance(node, Block):
        state |= {"out_channels": node.conv_res1.weight.shape[0], "resample_filter": list(node.resample_filter)}
    if isinstance(node, Precond):
        given = {key: value for key, value in node.config.items() if key not in ("sigma_data",)}
        state |= {"_init_args": (), "_init_kwargs": given}
    class_name = {"MPLinear": "MPConv"}.get(type(node).__name__, type(node).__name__)
    return persistent(class_name, state)


def contents(net: Precond, layout: Layout = CURRENT, **replaced: Any) -> Items:
    """What a snapshot of this network holds (spec 9.1)."""
    init = {"_init_args": (), "_init_kwargs": {}}
    encoder = persistent("StandardRGBEncoder", init)
    if net.img_channels == 4:
        scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
        bias = np.float32(0) - np.float32([5.81, 3.25, 0.12, -2.15]) * scale
        arrays = {"scale": numpy_array(scale, layout), "bias": numpy_array(bias, layout)}
        vae = {"vae_name": "stabilityai/sd-vae-ft-mse", "batch_size": 8, "_vae": None}
        encoder = persistent("StabilityVAEEncoder", {**init, **vae, **arrays})
    dataset = {"class_name": "training.dataset.ImageFolderDataset", "path": "datasets/img.zip", "use_labels": True}
    loss = persistent("EDM2Loss", {**init, "P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5})
    parts = {"encoder": encoder, "dataset_kwargs": easy_dict(dataset), "loss_fn": loss, "ema": module(net, layout)}
    return easy_dict({**parts, **replaced})


def snapshot(net: Precond, layout: Layout = CURRENT, **replaced: Any) -> bytes:
    """The bytes of a snapshot of this network."""
    return dumps(contents(net, layout, **replaced), layout)


# ---------------------------------------------------------------------------------------------- the libraries' own way


@contextlib.contextmanager
def reference_names() -> Iterator[types.SimpleNamespace]:
    """Importable modules with the names of the reference's; their only behaviour is how they are pickled."""
    util, persistence = types.ModuleType("dnnlib.util"), types.ModuleType("torch_utils.persistence")

    class EasyDict(dict):
        pass

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("a pickle was executed")

    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    util.EasyDict = EasyDict
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    names = {"dnnlib": types.ModuleType("dnnlib"), "torch_utils": types.ModuleType("torch_utils")}
    names |= {"dnnlib.util": util, "torch_utils.persistence": persistence}
    assert not names.keys() & sys.modules.keys()
    sys.modules.update(names)
    try:
        yield types.SimpleNamespace(EasyDict=EasyDict, reconstruct=_reconstruct_persistent_obj)
    finally:
        for name in names:
            del sys.modules[name]


class _Persistent:
    """Pickles as one of the reference's persistent objects does (spec 9.2)."""

    def __init__(self, reconstruct: Any, class_name: str, state: dict[str, Any]) -> None:
        meta = {"type": "class", "version": 6, "module_src": MODULE_SRC, "class_name": class_name, "state": state}
        self.reduced = reconstruct, (meta,)

    def __reduce__(self) -> Any:
        return self.reduced


def _real_module(node: torch.nn.Module, reconstruct: Any) -> Any:
    state = dict(node.__dict__)
    state["_modules"] = {name: child and _real_module(child, reconstruct) for name, child in node._modules.items()}
    if isinstance(node, torch.nn.ModuleDict):
        copy = torch.nn.ModuleDict()
        copy.__dict__.update(state)
        return copy
    if isinstance(node, Block):
        state["resample_filter"] = list(node.resample_filter)
    for key in ("compute_dtype", "memory_format", "config", "prepared"):
        state.pop(key, None)
    if isinstance(node, Precond):
        state |= {"_init_args": (), "_init_kwargs": dict(node.config)}
    return _Persistent(reconstruct, type(node).__name__, state)


def real_snapshot(net: Precond) -> bytes:
    """A snapshot as the installed pickle, torch and NumPy write it."""
    with reference_names() as names:
        encoder_state = {"_init_args": (), "_init_kwargs": names.EasyDict(), "_vae": None}
        encoder_state |= {"scale": np.float32([0.1] * net.img_channels), "bias": np.float32([0.2] * net.img_channels)}
        content = names.EasyDict(
            encoder=_Persistent(names.reconstruct, "StabilityVAEEncoder", encoder_state),
            dataset_kwargs=names.EasyDict(class_name="x", path="a/latents.zip", use_labels=True),
            loss_fn=_Persistent(names.reconstruct, "EDM2Loss", {"P_mean": -0.4}),
            ema=_real_module(net.half(), names.reconstruct),
        )
        return pickle.dumps(content, protocol=4)


def training_state(nets: dict[float, Precond] | Precond, nimg: int = 65536) -> bytes:
    """A training state as the installed torch writes it (spec 9.6): power-function averages, or a traditional one."""
    ema: Any
    if isinstance(nets, Precond):
        first, ema = nets, nets.state_dict()
    else:
        first = next(iter(nets.values()))
        ema = {"stds": list(nets), "emas": [net.state_dict() for net in nets.values()]}
    params = list(first.parameters())
    optimizer = torch.optim.Adam([param.clone().requires_grad_() for param in params], lr=0.01, betas=(0.9, 0.99))
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float64(0.003)
    buffer = io.BytesIO()
    with reference_names() as names:
        loss = {"_init_args": (), "_init_kwargs": names.EasyDict(P_mean=-0.4), "P_mean": -0.4, "sigma_data": 0.5}
        state = {
            "state": names.EasyDict(cur_nimg=nimg, total_elapsed_time=12.5),
            "net": first.state_dict(),
            "loss_fn": loss,
            "optimizer": optimizer.state_dict(),
            "ema": ema,
        }
        torch.save(state, buffer)
    return buffer.getvalue()


def zip_file(pkl: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """A zip file of torch with this ``data.pkl``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("state/data.pkl", pkl)
        for key, content in storages.items():
            archive.writestr(f"state/data/{key}", content)
        for name, content in members.items():
            archive.writestr(f"state/{name}", content)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
